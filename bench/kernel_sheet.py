"""What each kernel compiles to, on each architecture, without a GPU: registers, spills, memory, occupancy, loops.

    python bench/kernel_sheet.py [--reduced] [--only TEXT] [--json FILE]

The launchers run on meta tensors and what they hand to Triton is compiled instead of started, so that types,
divisibility and launch tables are the real ones. spills: bytes of stack a thread. local: instructions that touch it.
occupancy: CTAs that fit on one SM. loop: instructions issued a score in the steady loop, over the whole tiles, one
number a pass over them (an SM issues 128 lanes a clock); masked: the same in the loop over edge tiles; mufu: those of
loop that take the pipe of exp2 (16 lanes a clock). store: bits of the narrowest store to global memory in a loop.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# under the interpreter there would be nothing to compile
os.environ.pop("TRITON_INTERPRET", None)

import triton
from launchers import ARCHITECTURES, KERNELS, KIB, Case, all_cases, arguments, reduced_cases
from sass import KINDS, Code
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "causalattn.kernels"


class Row(NamedTuple):
    kernel: str
    function: str
    config: str
    arch: str
    warps: int
    registers: int
    spills: int
    local: int
    shared: int
    occupancy: int
    wgmma: int  # Hopper's HGMMA
    mma: int  # every matrix instruction
    exp: int
    store: int | None
    loop: list[float] | None
    masked: list[float] | None
    mufu: list[float] | None
    shared_limit: int
    kinds: list[dict[str, float]] | None  # loop, by kind of instruction


def sheet(cases: list[Case]) -> Iterator[Row]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for rows in pool.map(rows_of, cases):
            yield from rows


def rows_of(case: Case) -> list[Row]:
    return [measure(case, compiled) for compiled in compile_case(case)]


def compile_case(case: Case) -> list[CompiledKernel]:
    """The kernels that the case's launcher would start on its architecture, each once."""
    arch = ARCHITECTURES[case.arch]
    sources = {}

    def compile_instead(kernel, *args, grid, warmup, **kwargs):
        backend = make_backend(arch.target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, signature, constexprs, attrs)
        sources[source.hash(), options.hash()] = source, options

    kernel = KERNELS[case.launcher]
    module = importlib.import_module(f"{PACKAGE}.{kernel.module}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        for each in [each for name, each in sys.modules.items() if name.startswith(f"{PACKAGE}.")]:
            if hasattr(each, "architecture"):
                stack.enter_context(mock.patch.object(each, "architecture", lambda x: arch.number))
        launcher = getattr(module, case.launcher)
        made = arguments(case) | kernel.arguments(case)
        launcher(**{name: made[name] for name in inspect.signature(launcher).parameters})
    return [
        triton.compile(source, target=arch.target, options=options.__dict__) for source, options in sources.values()
    ]


def measure(case: Case, compiled: CompiledKernel) -> Row:
    arch = ARCHITECTURES[case.arch]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if arch.target.backend == "hip":
        numbers = _read_amd(compiled.asm["amdgcn"])
        # a SIMD, of four, gives a lane 512 registers
        by_registers = 4 * min(8, 512 // _up(numbers["registers"], 8)) // warps
        by_shared = arch.shared_total // max(1, shared)
    else:
        numbers = _read_nvidia(compiled, case)
        by_registers = 65536 // (_up(numbers["registers"], 8) * 32 * warps)
        by_shared = arch.shared_total // (shared + KIB)
    size = [f"D={case.D}"] if case.D else []
    return Row(
        kernel=KERNELS[case.launcher].module,
        function=compiled.metadata.name,
        config=" ".join([*size, str(case.dtype).removeprefix("torch."), *sorted(case.options)]),
        arch=case.arch,
        warps=warps,
        shared=shared,
        occupancy=min(arch.ctas, arch.warps // warps, by_registers, by_shared),
        shared_limit=arch.shared_limit,
        **numbers,
    )


def _read_nvidia(compiled: CompiledKernel, case: Case) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-sass", "-res-usage", file.name], text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = (int(number) for number in usage.groups())
    code = Code(text)
    count = Counter(x.kind for x in code.instructions)
    return {
        "registers": registers,
        "spills": stack + local,
        "local": count["local"],
        "wgmma": sum(x.opcode.startswith("HGMMA") for x in code.instructions),
        "mma": count["mma"],
        "exp": count["exp"],
        "store": code.store_bits(),
        **_loops(code, compiled, case),
    }


def _loops(code: Code, compiled: CompiledKernel, case: Case) -> dict[str, object]:
    """Instructions a score, a list with one entry a pass; None without tiles of scores."""
    sizes = {compiled.src.fn.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    passes = code.passes()
    if not ({"BLOCK_M", "BLOCK_N"} <= sizes.keys() and passes):
        return dict.fromkeys(("loop", "masked", "mufu", "kinds"))
    scores = sizes["BLOCK_M"] * sizes["BLOCK_N"] * KERNELS[case.launcher].scores
    loop, masked, kinds = [], [], []
    for whole, edge in passes:
        count = Counter(x.kind for x in whole)
        a_score = 32 * compiled.metadata.num_warps / scores
        loop.append(round(len(whole) * a_score, 2))
        masked.append(round(len(edge) * a_score, 2))
        kinds.append({kind: round(count[kind] * a_score, 2) for kind in KINDS})
    return {
        "loop": loop,
        "masked": masked,
        "mufu": [round(count["exp"] + count["mufu"], 2) for count in kinds],
        "kinds": kinds,
    }


def _read_amd(text: str) -> dict[str, object]:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": field("vgpr_count"),
        "spills": field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        "local": len(re.findall(r"\bscratch_(?:load|store)", text)),
        "wgmma": 0,
        "mma": len(re.findall(r"\bv_mfma_", text)),
        "exp": len(re.findall(r"\bv_exp_f32", text)),
        **dict.fromkeys(("store", "loop", "masked", "mufu", "kinds")),
    }


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="only the configurations that fail first")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose module's name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    cases = reduced_cases() if options.reduced else all_cases()
    print(f"Triton {triton.__version__}")
    widths = {"kernel": -20, "function": -26, "config": -48, "arch": -7, "loop": 12, "masked": 12, "mufu": 10}
    shown = [name for name in Row._fields if name not in ("shared_limit", "kinds")]
    print(*(_cell(name, widths.get(name, 9)) for name in shown))
    rows = []
    for row in sheet([case for case in cases if options.only in KERNELS[case.launcher].module]):
        rows.append(row._asdict())
        print(*(_cell(rows[-1][name], widths.get(name, 9)) for name in shown), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


def _cell(value: object, width: int) -> str:
    text = "-" if value is None else "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.ljust(-width) if width < 0 else text.rjust(width)


if __name__ == "__main__":
    main()

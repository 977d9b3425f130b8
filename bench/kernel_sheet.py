"""What each kernel compiles to, on each architecture, without a GPU: registers, spills, shared memory, occupancy.

    python bench/kernel_sheet.py [--reduced] [--only TEXT] [--json FILE]

The launchers run on meta tensors and what they hand to Triton is compiled instead of started, so that types,
divisibility and launch tables are the real ones. spills: bytes of stack a thread. occupancy: CTAs that fit on one SM.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# under the interpreter there would be nothing to compile
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "causalattn.kernels"
BATCH, HEADS, LENGTH = 2, 8, 4096


class Architecture(NamedTuple):
    target: GPUTarget
    number: int  # what the kernels' architecture() answers there
    shared_limit: int  # bytes a CTA may take
    shared_total: int  # bytes an SM has
    warps: int  # warps an SM holds
    ctas: int  # CTAs an SM holds


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 80, 163 * KIB, 164 * KIB, 64, 32),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 90, 227 * KIB, 228 * KIB, 64, 32),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 100, 227 * KIB, 228 * KIB, 64, 32),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 120, 99 * KIB, 100 * KIB, 48, 24),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 0, 64 * KIB, 64 * KIB, 32, 32),
}


KERNELS = {
    "attention": (32, 64, 80, 128, 256),
    "statistics.rows": (32, 64, 128, 256),
    "statistics.received": (32, 64, 128),
    "statistics.pairs": (32, 64, 128),
    "statistics.chosen": (64, 128),
}


class Case(NamedTuple):
    kernel: str  # module of the kernels package
    D: int
    dtype: torch.dtype
    options: frozenset[str]  # of bias, softcap, sink, probs, all
    arch: str


class Row(NamedTuple):
    kernel: str
    config: str
    arch: str
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: int
    wgmma: int  # Hopper's HGMMA
    mma: int  # every matrix instruction
    exp: int
    store_bits: int
    shared_limit: int


def all_cases() -> list[Case]:
    cases = []
    for kernel, sizes in KERNELS.items():
        plain = {"all"} if kernel == "statistics.rows" else set()
        for D in sizes:
            for dtype in (torch.bfloat16, torch.float32):
                cases += [Case(kernel, D, dtype, frozenset(plain), arch) for arch in ARCHITECTURES]
                cases += [Case(kernel, D, dtype, frozenset(extra), "sm_90") for extra in _extras(kernel)]
    return cases


def reduced_cases() -> list[Case]:
    """What fails first: the smallest shared memories, and Hopper with everything switched on."""

    def first(case: Case) -> bool:
        plain = not case.options or case.options == {"all"}
        small = case.D == 128 and plain and case.arch == ("gfx942" if case.dtype == torch.bfloat16 else "sm_120")
        return small or (case.D == 64 and case.arch == "sm_90" and case.options == _extras(case.kernel)[-1])

    return [case for case in all_cases() if first(case)]


def _extras(kernel: str) -> list[set[str]]:
    if kernel == "attention":
        return [{"bias", "softcap", "sink"}, {"probs"}, {"bias", "softcap", "sink", "probs"}]
    if kernel == "statistics.rows":
        return [set(), {"all", "bias", "softcap", "sink"}]
    return [{"bias", "softcap"}]


def sheet(cases: list[Case]) -> Iterator[Row]:
    for case in cases:
        yield measure(case)


def measure(case: Case) -> Row:
    arch = ARCHITECTURES[case.arch]
    compiled = compile_case(case, arch)
    if arch.target.backend == "hip":
        numbers = _read_amd(compiled.asm["amdgcn"])
    else:
        numbers = _read_nvidia(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if arch.target.backend == "hip":
        # a SIMD, of four, gives a lane 512 registers
        by_registers = 4 * min(8, 512 // _up(numbers["registers"], 8)) // warps
        by_shared = arch.shared_total // max(1, shared)
    else:
        by_registers = 65536 // (_up(numbers["registers"], 8) * 32 * warps)
        by_shared = arch.shared_total // (shared + KIB)
    return Row(
        kernel=case.kernel,
        config=" ".join([f"D={case.D}", str(case.dtype).removeprefix("torch."), *sorted(case.options)]),
        arch=case.arch,
        warps=warps,
        shared=shared,
        occupancy=min(arch.ctas, arch.warps // warps, by_registers, by_shared),
        shared_limit=arch.shared_limit,
        **numbers,
    )


def compile_case(case: Case, arch: Architecture):
    """The kernel that the case's launcher would start on arch."""
    launched = []

    def compile_instead(kernel, *args, grid, warmup, **kwargs):
        backend = make_backend(arch.target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, signature, constexprs, attrs)
        launched.append(triton.compile(source, target=arch.target, options=options.__dict__))

    module = importlib.import_module(f"{PACKAGE}.{case.kernel}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        if hasattr(module, "architecture"):
            stack.enter_context(mock.patch.object(module, "architecture", lambda x: arch.number))
        _launch(module, case)
    (compiled,) = launched
    return compiled


def _launch(module, case: Case) -> None:
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    options = case.options
    q, k, v = (empty(BATCH, HEADS, LENGTH, case.D, dtype=case.dtype) for _ in range(3))
    start, stop = (empty(1, LENGTH, dtype=torch.int32) for _ in range(2))
    bias = empty(1, HEADS, LENGTH, LENGTH, dtype=case.dtype).expand(BATCH, -1, -1, -1) if "bias" in options else None
    softcap = 30.0 if "softcap" in options else 0.0
    sink = empty(HEADS) if "sink" in options else None
    row = empty(BATCH, HEADS, LENGTH)
    scale = case.D**-0.5
    if case.kernel == "attention":
        module.attention_fwd(q, k, v, start, stop, 0, bias, scale, softcap, sink, "probs" in options)
    elif case.kernel == "statistics.rows":
        want = list(module.ROWS) if "all" in options else ["lse", "mass", "below"]
        module.row_statistics_fwd(q, k, start, stop, 0, bias, scale, softcap, sink, want)
    elif case.kernel == "statistics.received":
        module.received_fwd(q, k, start, stop, bias, scale, softcap, row, row)
    elif case.kernel == "statistics.pairs":
        module.pair_statistics_fwd(q, k, start, stop, bias, scale, softcap, row, row)
    else:
        chosen = empty(1, LENGTH, 2, dtype=torch.int32)
        module.chosen_probs_fwd(q, k, start, stop, bias, scale, softcap, row, row, chosen)


def _read_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-sass", "-res-usage", file.name], text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = (int(number) for number in usage.groups())
    stores = re.findall(r"\bSTG\.E(?:\.[A-Z_]+)*\.(64|128|U8|U16)\b", text)
    return {
        "registers": registers,
        "spills": stack + local,
        "wgmma": len(re.findall(r"\bHGMMA\b", text)),
        "mma": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", text)),
        "exp": len(re.findall(r"\bMUFU\.EX2\b", text)),
        "store_bits": max([32, *(int(width) for width in stores if width.isdigit())]),
    }


def _read_amd(text: str) -> dict[str, int]:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    stores = re.findall(r"\b(?:global|buffer)_store_dwordx([234])\b", text)
    return {
        "registers": field("vgpr_count"),
        "spills": field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
        "wgmma": 0,
        "mma": len(re.findall(r"\bv_mfma_", text)),
        "exp": len(re.findall(r"\bv_exp_f32", text)),
        "store_bits": 32 * max([1, *(int(width) for width in stores)]),
    }


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="only the configurations that fail first")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    cases = reduced_cases() if options.reduced else all_cases()
    print(f"Triton {triton.__version__}")
    shown = [name for name in Row._fields if name != "shared_limit"]
    print("{:20} {:38} {:7}".format(*shown[:3]), *(f"{name:>10}" for name in shown[3:]))
    rows = []
    for row in sheet([case for case in cases if options.only in case.kernel]):
        rows.append(row._asdict())
        print(
            f"{row.kernel:20} {row.config:38} {row.arch:7}", *(f"{row._asdict()[n]:>10}" for n in shown[3:]), flush=True
        )
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# under the interpreter there would be nothing to compile
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from sass import KINDS, Code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
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


class Case(NamedTuple):
    launcher: str
    D: int | None
    dtype: torch.dtype
    options: frozenset[str]
    arch: str


class Kernel(NamedTuple):
    """How a launcher is called: with what `arguments` makes, by the names of its parameters."""

    module: str
    sizes: tuple[int | None, ...]  # head dims
    plain: str = ""  # options on every architecture
    extras: tuple[str, ...] = ()  # options on Hopper too, the heaviest last
    scores: int = 1  # entries of A an entry of a tile: 2 where a tile meets its mirror
    arguments: Callable[[Case], dict] = lambda case: {}  # what it alone takes


def _wanted(every: list[str], plain: list[str]) -> Callable[[Case], dict]:
    return lambda case: {"want": every if "all" in case.options else plain}


def _upstream(case: Case) -> dict:
    from causalattn.statistics.backward import DIFFERENTIABLE, Upstream

    row = _empty(BATCH, HEADS, LENGTH)
    given = dict.fromkeys(DIFFERENTIABLE, row) if "rows" in case.options else {}
    if "received" in case.options:
        given["received"] = row
    if "picked" in case.options:
        given["picked"] = _empty(BATCH, HEADS, LENGTH, 2)
        given["chosen"] = _empty(1, LENGTH, 2, dtype=torch.int32)
    if "pairs" in case.options:
        given["pairs"] = _empty(2, BATCH, HEADS)
    if "cells" in case.options:
        given["cells"] = _empty(BATCH, HEADS, 512, 512)
        given |= dict.fromkeys(("row_cells", "key_cells"), _empty(LENGTH, dtype=torch.int64))
    return {"up": Upstream(**given), "bias_gradient": False}


def _scanned(case: Case) -> dict:
    N, E, half = case.D, 2048, case.dtype
    tokens, narrow = _empty(BATCH, LENGTH, E, dtype=half), _empty(BATCH, LENGTH, N, dtype=half)
    gated = "gate" in case.options
    return {
        "u": tokens, "delta": tokens, "A": _empty(E, N), "B": narrow, "C": narrow, "dout": tokens,
        "D": _empty(E) if gated else None, "z": tokens if gated else None,
        "initial_state": None, "dstate": None, "starts": _empty(BATCH, LENGTH // 64, N, E),
        "zoh": "zoh" in case.options, "group": 64,
    }  # fmt: skip


def _prefix(case: Case) -> dict:
    """Several groups of tokens, whose states are passes of their own, or one."""
    D, given = case.D, case.options
    T = 512 if "short" in given else LENGTH
    tokens, rows = _empty(BATCH, HEADS, T, D, dtype=case.dtype), _empty(BATCH, HEADS, T)
    decay = _empty(BATCH, HEADS, T, D) if "feature" in given else rows if "step" in given else None
    s, z = _empty(BATCH, HEADS, D, D), _empty(BATCH, HEADS, D)
    return {
        **dict.fromkeys(("q", "k", "v", "out", "dout"), tokens),
        "decay": decay, "s0": None, "z0": None, "s": s, "ds": s, "z": z, "dz": z, "den": rows, "cu_seqlens": None,
        "feature": "elu", "normalize": "normalize" in given, "scale": 1.0, "decay_grad": decay is not None,
    }  # fmt: skip


_ROWS = ["lse", "max", "mass", "entropy", "sum_sq", "below", "distance", "pivot"]
_DECAYS = ("normalize short", "step", "feature")
_DENSE_ROWS = ["max", "mass", "entropy", "sum_sq", "below", "distance", "received"]
_DENSE_PAIRS = ["mass", "below", "sum_sq", "difference_sq", "l1", "max", "net_flow"]
KERNELS = {
    "attention_fwd": Kernel(
        "attention.forward", (32, 64, 80, 128, 256),
        extras=("bias softcap sink", "probs", "bias softcap sink slopes probs"),
        arguments=lambda case: {"probs_dtype": case.dtype if "probs" in case.options else None},
    ),
    "row_statistics_fwd": Kernel(
        "statistics.rows", (32, 64, 128, 256), plain="all", extras=("", "all bias softcap sink slopes"),
        arguments=_wanted(_ROWS, ["lse", "mass", "below"]),
    ),
    "attention_bwd": Kernel(
        "attention.backward", (64, 128), extras=("bias softcap slopes", "bias softcap slopes probs"),
        arguments=lambda case: {
            "dlse": _empty(BATCH, HEADS, LENGTH),
            "dprobs": _empty(BATCH, HEADS, LENGTH, LENGTH, dtype=case.dtype) if "probs" in case.options else None,
            "bias_grad": False,
        },
    ),
    "attention_topk_fwd": Kernel(
        "attention.topk", (64, 128), extras=("bias softcap sink slopes",), arguments=lambda case: {"n": 16}
    ),
    "attention_map_fwd": Kernel(
        "attention.map", (64, 128), extras=("bias softcap slopes",), arguments=lambda case: {"cells": 512}
    ),
    "scores_fwd": Kernel(
        "attention.topk", (64, 128), arguments=lambda case: {"heads": range(2), "rows": range(1024)}
    ),
    "received_fwd": Kernel("statistics.received", (32, 64, 128), extras=("bias softcap slopes",)),
    "pair_statistics_fwd": Kernel("statistics.pairs", (32, 64, 128), extras=("bias softcap slopes",), scores=2),
    "chosen_probs_fwd": Kernel(
        "statistics.chosen", (64, 128), extras=("bias softcap slopes",),
        arguments=lambda case: {"chosen": _empty(1, LENGTH, 2, dtype=torch.int32)},
    ),
    "statistics_bwd": Kernel(
        "statistics.backward", (64, 128), plain="rows",
        extras=("received", "picked", "cells", "pairs", "rows bias softcap slopes", "pairs bias softcap slopes"),
        arguments=_upstream,
    ),
    "linear_attention_fwd": Kernel(
        "linear_attention.forward", (32, 64, 128, 256), plain="normalize", extras=_DECAYS, arguments=_prefix
    ),
    "linear_attention_bwd": Kernel(
        "linear_attention.backward", (32, 64, 128, 256), plain="normalize", extras=_DECAYS, arguments=_prefix
    ),
    # D is the number of states here
    "selective_scan_fwd": Kernel(
        "selective_scan.forward", (4, 16, 64), plain="zoh gate", extras=("", "zoh"), arguments=_scanned
    ),
    "selective_scan_bwd": Kernel(
        "selective_scan.backward", (4, 16, 64), plain="zoh gate", extras=("", "zoh"), arguments=_scanned
    ),
    "dense_rows_fwd": Kernel(
        "dense.rows", (None,), plain="all", extras=("",), arguments=_wanted(_DENSE_ROWS, ["mass", "below"])
    ),
    "dense_pairs_fwd": Kernel(
        "dense.pairs", (None,), plain="all", extras=("",), scores=2, arguments=_wanted(_DENSE_PAIRS, ["difference_sq"])
    ),
}  # fmt: skip


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


def all_cases() -> list[Case]:
    cases = []
    for name, kernel in KERNELS.items():
        for D in kernel.sizes:
            for dtype in (torch.bfloat16, torch.float32):
                cases += [Case(name, D, dtype, frozenset(kernel.plain.split()), arch) for arch in ARCHITECTURES]
                cases += [Case(name, D, dtype, frozenset(extra.split()), "sm_90") for extra in kernel.extras]
    return cases


def reduced_cases() -> list[Case]:
    """What fails first: Hopper with everything switched on, its leanest loops, and the smallest shared memories."""

    def first(case: Case) -> bool:
        kernel = KERNELS[case.launcher]
        half = case.dtype == torch.bfloat16
        if case.arch != "sm_90":
            small = case.D == 128 and case.arch == ("gfx942" if half else "sm_120")
            return small and kernel.module in ("attention.forward", "attention.backward", "statistics.pairs")
        lean = case.D in (64, 128) and not case.options and kernel.module in ("attention.forward", "statistics.rows")
        heaviest = max((kernel.plain, *kernel.extras), key=len)
        return half and (lean or (case.D in (64, None) and case.options == {*heaviest.split()}))

    return [case for case in all_cases() if first(case)]


def sheet(cases: list[Case]) -> Iterator[Row]:
    for case in cases:
        for compiled in compile_case(case):
            yield measure(case, compiled)


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


def _empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(case: Case) -> dict[str, object]:
    """What launchers take, by name."""
    given = case.options
    names = ("q", "k", "v", "out", "dout") if case.D else ()
    bias = _empty(1, HEADS, LENGTH, LENGTH, dtype=case.dtype).expand(BATCH, -1, -1, -1)
    return {
        **{name: _empty(BATCH, HEADS, LENGTH, case.D, dtype=case.dtype) for name in names},
        **{name: _empty(1, LENGTH, dtype=torch.int32) for name in ("start", "stop")},
        **{name: _empty(BATCH, HEADS, LENGTH) for name in ("pivot", "largest")},
        "A": _empty(BATCH, HEADS, LENGTH, LENGTH, dtype=case.dtype),
        "offset": 0,
        "scale": (case.D or 1) ** -0.5,
        "softcap": 30.0 if "softcap" in given else 0.0,
        "bias": bias if "bias" in given else None,
        "slopes": _empty(1, HEADS) if "slopes" in given else None,
        "sink": _empty(HEADS) if "sink" in given else None,
    }


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

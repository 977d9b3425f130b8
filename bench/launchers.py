"""What the kernel sheet compiles: architectures, launchers, and the arguments they are called with, on meta tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget

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
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
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


def _attended(case: Case) -> dict:
    rest = "rest" in case.options
    given = {"v": _empty(BATCH, HEADS, LENGTH, case.D), "ceiling": _empty(BATCH, HEADS, LENGTH)} if rest else {}
    return given | {"probs_dtype": case.dtype if "probs" in case.options else None}


def _edges(case: Case) -> dict:
    from causalattn.edge_effects.edit import edit_of

    norm = case.options.isdisjoint({"kl", "readout"})
    left = _empty(BATCH, HEADS, LENGTH, case.D, dtype=torch.float32 if norm else case.dtype)
    return {
        **({"v": None} if "kl" in case.options else {}),
        "left": None if "kl" in case.options else left, "terms": _empty(5, BATCH, HEADS, LENGTH),
        "signed": "readout" in case.options, "n": 16, "cells": 512,
        "edit": edit_of(30.0) if "kl" in case.options else (1.0, None, 2.0, 1.0, 1.0),
    }  # fmt: skip


def _panel(case: Case) -> dict:
    """One head's rows, and those of another panel."""
    half, T, D = case.dtype, LENGTH, case.D
    bias = _empty(T, T, dtype=half) if "bias" in case.options else None
    panel = _empty(2048, T, dtype=torch.float64 if "double" in case.options else torch.float32)
    return {
        "q": _empty(T, D, dtype=half), "k": _empty(T, D, dtype=half), "start": _empty(T, dtype=torch.int32),
        "stop": _empty(T, dtype=torch.int32), "bias": bias, "slope": _empty() if "slopes" in case.options else None,
        "pivot": _empty(T), "unit": _empty(T) if "unit" in case.options else None, "first": 0, "panel": panel,
    }  # fmt: skip


def _products(case: Case) -> dict:
    panel, blocks = _empty(2048, LENGTH), _empty(LENGTH // 128, dtype=torch.int32)
    return {
        "left": panel, "right": panel, "low": blocks, "high": blocks, "C": _empty(LENGTH, LENGTH),
        "first_m": 0, "first_n": 0, "add": "add" in case.options,
    }  # fmt: skip


def _correlated(case: Case) -> dict:
    """Heads of 512 tokens, and tests of D given ones."""
    heads, tokens, D = 8, 512, case.D or 1
    square = (heads, tokens, tokens)
    return {
        "R": _empty(*square, dtype=case.dtype), "inverse": _empty(*square, dtype=case.dtype),
        "adjacency": _empty(*square, dtype=torch.bool),
        "ancestors": _empty(*square, dtype=torch.bool) if "ancestors" in case.options else None,
        "first": _empty(heads, tokens + 1, dtype=torch.int32), "given": _empty(heads, 4096, D, dtype=torch.int64),
        "members": _empty(1, 65536, D + 2, dtype=torch.int64),
        "rows": _empty(heads, tokens, LENGTH) if "rows" in case.options else None,
        "floor": 2.0**-39, "rows_floor": 2.0**-39,
    }  # fmt: skip


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
        extras=("bias softcap sink", "probs", "rest", "bias softcap slopes rest", "bias softcap sink slopes probs"),
        arguments=_attended,
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
    **{
        f"edge_{name}_fwd": Kernel(
            f"edge_effects.{name}", (64, 128), extras=("readout", "kl", "bias softcap slopes"), arguments=_edges
        )
        for name in ("rows", "columns", "map")
    },
    "scores_fwd": Kernel(
        "attention.topk", (64, 128), arguments=lambda case: {"heads": range(2), "rows": range(1024)}
    ),
    "panel_fwd": Kernel(
        "covariance.panel", (64, 128, 256), plain="double unit", extras=("", "double bias softcap slopes unit"),
        arguments=_panel,
    ),
    "products_fwd": Kernel("covariance.products", (None,), extras=("add",), arguments=_products),
    # D is the number of given tokens here
    "partial_corr_fwd": Kernel(
        "partial_corr.batch", (0, 1, 3, 8, 16), extras=("rows",), arguments=_correlated,
        dtypes=(torch.float64, torch.float32),
    ),
    "level_one_fwd": Kernel(
        "partial_corr.level", (None,), arguments=_correlated, dtypes=(torch.float64, torch.float32)
    ),
    "level_sets_fwd": Kernel(
        "partial_corr.level", (1, 2, 4, 8), extras=("ancestors",), arguments=_correlated,
        dtypes=(torch.float64, torch.float32),
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


def all_cases() -> list[Case]:
    cases = []
    for name, kernel in KERNELS.items():
        for D in kernel.sizes:
            for dtype in kernel.dtypes:
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
        "ceiling": None,
    }

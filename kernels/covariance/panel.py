"""Rows of attention by the panel, for the products of two panels.

    P_ij = exp(S_ij − max_j S_ij), or A_ij = P_ij / Σ_j P_ij

Shapes, of one head: q [T, D], k [S, D], start and stop [T] int32, bias [T or 1, S or 1], slope [], pivot and unit [T];
panel [rows, keys], which may reach beyond T and S, 0 there.
Precision: float32 scores in base 2 and P, stored in the panel's dtype.
Cost: 2·D flops, one exp2 and a write, 4 or 8 bytes, an entry.
"""

import math

import torch
import triton
import triton.language as tl

from .._primitives import (
    Launch,
    architecture,
    interval_bounds,
    load_intervals,
    load_rows,
    row_scores,
    slope,
)

# keys that one program writes, if that divides them
SPAN = 512


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles of a panel by head dim and dtype; arch is `architecture`'s."""
    if itemsize == 4 and arch != 0:
        return Launch(32, 16, 8, 1)
    if D > 128 or arch == 0:
        return Launch(64, 32, 4, 1)
    return Launch(64, 64, 4, 2) if arch in (90, 100) else Launch(32, 64, 4, 2)


@triton.jit(do_not_specialize=["T", "S", "first", "offset", "scale", "softcap"])
def _panel_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slope_ptr, pivot_ptr, unit_ptr, panel_ptr,
    stride_qt, stride_qd,
    stride_ks, stride_kd,
    stride_bt, stride_bs,
    stride_pr,
    T, S, first, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = first + offs_r
    mask_m = offs_m < T
    start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
    low, high, _, _ = interval_bounds(start, stop, mask_m)
    q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    pivot = tl.load(pivot_ptr + offs_m, mask=mask_m, other=0.0)
    alibi = slope(slope_ptr, 0, 0, 0, 0)
    if unit_ptr is not None:
        unit = tl.load(unit_ptr + offs_m, mask=mask_m, other=0.0)

    panel_ptr += offs_r[:, None].to(tl.int64) * stride_pr
    begin = tl.program_id(1) * SPAN
    for n in range(begin, begin + SPAN, BLOCK_N):
        p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if (n < high) & (n + BLOCK_N > low):
            x = row_scores(
                q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs,
                alibi, scale, softcap, D, BLOCK_N, BLOCK_D, True)
            p = tl.exp2(x - pivot[:, None])
            if unit_ptr is not None:
                p *= unit[:, None]
        tl.store(panel_ptr + n + tl.arange(0, BLOCK_N)[None, :], p.to(panel_ptr.dtype.element_ty))


def panel_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    scale: float,
    softcap: float,
    pivot: torch.Tensor,
    unit: torch.Tensor | None,
    first: int,
    panel: torch.Tensor,
) -> None:
    """Rows first… of one head's P, times unit where it is given, into panel, whose sides are multiples of TILE."""
    T, D = q.shape
    rows, keys = panel.shape
    tiles = launch(D, q.element_size(), architecture(q))
    span = math.gcd(keys, SPAN)
    _panel_kernel[(rows // tiles.BLOCK_M, keys // span)](
        q, k, start, stop, bias, slope, pivot, unit, panel,
        *q.stride(), *k.stride(), *((0, 0) if bias is None else bias.expand(T, k.shape[0]).stride()), panel.stride(0),
        T, k.shape[0], first, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), SPAN=span, **tiles._asdict(), enable_fp_fusion=True,
    )

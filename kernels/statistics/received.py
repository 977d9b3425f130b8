"""The probability each key receives, each row's maximum known, in one pass over the rows.

    c_j = Σ_i A_ij = Σ_i exp2(S_ij / log 2 − pivot_i)·largest_i

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], pivot and largest [B, H, T];
out [B, H, S] float32.
Precision: float32 scores in base 2; sums float32 in a tile, float64 across tiles; no atomics, one order.
Cost: 2·D flops and one exp2 a score, no running maximum.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    Launch,
    architecture,
    block_bounds,
    dot,
    head_bias,
    load_intervals,
    load_rows,
    load_tile,
    masked_scores,
    parts,
    row_tiles,
    score_strides,
    slope,
)


def launch(D: int, itemsize: int, arch: int, lean: bool) -> Launch:
    """Tiles by head dim and dtype, taller where scores are plain; arch is `architecture`'s."""
    if itemsize == 4 and arch != 0:
        return Launch(32 if D <= 64 else 16, 32, 4, 1)
    if D > 128:
        return Launch(32, 64, 4, 1 if arch == 0 else 2)
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if arch == 90 and lean:
        return Launch(128, 64, 4, 2 if D <= 64 else 1)
    return Launch(64, 128, 8, 3) if arch in (90, 100) else Launch(64, 64, 4, 2)


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap"])
def _received_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_eb,
    H, GROUP, T, S, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    pid_n = tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    first = pid_n * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + pid_b * stride_kb + pid_h // GROUP * stride_kh, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    pivot_ptr += pid_bh * T
    largest_ptr += pid_bh * T
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib

    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    received = tl.zeros([BLOCK_N], tl.float64)
    edges = row_tiles(bounds_ptr + pid_b * stride_eb, tl.cdiv(T, BLOCK_M), first, BLOCK_M, BLOCK_N, PARTS)
    for part in tl.static_range(PARTS):
        for m in range(edges[part], edges[part + 1], BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
            q = load_tile(q_ptr, m, T, stride_qt, stride_qd, D, BLOCK_M, BLOCK_D, part != 1)  # [BLOCK_M, BLOCK_D]
            pivot = tl.load(pivot_ptr + offs_m, mask=offs_m < T, other=0.0)
            largest = tl.load(largest_ptr + offs_m, mask=offs_m < T, other=0.0)
            x = masked_scores(
                dot(k, tl.trans(q)), offs_m[None, :], offs_n[:, None], start[None, :], stop[None, :], T, S, offset,
                bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_N, BLOCK_M]
            received += tl.sum(tl.exp2(x - pivot[None, :]) * largest[None, :], 1)

    tl.store(out_ptr + pid_bh * S + offs_n, received.to(tl.float32), mask=offs_n < S)


def received_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    pivot: torch.Tensor,
    largest: torch.Tensor,
) -> torch.Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    out = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or T == 0:
        return out.zero_()
    tiles = launch(D, q.element_size(), architecture(q), bias is None and slopes is None and softcap == 0)
    bounds = block_bounds(start, stop, tiles.BLOCK_M)
    _received_kernel[(triton.cdiv(S, tiles.BLOCK_N) * B * H,)](
        q, k, start, stop, bounds, bias, slopes, pivot.contiguous(), largest.contiguous(), out,
        *score_strides(q, k, start, bias, slopes), bounds.stride(0) if start.shape[0] > 1 else 0,
        H, H // k.shape[1], T, S, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), PARTS=parts(q), **tiles._asdict(), enable_fp_fusion=True,
    )
    return out

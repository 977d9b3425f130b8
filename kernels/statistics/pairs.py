"""How far the attention map is from its transpose, each row's maximum known: each tile met together with its mirror.

    Σ(A_ij − A_ji)², Σ|A_ij − A_ji|, max|A_ij − A_ji|

Shapes: q [B, H, T, D], k [B, H_kv, T, D], start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], pivot and largest [B, H, T];
partial [3, B, H, blocks] float64, one a block of rows, then [3, B, H] float32.
Precision: float32 scores in base 2 and differences formed from them, never Q − X; float64 across tiles; one order.
Cost: 2·D flops and one exp2 an entry of A; tiles that neither side may attend are skipped.
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
    key_tiles,
    load_intervals,
    load_rows,
    load_tile,
    masked_scores,
    parts,
    row_tiles,
    score_strides,
    slope,
)


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Square tiles by head dim and dtype; arch is `architecture`'s."""
    if D <= 128 and itemsize == 2 and arch in (0, 90, 100):
        return Launch(64, 64, 4, 1) if arch == 0 else Launch(64, 64, 8, 2)
    if itemsize == 4 and arch != 0:
        return Launch(16, 16, 4, 1) if D <= 32 else Launch(32, 32, 8, 1)
    return Launch(32, 32, 4, 2 if D <= 64 and arch != 0 else 1)


@triton.jit(do_not_specialize=["T", "offset", "scale", "softcap"])
def _pair_statistics_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_eb, stride_pn,
    H, GROUP, T, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    pid_m = tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    pivot_ptr += pid_bh * T
    largest_ptr += pid_bh * T
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    first = pid_m * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    start_m, stop_m = load_intervals(start_ptr, stop_ptr, offs_m, T)
    pivot_m = tl.load(pivot_ptr + offs_m, mask=offs_m < T, other=0.0)
    largest_m = tl.load(largest_ptr + offs_m, mask=offs_m < T, other=0.0)
    q_m = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_m = load_rows(k_ptr, offs_m, T, stride_ks, stride_kd, D, BLOCK_D)

    # tiles that this block attends, and tiles that attend this block; whole where both are
    out = key_tiles(start_m, stop_m, offs_m < T, BLOCK_N, PARTS)
    back = row_tiles(bounds_ptr + pid_b * stride_eb, blocks, first, BLOCK_M, BLOCK_N, PARTS)
    high = tl.maximum(out[PARTS], back[PARTS])
    low = tl.minimum(tl.maximum(tl.minimum(out[0], back[0]), first), high)
    if PARTS == 1:
        edges = (low, high)
    else:
        whole_low = tl.minimum(tl.maximum(tl.maximum(out[1], back[1]), low), high)
        edges = (low, whole_low, tl.maximum(tl.minimum(out[2], back[2]), whole_low), high)

    difference_sq, l1 = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    largest = tl.zeros([], tl.float32)
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            start_n, stop_n = load_intervals(start_ptr, stop_ptr, offs_n, T)
            pivot_n = tl.load(pivot_ptr + offs_n, mask=offs_n < T, other=0.0)
            largest_n = tl.load(largest_ptr + offs_n, mask=offs_n < T, other=0.0)
            k_n = load_tile(k_ptr, n, T, stride_ks, stride_kd, D, BLOCK_N, BLOCK_D, part != 1)
            q_n = load_tile(q_ptr, n, T, stride_qt, stride_qd, D, BLOCK_N, BLOCK_D, part != 1)
            a = masked_scores(
                dot(q_m, tl.trans(k_n)), offs_m[:, None], offs_n[None, :], start_m[:, None], stop_m[:, None], T, T,
                offset, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_M, BLOCK_N]
            b = masked_scores(
                dot(k_m, tl.trans(q_n)), offs_n[None, :], offs_m[:, None], start_n[None, :], stop_n[None, :], T, T,
                offset, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_M, BLOCK_N]
            a = tl.exp2(a - pivot_m[:, None]) * largest_m[:, None]
            b = tl.exp2(b - pivot_n[None, :]) * largest_n[None, :]
            d = tl.abs(a - b)
            twice = tl.where(n == first, 1.0, 2.0)
            difference_sq += tl.sum(tl.sum(d * d, 1)) * twice
            l1 += tl.sum(tl.sum(d, 1)) * twice
            largest = tl.maximum(largest, tl.max(tl.max(d, 1)))

    partial_ptr += pid_bh * blocks + pid_m
    tl.store(partial_ptr, difference_sq)
    tl.store(partial_ptr + stride_pn, l1)
    # a maximum passes a NaN over, a sum does not
    tl.store(partial_ptr + 2 * stride_pn, tl.where(l1 == l1, largest.to(tl.float64), float("nan")))


def pair_statistics_fwd(
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
    if T == 0 or B == 0:
        return torch.zeros(3, B, H, dtype=torch.float32, device=q.device)
    tiles = launch(D, q.element_size(), architecture(q))
    blocks = triton.cdiv(T, tiles.BLOCK_M)
    partial = torch.empty(3, B, H, blocks, dtype=torch.float64, device=q.device)
    bounds = block_bounds(start, stop, tiles.BLOCK_M)
    _pair_statistics_kernel[(blocks * B * H,)](
        q, k, start, stop, bounds, bias, slopes, pivot.contiguous(), largest.contiguous(), partial,
        *score_strides(q, k, start, bias, slopes), bounds.stride(0) if start.shape[0] > 1 else 0, partial.stride(0),
        H, H // k.shape[1], T, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), PARTS=parts(q), **tiles._asdict(), enable_fp_fusion=True,
    )
    return torch.cat([partial[:2].sum(-1), partial[2:].amax(-1)]).float()

"""The probability each key receives, each row's maximum known, in one pass over the rows.

    c_j = Σ_i A_ij = Σ_i exp2(S_ij / log 2 − pivot_i)·largest_i

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32,
bias [B, H, T, S], pivot and largest [B, H, T];
out [B, H, S] float32.
Precision: float32 scores in base 2; sums float32 in a tile, float64 across tiles; no atomics, one order.
Cost: 2·D flops and one exp2 a score, no running maximum.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FORBIDDEN,
    Launch,
    add_bias,
    architecture,
    base2_scores,
    dot,
    interval_bounds,
    load_intervals,
    load_rows,
)


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles by head dim and dtype; arch is `architecture`'s."""
    if itemsize == 4 and arch != 0:
        return Launch(32, 32, 4, 1)
    if D > 128:
        return Launch(32, 64, 4, 1 if arch == 0 else 2)
    if arch == 0:
        return Launch(64, 64, 4, 1)
    return Launch(64, 128, 8, 3) if arch in (90, 100) else Launch(64, 64, 4, 2)


@triton.jit(do_not_specialize=["T", "S", "scale", "softcap"])
def _received_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, pivot_ptr, largest_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    H, GROUP, T, S, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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

    received = tl.zeros([BLOCK_N], tl.float64)
    for m in range(0, T, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < T
        start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
        low, high, inner_low, inner_high = interval_bounds(start, stop, mask_m)
        if (low < first + BLOCK_N) & (high > first):
            q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            pivot = tl.load(pivot_ptr + offs_m, mask=mask_m, other=0.0)
            largest = tl.load(largest_ptr + offs_m, mask=mask_m, other=0.0)
            x = base2_scores(dot(k, tl.trans(q)), scale, softcap)  # [BLOCK_N, BLOCK_M]
            if bias_ptr is not None:
                tile_ptr = bias_ptr + pid_b * stride_bb + pid_h * stride_bh
                x = add_bias(x, tile_ptr, offs_m[None, :], offs_n[:, None], T, S, stride_bt, stride_bs)
            if (first < inner_low) | (first + BLOCK_N > inner_high) | (m + BLOCK_M > T):
                x = tl.where((offs_n[:, None] >= start[None, :]) & (offs_n[:, None] < stop[None, :]), x, FORBIDDEN)
            received += tl.sum(tl.exp2(x - pivot[None, :]) * largest[None, :], 1)

    tl.store(out_ptr + pid_bh * S + offs_n, received.to(tl.float32), mask=offs_n < S)


def received_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    pivot: torch.Tensor,
    largest: torch.Tensor,
) -> torch.Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    out = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    tiles = launch(D, q.element_size(), architecture(q))
    _received_kernel[(triton.cdiv(S, tiles.BLOCK_N) * B * H,)](
        q, k, start, stop, bias, pivot.contiguous(), largest.contiguous(), out,
        *q.stride(), *k.stride(), start.stride(0) if start.shape[0] > 1 else 0,
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        H, H // k.shape[1], T, S, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles._asdict(), enable_fp_fusion=True,
    )
    return out

"""How far the attention map is from its transpose, each row's maximum known: each tile met together with its mirror.

    Σ(A_ij − A_ji)², Σ|A_ij − A_ji|, max|A_ij − A_ji|

Shapes: q [B, H, T, D], k [B, H_kv, T, D], start and stop [B or 1, T] int32,
bias [B, H, T, T], pivot and largest [B, H, T];
partial [3, B, H, blocks] float64, one a block of rows, then [3, B, H] float32.
Precision: float32 scores in base 2 and differences formed from them, never Q − X; float64 across tiles; one order.
Cost: 2·D flops and one exp2 an entry of A; tiles that neither side may attend are skipped.
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
    """Square tiles by head dim and dtype; arch is `architecture`'s."""
    block = 64 if D <= 128 and itemsize == 2 and arch in (0, 90, 100) else 32
    return Launch(block, block, 4, 1 if arch == 0 or itemsize == 4 else 2)


@triton.jit
def _tile(
    rows, keys, offs_row, offs_key, start, stop, pivot, largest, bias_ptr, T, stride_bt, stride_bs, scale, softcap,
    ROWS_FIRST: tl.constexpr,
):
    """A at a tile of rows and keys; transposed, [keys, rows], unless ROWS_FIRST."""
    if ROWS_FIRST:
        x = base2_scores(dot(rows, tl.trans(keys)), scale, softcap)
        offs_row, start, stop = offs_row[:, None], start[:, None], stop[:, None]
        pivot, largest = pivot[:, None], largest[:, None]
        offs_key = offs_key[None, :]
    else:
        x = base2_scores(dot(keys, tl.trans(rows)), scale, softcap)
        offs_row, start, stop = offs_row[None, :], start[None, :], stop[None, :]
        pivot, largest = pivot[None, :], largest[None, :]
        offs_key = offs_key[:, None]
    if bias_ptr is not None:
        x = add_bias(x, bias_ptr, offs_row, offs_key, T, T, stride_bt, stride_bs)
    x = tl.where((offs_key >= start) & (offs_key < stop), x, FORBIDDEN)
    return tl.exp2(x - pivot) * largest


@triton.jit(do_not_specialize=["T", "scale", "softcap"])
def _pair_statistics_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, pivot_ptr, largest_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_pn,
    H, GROUP, T, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    if bias_ptr is not None:
        bias_ptr += pid_b * stride_bb + pid_h * stride_bh

    first = pid_m * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    start_m, stop_m = load_intervals(start_ptr, stop_ptr, offs_m, T)
    low_m, high_m, _, _ = interval_bounds(start_m, stop_m, offs_m < T)
    pivot_m = tl.load(pivot_ptr + offs_m, mask=offs_m < T, other=0.0)
    largest_m = tl.load(largest_ptr + offs_m, mask=offs_m < T, other=0.0)
    q_m = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_m = load_rows(k_ptr, offs_m, T, stride_ks, stride_kd, D, BLOCK_D)

    difference_sq, l1 = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    largest = tl.zeros([], tl.float32)
    for n in range(first, T, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        start_n, stop_n = load_intervals(start_ptr, stop_ptr, offs_n, T)
        low_n, high_n, _, _ = interval_bounds(start_n, stop_n, offs_n < T)
        forward = (low_m < n + BLOCK_N) & (high_m > n)
        if forward | ((low_n < first + BLOCK_M) & (high_n > first)):
            pivot_n = tl.load(pivot_ptr + offs_n, mask=offs_n < T, other=0.0)
            largest_n = tl.load(largest_ptr + offs_n, mask=offs_n < T, other=0.0)
            k_n = load_rows(k_ptr, offs_n, T, stride_ks, stride_kd, D, BLOCK_D)
            q_n = load_rows(q_ptr, offs_n, T, stride_qt, stride_qd, D, BLOCK_D)
            a = _tile(q_m, k_n, offs_m, offs_n, start_m, stop_m, pivot_m, largest_m,
                      bias_ptr, T, stride_bt, stride_bs, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
            b = _tile(q_n, k_m, offs_n, offs_m, start_n, stop_n, pivot_n, largest_n,
                      bias_ptr, T, stride_bt, stride_bs, scale, softcap, False)  # [BLOCK_M, BLOCK_N]
            d = tl.abs(a - b)
            twice = tl.where(n == first, 1.0, 2.0)
            difference_sq += tl.sum(tl.sum(d * d, 1)) * twice
            l1 += tl.sum(tl.sum(d, 1)) * twice
            largest = tl.maximum(largest, tl.max(tl.max(d, 1)))

    partial_ptr += pid_bh * blocks + pid_m
    tl.store(partial_ptr, difference_sq)
    tl.store(partial_ptr + stride_pn, l1)
    tl.store(partial_ptr + 2 * stride_pn, largest.to(tl.float64))


def pair_statistics_fwd(
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
    if T == 0 or B == 0:
        return torch.zeros(3, B, H, dtype=torch.float32, device=q.device)
    tiles = launch(D, q.element_size(), architecture(q))
    blocks = triton.cdiv(T, tiles.BLOCK_M)
    partial = torch.empty(3, B, H, blocks, dtype=torch.float64, device=q.device)
    _pair_statistics_kernel[(blocks * B * H,)](
        q, k, start, stop, bias, pivot.contiguous(), largest.contiguous(), partial,
        *q.stride(), *k.stride(), start.stride(0) if start.shape[0] > 1 else 0,
        *((0, 0, 0, 0) if bias is None else bias.stride()), partial.stride(0),
        H, H // k.shape[1], T, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles._asdict(), enable_fp_fusion=True,
    )
    return torch.cat([partial[:2].sum(-1), partial[2:].amax(-1)]).float()

"""Mean and maximum of the probabilities over cells × cells tiles, each row's maximum known, in one pass.

    cell (r, c) holds rows ⌊r·T/R⌋ … ⌊(r+1)·T/R⌋ and keys ⌊c·S/C⌋ … ⌊(c+1)·S/C⌋, a forbidden entry counting 0

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], pivot and largest [B, H, T];
mean and largest [B, H, R, C] float32.
Precision: float32 scores in base 2; sums float32 in a tile, float64 across tiles; no atomics, one order.
Cost: 2·D flops and one exp2 a score. A program owns as many rows of cells as fit in BLOCK_M rows; cells are filled up
to a power of two, which at worst doubles the work.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    Launch,
    architecture,
    cell_members,
    dot,
    head_bias,
    load_intervals,
    load_rows,
    masked_scores,
    reached_cells,
    score_strides,
    slope,
)


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles by head dim and dtype; arch is `architecture`'s."""
    if itemsize == 4:
        return Launch(32, 16, 4, 1)
    if D > 128:
        return Launch(32, 32, 4, 1)
    if arch == 0:
        return Launch(32, 64, 4, 1)
    if arch in (90, 100):
        return Launch(64, 32, 4, 1 if arch == 100 else 2)
    return Launch(32 if D <= 64 else 64, 32, 4, 2)


@triton.jit
def _pool(a, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sums and maxima of HEIGHT × WIDTH blocks of a tile."""
    R: tl.constexpr = a.shape[0] // HEIGHT
    C: tl.constexpr = a.shape[1] // WIDTH
    total = tl.sum(tl.reshape(a, [a.shape[0], C, WIDTH]), 2)
    peak = tl.max(tl.reshape(a, [a.shape[0], C, WIDTH]), 2)
    return tl.sum(tl.reshape(total, [R, HEIGHT, C]), 1), tl.max(tl.reshape(peak, [R, HEIGHT, C]), 1)


@triton.jit(do_not_specialize=["T", "S", "R", "C", "offset", "scale", "softcap"])
def _attention_map_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr,
    rows_ptr, keys_ptr, sum_ptr, max_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    H, GROUP, T, S, R, C, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    CELLS_M: tl.constexpr = BLOCK_M // HEIGHT
    CELLS_N: tl.constexpr = BLOCK_N // WIDTH
    groups = tl.cdiv(R, CELLS_M)
    # under a causal mask the last rows are the longest: they start first
    first = (groups - 1 - tl.program_id(0) % groups) * CELLS_M
    pid_bh = (tl.program_id(0) // groups).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    r = first + tl.arange(0, CELLS_M)[:, None]
    place = (pid_bh * R + r) * C + tl.arange(0, CELLS_N)[None, :]  # [CELLS_M, CELLS_N]

    for step_m in range(0, tl.cdiv(T, R), HEIGHT):
        offs_m = cell_members(rows_ptr, first, step_m, T, R, BLOCK_M, HEIGHT)
        mask_m = offs_m < T
        start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
        left, right = reached_cells(start, stop, mask_m, S, C, CELLS_N)
        q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
        pivot = tl.load(pivot_ptr + pid_bh * T + offs_m, mask=mask_m, other=0.0)
        largest = tl.load(largest_ptr + pid_bh * T + offs_m, mask=mask_m, other=0.0)
        for c in range(left, right, CELLS_N):
            mask = (r < R) & (c + tl.arange(0, CELLS_N)[None, :] < C)
            total = tl.load(sum_ptr + place + c, mask=mask, other=0.0)
            peak = tl.load(max_ptr + place + c, mask=mask, other=0.0)
            for step_n in range(0, tl.cdiv(S, C), WIDTH):
                offs_n = cell_members(keys_ptr, c, step_n, S, C, BLOCK_N, WIDTH)
                k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                x = masked_scores(
                    dot(q, tl.trans(k)), offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
                    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
                tile_total, tile_peak = _pool(tl.exp2(x - pivot[:, None]) * largest[:, None], HEIGHT, WIDTH)
                total += tile_total
                peak = tl.maximum(peak, tile_peak)
            tl.store(sum_ptr + place + c, total, mask=mask)
            # a maximum passes a NaN over, a sum does not
            tl.store(max_ptr + place + c, tl.where(total == total, peak, float("nan")), mask=mask)
        # the next rows of these cells read what these threads have written
        tl.debug_barrier()


def attention_map_fwd(
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
    cells: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums, float64, and maxima, float32, of the cells, [B, H, min(cells, T), min(cells, S)]."""
    B, H, T, D = q.shape
    S = k.shape[2]
    R, C = min(cells, T), min(cells, S)
    total = torch.zeros(B, H, R, C, dtype=torch.float64, device=q.device)
    peak = torch.zeros(B, H, R, C, dtype=torch.float32, device=q.device)
    if total.numel() == 0:
        return total, peak
    tiles = launch(D, q.element_size(), architecture(q))
    # dividing in the kernel takes 64-bit integers, and registers
    edges = (torch.arange(m + 1, device=q.device) * n // m for m, n in ((R, T), (C, S)))
    height = min(tiles.BLOCK_M, triton.next_power_of_2(triton.cdiv(T, R)))
    width = min(tiles.BLOCK_N, triton.next_power_of_2(triton.cdiv(S, C)))
    _attention_map_kernel[(triton.cdiv(R, tiles.BLOCK_M // height) * B * H,)](
        q, k, start, stop, bias, slopes, pivot.contiguous(), largest.contiguous(), *(x.int() for x in edges),
        total, peak,
        *score_strides(q, k, start, bias, slopes), H, H // k.shape[1], T, S, R, C, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), HEIGHT=height, WIDTH=width, **tiles._asdict(),
        enable_fp_fusion=True,
    )
    return total, peak

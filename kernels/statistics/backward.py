"""Gradients of the statistics of the attention map, from those of the statistics, each row's maximum known.

    dS_ij = A_ij (G_ij − δ_i),  δ_i = Σ_j A_ij G_ij − g_lse_i
    dq_i = scale·Σ_j dS_ij k_j,  dk_j = scale·Σ_i dS_ij q_i,  dbias_ij = dS_ij
    G_ij = g_mass_i + g_entropy_i (lse_i − S_ij − 1) + 2 g_sum_sq_i A_ij + g_below_i [j < p_i] + g_distance_i |p_i − j|
           + g_received_j + Σ_c g_picked_ic [j = chosen_ic] + 4 g_pairs₀ (A_ij − A_ji) + 2 g_pairs₁ sign(A_ij − A_ji)
           + g_cells of the cell that (i, j) lies in

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32, bias [B or 1, H or 1, T or 1, S or 1],
slopes [B or 1, H], pivot and largest [B, H, T]; of G, None where a statistic has no gradient, float32: those of rows
[B, H, T], received [B, H, S], picked [B, H, T, n], chosen [B or 1, T, n] int32, pairs [2, B, H], cells [B, H, R, C];
δ [B, H, T] float32.
Precision: float32 scores in base 2 and accumulators, δ float64 across tiles, dS in the inputs' dtype where it meets q
and k. dk belongs to one program a block of keys, which takes the query heads and their rows in order: no atomics.
Cost: 10·D flops and three exp2 a score: the scores are formed for δ, for dq and for dk; pairs double all but 4·D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._primitives import (
    Launch,
    architecture,
    block_bounds,
    by_rows,
    dot,
    head_bias,
    key_tiles,
    load_intervals,
    load_rows,
    parts,
    reached_keys,
    row_tiles,
    score_strides,
    slope,
    uncapped_gradient,
)
from ._gradient import (
    Coefficients,
    cell_gradient,
    map_gradient,
    mirrored,
    of_row,
    optional,
    probs_and_exponents,
    shifted,
)


def launch_dq(D: int, itemsize: int, arch: int, pairs: bool, lean: bool) -> Launch:
    """Tiles of the pass over keys, by head dim and dtype, wider where scores are plain; arch is `architecture`'s."""
    if itemsize == 4:
        return Launch(32, 32, 4, 1) if arch == 0 else Launch(16, 16, 8, 2)
    if arch == 0:
        return Launch(64, 32, 4, 1)
    if arch in (90, 100) or (D <= 64 and not pairs):
        return Launch(64, 32 if lean or not pairs else 16, 8, 2 if D <= 128 else 1)
    return Launch(32, 32, 4, 1 if pairs or D > 128 else 2)


def launch_dk(D: int, itemsize: int, arch: int, pairs: bool, lean: bool) -> Launch:
    """Tiles of the pass over rows, as above."""
    if itemsize == 4:
        return Launch(32, 32, 4, 1) if arch == 0 else Launch(16, 16, 8, 2)
    if pairs and arch not in (0, 90, 100):
        return Launch(32, 32, 4, 1)
    if arch == 100 and not pairs:
        return Launch(32, 64, 4, 2 if D <= 128 else 1)
    if D > 64 and arch != 0:
        return Launch(32 if lean and not pairs else 16, 64, 8, 1 if pairs or D > 128 else 2)
    return Launch(32, 64, 8 if pairs and arch else 4, 1)


@triton.jit(do_not_specialize=["first", "last", "T", "S", "N", "offset", "scale", "softcap"])
def _statistics_bwd_dq_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr, up, delta_ptr, dq_ptr, ds_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_cb, stride_ct, stride_cn, stride_gh,
    first, last, H, GROUP, T, S, N, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    # without dq_ptr: δ of every row, which the gradients need
    blocks = tl.cdiv(last - first, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    offs_m = first + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start_ptr, stop_ptr = start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib
    start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
    edges = key_tiles(start, stop, offs_m < T, BLOCK_N, PARTS)
    q_ptr, k_ptr = q_ptr + pid_b * stride_qb + pid_h * stride_qh, k_ptr + pid_b * stride_kb + pid_h // GROUP * stride_kh
    q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    # of use to pairs alone
    k_m = load_rows(k_ptr, offs_m, S, stride_ks, stride_kd, D, BLOCK_D)
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    # what belongs to rows lies along axis 0
    offs_row, mask_row, rows = offs_m[:, None], offs_m[:, None] < T, pid_bh * T + offs_m[:, None]
    pivot_ptr, largest_ptr = pivot_ptr + pid_bh * T, largest_ptr + pid_bh * T
    pivot = tl.load(pivot_ptr + offs_row, mask=mask_row, other=0.0)
    largest = tl.load(largest_ptr + offs_row, mask=mask_row, other=0.0)
    constant = of_row(up, largest, rows, mask_row)
    entropy = optional(up.entropy, rows, mask_row)
    sum_sq = optional(up.sum_sq, rows, mask_row)
    below = optional(up.below, rows, mask_row)
    distance = optional(up.distance, rows, mask_row)
    chosen_ptr = shifted(up.chosen, pid_b * stride_cb + offs_row.to(tl.int64) * stride_ct)
    picked_ptr = shifted(up.picked, rows * N)
    squares = optional(up.pairs, pid_bh * 2, True)
    absolute = optional(up.pairs, pid_bh * 2 + 1, True)
    if dq_ptr is None:
        delta = tl.zeros([BLOCK_M], tl.float64)
    else:
        constant -= tl.load(delta_ptr + rows, mask=mask_row, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            offs_key = offs_n[None, :]
            keys = offs_n if part == 1 else reached_keys(offs_n, start, stop, S)
            k = load_rows(k_ptr, keys, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            dots = dot(q, tl.trans(k))
            p, x = probs_and_exponents(
                dots, offs_row, offs_key, start[:, None], stop[:, None], pivot, largest, T, S, offset,
                bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_M, BLOCK_N]
            mirror = mirrored(
                up, k_m, q_ptr, offs_n, stride_qt, stride_qd, start_ptr, stop_ptr, pivot_ptr, largest_ptr,
                offs_row, offs_key, T, offset, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, D, BLOCK_D)
            received = optional(up.received, pid_bh * S + offs_key, offs_key < S)
            cells = cell_gradient(up, pid_bh * stride_gh, offs_row, offs_key, T, S)
            of = Coefficients(constant, entropy, sum_sq, below, distance, received, cells, squares, absolute)
            ds = map_gradient(
                p, x, of, offs_row, offs_key, offset, mirror, chosen_ptr, picked_ptr, stride_cn, N, mask_row)
            if dq_ptr is None:
                delta += tl.sum(ds, 1)
            else:
                if ds_ptr is not None:
                    to = (pid_bh * (last - first) + offs_row - first) * S + offs_key
                    tl.store(ds_ptr + to, ds, mask=(offs_row < last) & (offs_key < S))
                dq += dot(uncapped_gradient(ds, dots, scale, softcap).to(k.dtype), k)
    if dq_ptr is None:
        shift = delta.to(tl.float32)[:, None]
        if up.lse is not None:
            shift -= tl.load(up.lse + rows, mask=mask_row, other=0.0)
        tl.store(delta_ptr + rows, shift, mask=offs_row < last)
    else:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        place, mask = dq_ptr + rows * D + offs_d, (offs_row < last) & (offs_d < D)
        tl.store(place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "N", "offset", "scale", "softcap"])
def _statistics_bwd_dk_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr, up, delta_ptr, dk_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_eb, stride_cb, stride_ct, stride_cn, stride_gh,
    H, GROUP, T, S, N, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    pid_bg = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_g = pid_bg // (H // GROUP), pid_bg % (H // GROUP)

    offs_n = first + tl.arange(0, BLOCK_N)
    offs_key = offs_n[:, None]
    k_ptr += pid_b * stride_kb + pid_g * stride_kh
    k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib
    edges = row_tiles(bounds_ptr + pid_b * stride_eb, tl.cdiv(T, BLOCK_M), first, BLOCK_M, BLOCK_N, PARTS)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in range(GROUP):
        pid_h = pid_g * GROUP + h
        pid_bh = pid_b * H + pid_h
        q_head = q_ptr + pid_b * stride_qb + pid_h * stride_qh
        bias_head = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
        alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
        received = optional(up.received, pid_bh * S + offs_key, offs_key < S)
        squares = optional(up.pairs, pid_bh * 2, True)
        absolute = optional(up.pairs, pid_bh * 2 + 1, True)
        # of use to pairs alone
        q_n = load_rows(q_head, offs_n, T, stride_qt, stride_qd, D, BLOCK_D)
        for part in tl.static_range(PARTS):
            for m in range(edges[part], edges[part + 1], BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                # what belongs to rows lies along axis 1
                offs_row, mask_row = offs_m[None, :], offs_m[None, :] < T
                rows = pid_bh * T + offs_row
                start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
                # a row that may attend nothing loads as 0: 0 · NaN must not leak from padding
                filled = offs_m if part == 1 else tl.where(start < stop, offs_m, T)
                q = load_rows(q_head, filled, T, stride_qt, stride_qd, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                pivot = tl.load(pivot_ptr + rows, mask=mask_row, other=0.0)
                largest = tl.load(largest_ptr + rows, mask=mask_row, other=0.0)
                constant = of_row(up, largest, rows, mask_row) - tl.load(delta_ptr + rows, mask=mask_row, other=0.0)
                of = Coefficients(
                    constant, optional(up.entropy, rows, mask_row), optional(up.sum_sq, rows, mask_row),
                    optional(up.below, rows, mask_row), optional(up.distance, rows, mask_row),
                    received, cell_gradient(up, pid_bh * stride_gh, offs_row, offs_key, T, S), squares, absolute)
                dots = dot(k, tl.trans(q))
                p, x = probs_and_exponents(
                    dots, offs_row, offs_key, start[None, :], stop[None, :], pivot, largest, T, S, offset,
                    bias_head, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_N, BLOCK_M]
                mirror = mirrored(
                    up, q_n, k_ptr, offs_m, stride_ks, stride_kd, start_ptr, stop_ptr,
                    pivot_ptr + pid_bh * T, largest_ptr + pid_bh * T,
                    offs_row, offs_key, T, offset, bias_head, stride_bt, stride_bs, alibi, scale, softcap, D, BLOCK_D)
                chosen_ptr = shifted(up.chosen, pid_b * stride_cb + offs_row.to(tl.int64) * stride_ct)
                ds = map_gradient(
                    p, x, of, offs_row, offs_key, offset, mirror,
                    chosen_ptr, shifted(up.picked, rows * N), stride_cn, N, mask_row)
                dk += dot(uncapped_gradient(ds, dots, scale, softcap).to(q.dtype), q)

    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + (pid_bg * S + offs_key) * D + offs_d, dk, mask=(offs_key < S) & (offs_d < D))


def statistics_bwd(
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
    up: NamedTuple,
    bias_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dbias (float32, in bias's shape, or None) and δ; up is a tuple of gradients or None, named as in G."""
    B, H, T, D = q.shape
    S = k.shape[2]
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    dbias = torch.zeros(bias.shape, dtype=torch.float32, device=q.device) if bias_gradient else None
    if delta.numel() == 0 or S == 0:
        return dq.zero_(), dk.zero_(), dbias, delta.zero_()
    factors = pivot.contiguous(), largest.contiguous()
    head = H, H // k.shape[1], T, S, 0 if up.picked is None else up.picked.shape[3], offset, scale, softcap or None
    of_up = (0, 0, 0)
    if up.chosen is not None:
        of_up = up.chosen.stride(0) if up.chosen.shape[0] > 1 else 0, *up.chosen.stride()[1:]
    of_up += (0 if up.cells is None else up.cells.shape[2] * up.cells.shape[3],)
    if up.pairs is not None:
        up = up._replace(pairs=up.pairs.permute(1, 2, 0).contiguous())
    strides = score_strides(q, k, start, bias, slopes)
    # beside the four products of a pair of tiles a mask is nothing
    split = 1 if up.pairs is not None else parts(q)
    constants = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "PARTS": split, "enable_fp_fusion": True}

    kind = D, q.element_size(), architecture(q), up.pairs is not None, bias is None and slopes is None and softcap == 0
    tiles = launch_dq(*kind)

    def run(first, last, dq, ds):
        _statistics_bwd_dq_kernel[(triton.cdiv(last - first, tiles.BLOCK_M) * B * H,)](
            q, k, start, stop, bias, slopes, *factors, up, delta, dq, ds,
            *strides, *of_up, first, last, *head, **constants, **tiles._asdict(),
        )

    run(0, T, None, None)
    by_rows(q, S, dbias, lambda first, last, ds: run(first, last, dq, ds))

    tiles = launch_dk(*kind)
    bounds = block_bounds(start, stop, tiles.BLOCK_M)
    _statistics_bwd_dk_kernel[(triton.cdiv(S, tiles.BLOCK_N) * B * k.shape[1],)](
        q, k, start, stop, bounds, bias, slopes, *factors, up, delta, dk,
        *strides, bounds.stride(0) if start.shape[0] > 1 else 0, *of_up, *head, **constants, **tiles._asdict(),
    )
    return dq, dk, dbias, delta

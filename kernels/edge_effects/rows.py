"""The effects of interventions on the edges of each row, summed, and the largest with their keys, in one pass.

    row_i = Σ_j |e_ij|;  the n largest |e_ij|, signed, equal ones by key; 0 and −1 where a row may attend fewer

Shapes, precision and cost: `_tiles`; row [B, H, T], values [B, H, T, n] float32, indices int32, n at most 64.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    empty_slots,
    head_bias,
    hold,
    key_tiles,
    load_intervals,
    masked_scores,
    slope,
    take_best,
)
from ._tiles import EDIT, effects_of, load_terms, products_of, pull_of, shared_arguments


@triton.jit(do_not_specialize=[*EDIT, "T", "S", "offset", "scale", "softcap", "n_best"])
def _edge_rows_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    row_ptr, values_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn,
    H, GROUP, T, S, offset, scale, softcap, gain, shift, lift, tilt, rest, n_best,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SLOTS: tl.constexpr,
    CHUNK: tl.constexpr, SIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    low, high = key_tiles(start, stop, mask_m, BLOCK_N, 1)
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    terms = load_terms(terms_ptr + pid_bh * T, stride_rn, offs_m, T, 0)
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)

    total = tl.zeros([BLOCK_M], tl.float64)
    best, index = empty_slots(n_best, BLOCK_M, SLOTS)
    for n in range(low, high, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        products, _ = products_of(
            q_ptr, offs_m, T, stride_qt, stride_qd, k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D, CHUNK)
        x = masked_scores(
            products, offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
        pull = pull_of(
            left_ptr, offs_m, T, stride_ot, stride_od, v_ptr, offs_n, S, stride_vs, stride_vd, terms[4], x > FLOOR,
            V, BLOCK_V, CHUNK, SIGNED)
        effect = effects_of(x, pull, terms, gain, shift, lift, tilt, rest, SIGNED)
        total += tl.sum(tl.abs(effect), 1)
        if values_ptr is not None:
            size = tl.where(x > FLOOR, tl.abs(effect), 2 * FLOOR)
            # the sign goes along in the key's last bit
            best, index = hold(best, index, size, 2 * offs_n[None, :] + (effect < 0).to(tl.int32), tl.max(size, 1))

    if row_ptr is not None:
        tl.store(row_ptr + pid_bh * T + offs_m, total.to(tl.float32), mask=mask_m)
    if values_ptr is not None:
        place = (pid_bh * T + offs_m) * n_best
        for _ in range(n_best):
            best, top, key = take_best(best, index, n_best)
            # a row that holds a NaN says so
            top = tl.where(total == total, top, float("nan"))
            value = tl.where(top > FLOOR, tl.where(key % 2 == 1, -top, top), 0.0 * top)
            tl.store(values_ptr + place, value, mask=mask_m)
            tl.store(indices_ptr + place, tl.where(top > FLOOR, key // 2, -1), mask=mask_m)
            place += 1


def edge_rows_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: torch.Tensor | None,
    terms: torch.Tensor,
    edit: tuple[float, ...],
    signed: bool,
    n: int,
) -> tuple[torch.Tensor, ...]:
    """row, values and indices; n = 0 for row alone."""
    B, H, T, _ = q.shape
    row = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    values = torch.empty(B, H, T, n, dtype=torch.float32, device=q.device)
    indices = torch.empty(B, H, T, n, dtype=torch.int32, device=q.device)
    if row.numel() == 0:
        return row, values, indices
    strides, sizes = shared_arguments(q, k, v, start, bias, slopes, left, signed)
    _edge_rows_kernel[(triton.cdiv(T, sizes["BLOCK_M"]) * B * H,)](
        q, k, v, start, stop, bias, slopes, terms, left, row, *((values, indices) if n else (None, None)),
        *strides, H, H // k.shape[1], T, k.shape[2], offset, scale, softcap or None, *edit, n,
        SLOTS=max(16, triton.next_power_of_2(n)), **sizes,
    )
    return row, values, indices

"""The effects of interventions on the edges of each column, summed in one pass over the rows.

    column_j = Σ_i |e_ij|

Shapes, precision and cost: `_tiles`; column [B, H, S] float32.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    block_bounds,
    head_bias,
    load_intervals,
    masked_scores,
    row_tiles,
    slope,
)
from ._tiles import EDIT, Tiles, effects_of, load_terms, products_of, pull_of, shared_arguments

TIGHT = Tiles(64, 32, 32, 8, 1)


@triton.jit(do_not_specialize=[*EDIT, "T", "S", "offset", "scale", "softcap"])
def _edge_columns_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    column_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn, stride_eb,
    H, GROUP, T, S, offset, scale, softcap, gain, shift, lift, tilt, rest,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, SIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    pid_n = tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    first = pid_n * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    terms_ptr += pid_bh * T
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)

    column = tl.zeros([BLOCK_N], tl.float64)
    low, high = row_tiles(bounds_ptr + pid_b * stride_eb, tl.cdiv(T, BLOCK_M), first, BLOCK_M, BLOCK_N, 1)
    for m in range(low, high, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
        terms = load_terms(terms_ptr, stride_rn, offs_m, T, 1)
        products, _ = products_of(
            k_ptr, offs_n, S, stride_ks, stride_kd, q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D, CHUNK)
        x = masked_scores(
            products, offs_m[None, :], offs_n[:, None], start[None, :], stop[None, :], T, S, offset,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_N, BLOCK_M]
        pull = pull_of(
            v_ptr, offs_n, S, stride_vs, stride_vd, left_ptr, offs_m, T, stride_ot, stride_od, terms[4], x > FLOOR,
            V, BLOCK_V, CHUNK, SIGNED)
        effect = effects_of(x, pull, terms, gain, shift, lift, tilt, rest, SIGNED)
        column += tl.sum(tl.abs(effect), 1)

    tl.store(column_ptr + pid_bh * S + offs_n, column.to(tl.float32), mask=offs_n < S)


def edge_columns_fwd(
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
) -> torch.Tensor:
    B, H, T, _ = q.shape
    S = k.shape[2]
    column = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    if column.numel() == 0 or T == 0:
        return column.zero_()
    strides, sizes = shared_arguments(q, k, v, start, bias, slopes, left, signed, TIGHT)
    # keys come first here
    sizes |= {"BLOCK_M": sizes["BLOCK_N"], "BLOCK_N": sizes["BLOCK_M"]}
    bounds = block_bounds(start, stop, sizes["BLOCK_M"])
    _edge_columns_kernel[(triton.cdiv(S, sizes["BLOCK_N"]) * B * H,)](
        q, k, v, start, stop, bounds, bias, slopes, terms, left, column,
        *strides, bounds.stride(0) if start.shape[0] > 1 else 0, H, H // k.shape[1], T, S, offset, scale,
        softcap or None, *edit, **sizes,
    )
    return column

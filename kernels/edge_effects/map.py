"""The effects of interventions on edges, summed over cells × cells tiles in one pass, as the attention map is.

    Σ |e_ij| over rows ⌊r·T/R⌋ … ⌊(r+1)·T/R⌋ and keys ⌊c·S/C⌋ … ⌊(c+1)·S/C⌋

Shapes, precision and cost: `_tiles`; sums [B, H, R, C] float64. A program owns as many rows of cells as fit in BLOCK_M
rows; cells are filled up to a power of two, which at worst doubles the work.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    cell_members,
    head_bias,
    load_intervals,
    masked_scores,
    reached_cells,
    slope,
)
from ._tiles import EDIT, Tiles, effects_of, load_terms, products_of, pull_of, shared_arguments

TIGHT = Tiles(64, 16, 16, 4, 2)


@triton.jit(do_not_specialize=[*EDIT, "T", "S", "R", "C", "offset", "scale", "softcap"])
def _edge_map_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    row_edges_ptr, key_edges_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn,
    H, GROUP, T, S, R, C, offset, scale, softcap, gain, shift, lift, tilt, rest,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    SIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)
    r = first + tl.arange(0, CELLS_M)[:, None]
    place = (pid_bh * R + r) * C + tl.arange(0, CELLS_N)[None, :]  # [CELLS_M, CELLS_N]

    for step_m in range(0, tl.cdiv(T, R), HEIGHT):
        offs_m = cell_members(row_edges_ptr, first, step_m, T, R, BLOCK_M, HEIGHT)
        start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
        left_c, right_c = reached_cells(start, stop, offs_m < T, S, C, CELLS_N)
        terms = load_terms(terms_ptr + pid_bh * T, stride_rn, offs_m, T, 0)
        for c in range(left_c, right_c, CELLS_N):
            mask = (r < R) & (c + tl.arange(0, CELLS_N)[None, :] < C)
            total = tl.load(sum_ptr + place + c, mask=mask, other=0.0)
            for step_n in range(0, tl.cdiv(S, C), WIDTH):
                offs_n = cell_members(key_edges_ptr, c, step_n, S, C, BLOCK_N, WIDTH)
                products, _ = products_of(
                    q_ptr, offs_m, T, stride_qt, stride_qd, k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D, CHUNK)
                x = masked_scores(
                    products, offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
                    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
                pull = pull_of(
                    left_ptr, offs_m, T, stride_ot, stride_od, v_ptr, offs_n, S, stride_vs, stride_vd, terms[4],
                    x > FLOOR, V, BLOCK_V, CHUNK, SIGNED)
                effect = effects_of(x, pull, terms, gain, shift, lift, tilt, rest, SIGNED)
                part = tl.sum(tl.reshape(tl.abs(effect), [BLOCK_M, CELLS_N, WIDTH]), 2)
                total += tl.sum(tl.reshape(part, [CELLS_M, HEIGHT, CELLS_N]), 1)
            tl.store(sum_ptr + place + c, total, mask=mask)
        # the next rows of these cells read what these threads have written
        tl.debug_barrier()


def edge_map_fwd(
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
    cells: int,
) -> torch.Tensor:
    B, H, T, _ = q.shape
    S = k.shape[2]
    R, C = min(cells, T), min(cells, S)
    total = torch.zeros(B, H, R, C, dtype=torch.float64, device=q.device)
    if total.numel() == 0:
        return total
    strides, sizes = shared_arguments(q, k, v, start, bias, slopes, left, signed, TIGHT if softcap else None)
    edges = (torch.arange(m + 1, device=q.device) * count // m for m, count in ((R, T), (C, S)))
    height = min(sizes["BLOCK_M"], triton.next_power_of_2(triton.cdiv(T, R)))
    width = min(sizes["BLOCK_N"], triton.next_power_of_2(triton.cdiv(S, C)))
    _edge_map_kernel[(triton.cdiv(R, sizes["BLOCK_M"] // height) * B * H,)](
        q, k, v, start, stop, bias, slopes, terms, left, *(x.int() for x in edges), total,
        *strides, H, H // k.shape[1], T, S, R, C, offset, scale, softcap or None, *edit,
        HEIGHT=height, WIDTH=width, **sizes,
    )
    return total

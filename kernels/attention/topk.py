"""The n largest probabilities of each row with their keys, in one pass over the keys.

    A_ij = exp(S_ij − lse_i), largest first, equal scores by key; 0 and −1 where a row may attend fewer than n keys

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], sink [H]; values [B, H, T, n] float32, indices int32.
For n beyond SLOTS the scores of some rows are written out instead, [heads, rows, S] float32, to be selected elsewhere.
Precision: float32 scores in base 2, which alone decide the order; the sum of a row float32 in a tile and float64
across tiles.
Cost: 2·D flops and one exp2 a score; and where a tile holds a score above the n-th best so far of one of its rows,
some ten operations a score and another look. Random rows meet n·log(S / n) of them.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    FORBIDDEN,
    LOG2E,
    Launch,
    architecture,
    dot,
    empty_slots,
    head_bias,
    hold,
    interval_bounds,
    key_tiles,
    load_intervals,
    load_rows,
    masked_scores,
    normalizer,
    row_scores,
    score_strides,
    slope,
    take_best,
)

SLOTS = 64


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles by head dim and dtype; arch is `architecture`'s."""
    if itemsize == 4:
        return Launch(32, 16, 8 if arch else 4, 1)
    if D > 128 or arch == 0:
        return Launch(32, 64, 4, 1)
    return Launch(64, 64, 4, 2) if arch in (90, 100) else Launch(32, 64, 4, 2)


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap", "n_best"])
def _attention_topk_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, sink_ptr, values_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    H, GROUP, T, S, offset, scale, softcap, n_best,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    best, index = empty_slots(n_best, BLOCK_M, SLOTS)
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float64)
    # one loop: beside the look for a better score a mask is nothing
    for n in range(low, high, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        x = row_scores(
            q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs,
            alibi, scale, softcap, D, BLOCK_N, BLOCK_D, True)  # [BLOCK_M, BLOCK_N]
        top = tl.max(x, 1)
        m_new = tl.maximum(m_i, top)
        l_i = l_i * tl.exp2(m_i - m_new).to(tl.float64) + tl.sum(tl.exp2(x - m_new[:, None]), 1)
        m_i = m_new
        best, index = hold(best, index, x, offs_n[None, :], top)

    sink = None
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + pid_h).to(tl.float32) * LOG2E
    _, unit = normalizer(m_i, l_i.to(tl.float32), sink)
    place = (pid_bh * T + offs_m) * n_best
    for _ in range(n_best):
        best, top, key = take_best(best, index, n_best)
        # 0 · NaN: a row that holds a NaN says so
        tl.store(values_ptr + place, tl.where(top > FLOOR, tl.exp2(top - m_i), 0.0) * unit, mask=mask_m)
        tl.store(indices_ptr + place, tl.where(top > FLOOR, key, -1), mask=mask_m)
        place += 1


@triton.jit(do_not_specialize=["T", "S", "R", "first_head", "first_row", "offset", "scale", "softcap"])
def _scores_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, scores_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    H, GROUP, T, S, R, first_head, first_row, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(R, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = (first_head + head) // H, (first_head + head) % H

    offs_r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = first_row + offs_r
    end = first_row + R
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, end)
    low, high, _, _ = interval_bounds(start, stop, offs_r < R)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, end, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    scores_ptr += (head * R + offs_r[:, None]) * S
    for n in range(0, S, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        x = tl.full([BLOCK_M, BLOCK_N], FORBIDDEN, tl.float32)
        if (n < high) & (n + BLOCK_N > low):
            k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
            x = masked_scores(
                dot(q, tl.trans(k)), offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
                bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)
        tl.store(scores_ptr + offs_n[None, :], x, mask=(offs_r[:, None] < R) & (offs_n[None, :] < S))


def attention_topk_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    sink: torch.Tensor | None,
    n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """values and indices, [B, H, T, n]; n is at most SLOTS."""
    B, H, T, D = q.shape
    values = torch.empty(B, H, T, n, dtype=torch.float32, device=q.device)
    indices = torch.empty(B, H, T, n, dtype=torch.int32, device=q.device)
    if values.numel() == 0:
        return values, indices
    slots = max(16, triton.next_power_of_2(n))
    tiles = launch(D, q.element_size(), architecture(q))
    _attention_topk_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
        q, k, start, stop, bias, slopes, sink, values, indices,
        *score_strides(q, k, start, bias, slopes), H, H // k.shape[1], T, k.shape[2], offset, scale, softcap or None, n,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), SLOTS=slots, **tiles._asdict(), enable_fp_fusion=True,
    )
    return values, indices


def scores_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    heads: range,
    rows: range,
) -> torch.Tensor:
    """Base-2 scores of rows of heads, counted over the batch, below FLOOR where forbidden: [heads, rows, S]."""
    _, H, T, D = q.shape
    S, R = k.shape[2], len(rows)
    scores = torch.empty(len(heads), R, S, dtype=torch.float32, device=q.device)
    tiles = launch(D, q.element_size(), architecture(q))
    _scores_kernel[(triton.cdiv(R, tiles.BLOCK_M) * len(heads),)](
        q, k, start, stop, bias, slopes, scores, *score_strides(q, k, start, bias, slopes),
        H, H // k.shape[1], T, S, R, heads.start, rows.start, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles._asdict(), enable_fp_fusion=True,
    )
    return scores

"""Row statistics of the attention map, in one pass over the keys.

    lse_i = log Σ_j e^{S_ij};  max_j A_ij;  mass_i = Σ_j A_ij;  entropy_i = Σ_j A_ij (lse_i − S_ij);
    sum_sq_i = Σ_j A_ij²;  below_i = Σ_{j < p_i} A_ij;  distance_i = Σ_j A_ij |p_i − j|;  pivot_i = max_j S_ij / log 2

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32, bias [B or 1, H or 1, T or 1, S or 1],
slopes [B or 1, H], sink [H];
out [wanted, B, H, T] float32. A statistic's slot in out is a constexpr, −1 where it is not wanted and not computed.
Precision: float32 scores in base 2 (float32 inputs by exact dots), sums float32 in a tile and float64 across tiles.
Cost: 2·D flops and one exp2 a score; at D ≤ 64 the exponentials are the bound.
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    LN2,
    LOG2E,
    Launch,
    architecture,
    head_bias,
    key_tiles,
    load_intervals,
    load_rows,
    normalizer,
    parts,
    row_scores,
    score_strides,
    slope,
)

ROWS = ("lse", "max", "mass", "entropy", "sum_sq", "below", "distance", "pivot")


def launch(D: int, itemsize: int, arch: int, extras: int) -> Launch:
    """Tiles by head dim and dtype, and by 0, 1 or 2 things beyond plain scores and few sums; arch: `architecture`'s."""
    if itemsize == 4 and arch != 0:
        return Launch(32, 32, 4, 1) if D <= 64 else Launch(32, 16, 8, 1)
    if D > 128:
        return Launch(64, 32, 4, 1 if arch == 0 else 2)
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if extras == 0:
        return Launch(64, 128, 4, 2)
    return Launch(128, 64, 8, 3) if extras == 1 and arch != 100 else Launch(128, 32, 8, 2)


@triton.jit
def _below(p, mass, first, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Σ p over the keys below each row; first is the position of the tile's first row and n its first key."""
    if n + BLOCK_N <= first:
        below = mass
    elif n >= first + BLOCK_M - 1:
        below = tl.zeros_like(mass)
    else:
        rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        below = tl.sum(tl.where(keys[None, :] - rows[:, None] < first - n, p, 0.0), 1)
    return below


@triton.jit
def _distance(p, mass, first, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Σ p·|position − key| of each row; off the diagonal, a row's distance from the tile and a key's from its edge."""
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if n + BLOCK_N <= first:
        gap = (first + rows - n - BLOCK_N + 1).to(tl.float32)
        distance = gap * mass + tl.sum(p * (BLOCK_N - 1 - keys).to(tl.float32)[None, :], 1)
    elif n >= first + BLOCK_M:
        distance = (n - first - rows).to(tl.float32) * mass + tl.sum(p * keys.to(tl.float32)[None, :], 1)
    else:
        distance = tl.sum(p * tl.abs(first - n + rows[:, None] - keys[None, :]).to(tl.float32), 1)
    return distance


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap"])
def _row_statistics_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, sink_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_on, stride_ob,
    H, GROUP, T, S, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    LSE: tl.constexpr, MAX: tl.constexpr, MASS: tl.constexpr, ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr, BELOW: tl.constexpr, DISTANCE: tl.constexpr, PIVOT: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    edges = key_tiles(start, stop, mask_m, BLOCK_N, PARTS)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    position = pid_m * BLOCK_M + offset

    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float64)
    entropy, sum_sq, below, distance = l_i, l_i, l_i, l_i
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            x = row_scores(
                q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs,
                alibi, scale, softcap, D, BLOCK_N, BLOCK_D, part != 1)  # [BLOCK_M, BLOCK_N]
            m_new = tl.maximum(m_i, tl.max(x, 1))
            grown = (m_new - m_i).to(tl.float64)
            alpha = tl.exp2(m_i - m_new).to(tl.float64)
            x -= m_new[:, None]
            p = tl.exp2(x)
            if ENTROPY >= 0:
                entropy = (entropy + grown * l_i) * alpha - tl.sum(p * x, 1)
            mass = tl.sum(p, 1)
            l_i = l_i * alpha + mass
            if SUM_SQ >= 0:
                sum_sq = sum_sq * alpha * alpha + tl.sum(p * p, 1)
            if BELOW >= 0:
                below = below * alpha + _below(p, mass, position, n, BLOCK_M, BLOCK_N)
            if DISTANCE >= 0:
                distance = distance * alpha + _distance(p, mass, position, n, BLOCK_M, BLOCK_N)
            m_i = m_new

    sink = None
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + pid_h).to(tl.float32) * LOG2E
    gap, unit = normalizer(m_i, l_i.to(tl.float32), sink)
    mass = (l_i * unit).to(tl.float32)
    out_ptr += pid_bh * stride_ob + offs_m
    stride_on = tl.cast(stride_on, tl.int64)
    if LSE >= 0:
        tl.store(out_ptr + LSE * stride_on, (m_i + gap) * LN2, mask=mask_m)
    if MAX >= 0:
        tl.store(out_ptr + MAX * stride_on, unit, mask=mask_m)
    if MASS >= 0:
        tl.store(out_ptr + MASS * stride_on, mass, mask=mask_m)
    if ENTROPY >= 0:
        # Σ A (lse − S) = Σ A (lse − maximum) + Σ A (maximum − S)
        gap = tl.where(l_i == 0, 0.0, gap)
        tl.store(out_ptr + ENTROPY * stride_on, ((entropy * unit).to(tl.float32) + gap * mass) * LN2, mask=mask_m)
    if SUM_SQ >= 0:
        tl.store(out_ptr + SUM_SQ * stride_on, (sum_sq * unit * unit).to(tl.float32), mask=mask_m)
    if BELOW >= 0:
        tl.store(out_ptr + BELOW * stride_on, (below * unit).to(tl.float32), mask=mask_m)
    if DISTANCE >= 0:
        tl.store(out_ptr + DISTANCE * stride_on, (distance * unit).to(tl.float32), mask=mask_m)
    if PIVOT >= 0:
        tl.store(out_ptr + PIVOT * stride_on, m_i, mask=mask_m)


def row_statistics_fwd(
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
    want: list[str],
) -> torch.Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    out = torch.empty(len(want), B, H, T, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    shaped = bias is not None or slopes is not None or softcap > 0
    extras = shaped + bool({"entropy", "sum_sq", "distance"} & {*want})
    tiles = launch(D, q.element_size(), architecture(q), extras)
    _row_statistics_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
        q, k, start, stop, bias, slopes, sink, out,
        *score_strides(q, k, start, bias, slopes), out.stride(0), T,
        H, H // k.shape[1], T, S, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)),
        **{name.upper(): want.index(name) if name in want else -1 for name in ROWS},
        PARTS=parts(q), **tiles._asdict(), enable_fp_fusion=True,
    )
    return out

"""Softmax attention: out, lse and, on request, the probabilities.

    out_i = Σ_j A_ij v_j,  A_ij = exp(S_ij − lse_i),  lse_i = log(Σ_{start_i ≤ j < stop_i} e^{S_ij} + e^{sink})

Shapes: q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V] or None, start and stop [B or 1, T] int32, bias
[B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], sink [H]; out [B, H, T, V], lse [B, H, T] float32, and for later
passes pivot = max_j S_ij / log 2 and largest = max_j A_ij, [B, H, T] float32; probs [B, H, T, S]. out has v's dtype,
which may be float32 beside 16-bit q. With ceiling [B, H, T] what lies above it, in base 2, is left out of a row.
Precision: float32 scores in base 2 and accumulator, probabilities in v's dtype where they meet v; the sum of a row
float32 in a tile and float64 across tiles. A row without a key gives 0 and −∞.
Cost: 2·(D + V) flops and one exp2 a score. With probabilities the scores are formed twice and A is written once:
bound by that write, 4 bytes an entry of A (2 in a 16-bit dtype).
"""

import torch
import triton
import triton.language as tl

from .._primitives import (
    FLOOR,
    FORBIDDEN,
    LN2,
    LOG2E,
    Launch,
    architecture,
    dot,
    head_bias,
    key_tiles,
    load_intervals,
    load_rows,
    load_tile,
    normalizer,
    parts,
    row_scores,
    score_strides,
    slope,
)


def launch(D: int, itemsize: int, arch: int, shaped: bool, probs: bool, ceiling: bool) -> Launch:
    """Tiles by the larger of D and V and by dtype, wider where scores are plain; arch is `architecture`'s."""
    if arch == 0:
        return Launch(32, 32, 4, 1) if itemsize == 4 and D > 64 else Launch(64, 32, 4, 1)
    if itemsize == 4:
        if D > 128:
            return Launch(16, 16, 8 if shaped and ceiling else 4, 1)
        return Launch(32, 16, 8, 1 if probs else 2) if shaped and D > 64 else Launch(32, 16, 4, 1)
    lean = not shaped and not probs
    if D > 128:
        if shaped and probs:
            # 64 rows, which wgmma needs, spill; beside 140 instructions a score its products are little
            return Launch(32, 32, 8, 1)
        return Launch(64, 32 if lean and arch in (90, 100) else 16, 8, 1)
    if arch in (90, 100):
        return Launch(128, 64 if lean else 32, 8, 2)
    return Launch(128, 32, 8, 2) if D <= 64 else Launch(64, 32, 8, 1)


@triton.jit
def _write_probs(
    probs_ptr, q, q_ptr, k_ptr, offs_m, start, stop, pivot, largest, T, S, offset,
    stride_qt, stride_qd, stride_ks, stride_kd, stride_pt,
    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    """A of rows offs_m, each entry written once, 0 where no row of the tile may attend."""
    edges = (0,) + key_tiles(start, stop, offs_m < T, BLOCK_N, PARTS) + (S,)
    for part in tl.static_range(PARTS + 2):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            if part == 0 or part == PARTS + 1:
                probs = tl.zeros([offs_m.shape[0], BLOCK_N], tl.float32)
            else:
                if q.dtype == tl.float32:
                    # kept across this loop, q would fill the registers: without tensor cores they hold operands
                    q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
                x = row_scores(
                    q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd,
                    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, D, BLOCK_N, BLOCK_D, part != 2)
                probs = tl.exp2(x - pivot[:, None]) * largest[:, None]
            probs = probs.to(probs_ptr.dtype.element_ty)
            ptrs = probs_ptr + offs_m[:, None].to(tl.int64) * stride_pt + offs_n[None, :]
            if n + BLOCK_N <= S:
                tl.store(ptrs, probs, mask=offs_m[:, None] < T)
            else:
                tl.store(ptrs, probs, mask=(offs_m[:, None] < T) & (offs_n[None, :] < S))


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, sink_ptr, ceiling_ptr,
    out_ptr, lse_ptr, pivot_ptr, largest_ptr, probs_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_pt,
    H, GROUP, T, S, offset, scale, softcap,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    rows = pid_bh * T + offs_m
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    edges = key_tiles(start, stop, mask_m, BLOCK_N, PARTS)
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if ceiling_ptr is not None:
        ceiling = tl.load(ceiling_ptr + rows, mask=mask_m, other=0.0)
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            x = row_scores(
                q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs,
                alibi, scale, softcap, D, BLOCK_N, BLOCK_D, part != 1)  # [BLOCK_M, BLOCK_N]
            if ceiling_ptr is not None:
                x = tl.where(x > ceiling[:, None], FORBIDDEN, x)
            m_new = tl.maximum(m_i, tl.max(x, 1))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(x - m_new[:, None])
            l_i = l_i * alpha.to(tl.float64) + tl.sum(p, 1)
            if v_ptr is not None:
                head_v = v_ptr + pid_b * stride_vb + pid_h // GROUP * stride_vh
                v = load_tile(head_v, n, S, stride_vs, stride_vd, V, BLOCK_N, BLOCK_V, part != 1)
                if part != 1:
                    # a key that no row may attend: 0 · NaN must not leak from padding
                    v = tl.where((tl.max((x != FORBIDDEN).to(tl.int32), 0) > 0)[:, None], v, 0.0)
                acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
            m_i = m_new

    sink = None
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + pid_h).to(tl.float32) * LOG2E
    gap, unit = normalizer(m_i, l_i.to(tl.float32), sink)
    tl.store(lse_ptr + rows, (m_i + gap) * LN2, mask=mask_m)
    tl.store(pivot_ptr + rows, m_i, mask=mask_m)
    tl.store(largest_ptr + rows, unit, mask=mask_m)
    if v_ptr is not None:
        offs_v = tl.arange(0, BLOCK_V)
        out = (acc * unit[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * V + offs_v[None, :], out, mask=mask_m[:, None] & (offs_v[None, :] < V))

    if probs_ptr is not None:
        _write_probs(
            probs_ptr + pid_bh * T * stride_pt, q, q_ptr, k_ptr, offs_m, start, stop, m_i, unit, T, S, offset,
            stride_qt, stride_qd, stride_ks, stride_kd, stride_pt,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, D, BLOCK_D, BLOCK_N, PARTS)


def attention_fwd(
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
    sink: torch.Tensor | None,
    probs_dtype: torch.dtype | None,
    ceiling: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """out, lse, pivot, largest and probs; out is empty without v, probs without a dtype."""
    B, H, T, D = q.shape
    S, V = k.shape[2], D if v is None else v.shape[3]
    wide = q if v is None else v
    out = torch.empty(0 if v is None else (B, H, T, V), dtype=wide.dtype, device=q.device)
    lse, pivot, largest = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(3))
    probs = torch.empty(0 if probs_dtype is None else (B, H, T, S), dtype=probs_dtype, device=q.device)
    if lse.numel() == 0:
        return out, lse, pivot, largest, probs
    shaped = bias is not None or slopes is not None or softcap > 0
    arch = architecture(q)
    tiles = launch(max(D, V), wide.element_size(), arch, shaped, probs_dtype is not None, ceiling is not None)
    # left to itself ptxas spills a few registers where another program would then fit
    limit = {"maxnreg": 255} if ceiling is not None and arch == 90 and max(D, V) == 128 and not shaped else {}
    _attention_fwd_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
        q, k, v, start, stop, bias, slopes, sink, ceiling, out, lse, pivot, largest, probs if probs_dtype else None,
        *score_strides(q, k, start, bias, slopes), *((0, 0, 0, 0) if v is None else v.stride()), S,
        H, H // k.shape[1], T, S, offset, scale, softcap or None,
        D=D, V=V, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_V=max(16, triton.next_power_of_2(V)),
        PARTS=parts(wide), **tiles._asdict(), **limit, enable_fp_fusion=True,
    )
    return out, lse, pivot, largest, probs

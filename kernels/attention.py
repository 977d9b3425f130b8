"""Softmax attention: out, lse and, on request, the probabilities.

    out_i = Σ_j A_ij v_j,  A_ij = exp(S_ij − lse_i),  lse_i = log(Σ_{start_i ≤ j < stop_i} e^{S_ij} + e^{sink})

Shapes: q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V], start and stop [B or 1, T] int32, bias [B, H, T, S],
sink [H]; out [B, H, T, V], lse [B, H, T] float32, probs [B, H, T, S].
Precision: float32 scores in base 2 and accumulator, probabilities in v's dtype where they meet v; the sum of a row
float32 in a tile and float64 across tiles. A row without a key gives 0 and −∞.
Cost: 2·(D + V) flops and one exp2 a score. With probabilities the scores are formed twice and A is written once.
"""

import torch
import triton
import triton.language as tl

from ._primitives import (
    FLOOR,
    FORBIDDEN,
    LN2,
    LOG2E,
    Launch,
    add_bias,
    architecture,
    base2_scores,
    dot,
    interval_bounds,
    load_intervals,
    load_rows,
    normalizer,
)


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles by the larger of D and V and by dtype; arch is `architecture`'s."""
    if arch == 0:
        return Launch(32, 32, 4, 1) if itemsize == 4 and D > 64 else Launch(64, 32, 4, 1)
    if itemsize == 4:
        return Launch(16, 16, 4, 1) if D > 128 else Launch(32, 16, 4, 1)
    if D > 128:
        return Launch(64, 32, 8, 1)
    if arch in (90, 100):
        return Launch(128, 64 if D <= 64 else 32, 8, 2)
    return Launch(128, 32, 8, 2) if D <= 64 else Launch(64, 32, 4, 2)


@triton.jit
def _scores(
    q, k_ptr, bias_ptr, offs_m, n, start, stop, inner_low, inner_high, T, S,
    stride_ks, stride_kd, stride_bt, stride_bs, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Masked base-2 scores of q against keys n…: [BLOCK_M, BLOCK_N]."""
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
    x = base2_scores(dot(q, tl.trans(k)), scale, softcap)
    if bias_ptr is not None:
        x = add_bias(x, bias_ptr, offs_m[:, None], offs_n[None, :], T, S, stride_bt, stride_bs)
    if (n < inner_low) | (n + BLOCK_N > inner_high):
        x = tl.where((offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None]), x, FORBIDDEN)
    return x


@triton.jit
def _values(v_ptr, n, start, stop, S, stride_vs, stride_vd, V: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """Values n…, 0 where no row of the tile may attend them: 0 · NaN must not leak from padding."""
    offs_n = n + tl.arange(0, BLOCK_N)
    v = load_rows(v_ptr, offs_n, S, stride_vs, stride_vd, V, BLOCK_V)
    seen = (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None])
    return tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0)


@triton.jit(do_not_specialize=["T", "S", "scale", "softcap"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, sink_ptr, out_ptr, lse_ptr, probs_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    H, GROUP, T, S, scale, softcap,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    low, high, inner_low, inner_high = interval_bounds(start, stop, mask_m)
    low = low // BLOCK_N * BLOCK_N
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // GROUP * stride_vh
    if bias_ptr is not None:
        bias_ptr += pid_b * stride_bb + pid_h * stride_bh

    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for n in range(low, high, BLOCK_N):
        x = _scores(q, k_ptr, bias_ptr, offs_m, n, start, stop, inner_low, inner_high, T, S,
                    stride_ks, stride_kd, stride_bt, stride_bs, scale, softcap, D, BLOCK_D, BLOCK_N)
        m_new = tl.maximum(m_i, tl.max(x, 1))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(x - m_new[:, None])
        l_i = l_i * alpha.to(tl.float64) + tl.sum(p, 1)
        v = _values(v_ptr, n, start, stop, S, stride_vs, stride_vd, V, BLOCK_V, BLOCK_N)
        acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
        m_i = m_new

    sink = None
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + pid_h).to(tl.float32) * LOG2E
    lse, unit = normalizer(m_i, l_i.to(tl.float32), sink)
    tl.store(lse_ptr + rows, lse * LN2, mask=mask_m)
    offs_v = tl.arange(0, BLOCK_V)
    out = (acc * unit[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * V + offs_v[None, :], out, mask=mask_m[:, None] & (offs_v[None, :] < V))

    if probs_ptr is not None:
        for n in range(0, S, BLOCK_N):
            if q.dtype == tl.float32:
                # kept across this loop, q would fill the registers: without tensor cores they hold a product's operands
                q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
            x = _scores(q, k_ptr, bias_ptr, offs_m, n, start, stop, inner_low, inner_high, T, S,
                        stride_ks, stride_kd, stride_bt, stride_bs, scale, softcap, D, BLOCK_D, BLOCK_N)
            probs = (tl.exp2(x - m_i[:, None]) * unit[:, None]).to(probs_ptr.dtype.element_ty)
            offs_n = n + tl.arange(0, BLOCK_N)
            ptrs = probs_ptr + rows[:, None] * S + offs_n[None, :]
            if n + BLOCK_N <= S:
                tl.store(ptrs, probs, mask=mask_m[:, None])
            else:
                tl.store(ptrs, probs, mask=mask_m[:, None] & (offs_n[None, :] < S))


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    sink: torch.Tensor | None,
    return_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    S, V = k.shape[2], v.shape[3]
    out = torch.empty(B, H, T, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    probs = torch.empty((B, H, T, S) if return_probs else 0, dtype=q.dtype, device=q.device)
    if lse.numel() == 0:
        return out, lse, probs
    tiles = launch(max(D, V), q.element_size(), architecture(q))
    _attention_fwd_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
        q, k, v, start, stop, bias, sink, out, lse, probs if return_probs else None,
        *q.stride(), *k.stride(), *v.stride(), start.stride(0) if start.shape[0] > 1 else 0,
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        H, H // k.shape[1], T, S, scale, softcap or None,
        D=D, V=V, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_V=max(16, triton.next_power_of_2(V)),
        **tiles._asdict(), enable_fp_fusion=True,
    )
    return out, lse, probs

"""Gradients of softmax attention, from those of out, lse and the probabilities.

    dP_ij = dout_i·v_j + dprobs_ij,  δ_i = Σ_j A_ij dP_ij − dlse_i,  dS_ij = A_ij (dP_ij − δ_i)
    dq_i = scale·Σ_j dS_ij k_j,  dk_j = scale·Σ_i dS_ij q_i,  dv_j = Σ_i A_ij dout_i,  dbias_ij = dS_ij
    dsink = −Σ_i e^{sink − lse_i} δ_i;  under a softcap c, S = c·tanh(x / c), dS meets q and k times 1 − tanh²(x / c)

Shapes: as in forward.py; dout [B, H, T, V], dlse [B, H, T] and dprobs [B, H, T, S] or None; δ [B, H, T] float32.
Saved by forward: q, k, v, out, pivot and largest, of which A is formed again; never A.
Precision: float32 scores and accumulators, dS in the inputs' dtype where it meets q and k. dk and dv belong to one
program a block of keys, which takes the query heads and their rows in order: no atomics.
Cost: 10·D flops and two exp2 a score (D = V), 2.5 times the forward's and twice its exponentials; with dprobs one dot
and one exp2 more, for δ.
"""

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
    masked_scores,
    parts,
    reached_keys,
    row_scores,
    row_tiles,
    score_strides,
    slope,
    uncapped_gradient,
)


def launch_dq(D: int, itemsize: int, arch: int, lean: bool) -> Launch:
    """Tiles of the pass over keys, by the larger of D and V and by dtype; arch is `architecture`'s."""
    if arch == 0:
        return Launch(32, 32, 4, 1)
    if itemsize == 4:
        return Launch(16, 16, 4, 2)
    if arch in (90, 100):
        # a second stage costs registers that bias, slopes, softcap and probabilities take
        return Launch(128, 32, 8, 2 if lean else 1) if D <= 64 else Launch(64, 32, 8, 2)
    return Launch(32, 32, 4 if D <= 64 else 8, 2)


def launch_dkv(D: int, itemsize: int, arch: int, lean: bool) -> Launch:
    """Tiles of the pass over rows, as above, taller where scores are plain."""
    if arch == 0:
        return Launch(32, 32, 4, 1)
    if itemsize == 4:
        return Launch(16, 16, 8, 2)
    if arch in (90, 100):
        return Launch(32, 128, 8, 2) if D <= 64 else Launch(32 if lean else 16, 64, 8, 2)
    return Launch(32, 32, 8, 2)


@triton.jit
def _probs_gradient(dprobs_ptr, offs_row, offs_key, T, S, stride_pt, stride_ps):
    """dprobs of a tile in float32; offs_row lie along one axis and offs_key along the other."""
    ptrs = dprobs_ptr + offs_row.to(tl.int64) * stride_pt + offs_key.to(tl.int64) * stride_ps
    return tl.load(ptrs, mask=(offs_row < T) & (offs_key < S), other=0.0).to(tl.float32)


@triton.jit
def _probs_delta(
    q, k_ptr, dprobs_ptr, offs_m, start, stop, edges, pivot, largest, T, S, offset,
    stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, stride_pt, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    """Σ_j A_ij dprobs_ij of each row."""
    delta = tl.zeros_like(pivot)
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            x = row_scores(
                q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs,
                alibi, scale, softcap, D, BLOCK_N, BLOCK_D, part != 1)  # [BLOCK_M, BLOCK_N]
            p = tl.exp2(x - pivot[:, None]) * largest[:, None]
            dprobs = _probs_gradient(dprobs_ptr, offs_m[:, None], offs_n[None, :], T, S, stride_pt, stride_ps)
            # whatever the gradient of a forbidden pair is
            delta += tl.sum(tl.where(p == 0, 0.0, p * dprobs), 1)
    return delta


@triton.jit(do_not_specialize=["first", "last", "T", "S", "offset", "scale", "softcap"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr,
    out_ptr, dout_ptr, dlse_ptr, dprobs_ptr, delta_ptr, dq_ptr, ds_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_pb, stride_ph, stride_pt, stride_ps,
    first, last, H, GROUP, T, S, offset, scale, softcap,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(last - first, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = first + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < last
    rows = pid_bh * T + offs_m
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, last)
    edges = key_tiles(start, stop, mask_m, BLOCK_N, PARTS)
    pivot = tl.load(pivot_ptr + rows, mask=mask_m, other=0.0)
    largest = tl.load(largest_ptr + rows, mask=mask_m, other=0.0)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, last, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)

    delta = -tl.load(dlse_ptr + rows, mask=mask_m, other=0.0)
    if v_ptr is not None:
        v_ptr += pid_b * stride_vb + pid_h // GROUP * stride_vh
        dout = load_rows(dout_ptr + pid_bh * T * V, offs_m, last, V, 1, V, BLOCK_V)
        out = load_rows(out_ptr + pid_bh * T * V, offs_m, last, V, 1, V, BLOCK_V)
        delta += tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dprobs_ptr is not None:
        dprobs_ptr += pid_b * stride_pb + pid_h * stride_ph
        delta += _probs_delta(
            q, k_ptr, dprobs_ptr, offs_m, start, stop, edges, pivot, largest, T, S, offset,
            stride_ks, stride_kd, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, stride_pt, stride_ps,
            D, BLOCK_D, BLOCK_N, PARTS)
    tl.store(delta_ptr + rows, delta, mask=mask_m)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        for n in range(edges[part], edges[part + 1], BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            keys = offs_n if part == 1 else reached_keys(offs_n, start, stop, S)
            k = load_rows(k_ptr, keys, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            dots = dot(q, tl.trans(k))
            x = masked_scores(
                dots, offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
                bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_M, BLOCK_N]
            dp = -delta[:, None]
            if v_ptr is not None:
                dp += dot(dout, tl.trans(load_rows(v_ptr, keys, S, stride_vs, stride_vd, V, BLOCK_V)))
            if dprobs_ptr is not None:
                dp += _probs_gradient(dprobs_ptr, offs_m[:, None], offs_n[None, :], T, S, stride_pt, stride_ps)
            p = tl.exp2(x - pivot[:, None]) * largest[:, None]
            ds = p * dp
            if part != 1:
                # whatever the gradients of padding are
                ds = tl.where(p == 0, 0.0, ds)
            if ds_ptr is not None:
                ptrs = ds_ptr + (pid_bh * (last - first) + offs_m - first)[:, None] * S + offs_n[None, :]
                tl.store(ptrs, ds, mask=mask_m[:, None] & (offs_n[None, :] < S))
            ds = uncapped_gradient(ds, dots, scale, softcap)
            dq += dot(ds.to(k.dtype), k)

    offs_d = tl.arange(0, BLOCK_D)
    dq_ptrs = dq_ptr + rows[:, None] * D + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d[None, :] < D))


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr,
    dout_ptr, dprobs_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_pb, stride_ph, stride_pt, stride_ps,
    stride_eb,
    H, GROUP, T, S, offset, scale, softcap,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    pid_bg = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_g = pid_bg // (H // GROUP), pid_bg % (H // GROUP)

    offs_n = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + pid_b * stride_kb + pid_g * stride_kh, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if v_ptr is not None:
        v = load_rows(v_ptr + pid_b * stride_vb + pid_g * stride_vh, offs_n, S, stride_vs, stride_vd, V, BLOCK_V)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib
    edges = row_tiles(bounds_ptr + pid_b * stride_eb, tl.cdiv(T, BLOCK_M), first, BLOCK_M, BLOCK_N, PARTS)
    for h in range(GROUP):
        pid_h = pid_g * GROUP + h
        head_rows = (pid_b * H + pid_h) * T
        q_head = q_ptr + pid_b * stride_qb + pid_h * stride_qh
        bias_head = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
        alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
        for part in tl.static_range(PARTS):
            for m in range(edges[part], edges[part + 1], BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                mask_m = offs_m < T
                start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
                # a row that may attend nothing loads as 0: 0 · NaN must not leak from padding
                filled = offs_m if part == 1 else tl.where(start < stop, offs_m, T)
                q = load_rows(q_head, filled, T, stride_qt, stride_qd, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                pivot = tl.load(pivot_ptr + head_rows + offs_m, mask=mask_m, other=0.0)
                largest = tl.load(largest_ptr + head_rows + offs_m, mask=mask_m, other=0.0)
                delta = tl.load(delta_ptr + head_rows + offs_m, mask=mask_m, other=0.0)
                dots = dot(k, tl.trans(q))
                x = masked_scores(
                    dots, offs_m[None, :], offs_n[:, None], start[None, :], stop[None, :], T, S, offset,
                    bias_head, stride_bt, stride_bs, alibi, scale, softcap, part != 1)  # [BLOCK_N, BLOCK_M]
                p = tl.exp2(x - pivot[None, :]) * largest[None, :]
                dp = -delta[None, :]
                if v_ptr is not None:
                    dout = load_rows(dout_ptr + head_rows * V, filled, T, V, 1, V, BLOCK_V)
                    dv += dot(p.to(dout.dtype), dout)
                    dp += dot(v, tl.trans(dout))
                if dprobs_ptr is not None:
                    dprobs_head = dprobs_ptr + pid_b * stride_pb + pid_h * stride_ph
                    dp += _probs_gradient(dprobs_head, offs_m[None, :], offs_n[:, None], T, S, stride_pt, stride_ps)
                ds = p * dp
                if part != 1:
                    # keys that nobody may attend
                    ds = tl.where(p == 0, 0.0, ds)
                ds = uncapped_gradient(ds, dots, scale, softcap)
                dk += dot(ds.to(q.dtype), q)

    keys = pid_bg * S + offs_n
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mask_d = (offs_n[:, None] < S) & (offs_d[None, :] < D)
    tl.store(dk_ptr + keys[:, None] * D + offs_d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_d)
    if v_ptr is not None:
        mask_v = (offs_n[:, None] < S) & (offs_v[None, :] < V)
        tl.store(dv_ptr + keys[:, None] * V + offs_v[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask_v)


def attention_bwd(
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
    pivot: torch.Tensor,
    largest: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor,
    dprobs: torch.Tensor | None,
    bias_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, dbias (float32, in bias's shape) and δ; dv and dbias are empty where there is none."""
    dbias = torch.zeros(bias.shape if bias_grad else 0, dtype=torch.float32, device=q.device)
    dq, delta = _dq(
        q, k, v, start, stop, offset, bias, slopes, scale, softcap, pivot, largest, out, dout, dlse, dprobs,
        dbias if bias_grad else None,
    )
    dk, dv = _dkv(q, k, v, start, stop, offset, bias, slopes, scale, softcap, pivot, largest, dout, dprobs, delta)
    return dq, dk, dv, dbias, delta


def _dq(
    q, k, v, start, stop, offset, bias, slopes, scale, softcap, pivot, largest, out, dout, dlse, dprobs, dbias
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    S, V = k.shape[2], D if v is None else v.shape[3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if delta.numel() == 0:
        return dq, delta
    lean = bias is None and slopes is None and softcap == 0 and dprobs is None
    tiles = launch_dq(max(D, V), q.element_size(), architecture(q), lean)
    contiguous = [
        None if x is None else x.contiguous() for x in (pivot, largest, None if v is None else out, dout, dlse)
    ]

    def run(first, last, ds):
        _attention_bwd_dq_kernel[(triton.cdiv(last - first, tiles.BLOCK_M) * B * H,)](
            q, k, v, start, stop, bias, slopes, *contiguous, dprobs, delta, dq, ds,
            *score_strides(q, k, start, bias, slopes), *_strides(v), *_strides(dprobs),
            first, last, H, H // k.shape[1], T, S, offset, scale, softcap or None,
            D=D, V=V, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_V=max(16, triton.next_power_of_2(V)),
            PARTS=parts(q), **tiles._asdict(), enable_fp_fusion=True,
        )

    by_rows(q, S, dbias, run)
    return dq, delta


def _dkv(
    q, k, v, start, stop, offset, bias, slopes, scale, softcap, pivot, largest, dout, dprobs, delta
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    S, V = k.shape[2], D if v is None else v.shape[3]
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(0 if v is None else v.shape, dtype=k.dtype, device=k.device)
    if T == 0 or dk.numel() == 0:
        return dk.zero_(), dv.zero_()
    lean = bias is None and slopes is None and softcap == 0
    tiles = launch_dkv(max(D, V), q.element_size(), architecture(q), lean)
    bounds = block_bounds(start, stop, tiles.BLOCK_M)
    contiguous = (None if x is None else x.contiguous() for x in (pivot, largest, dout))
    _attention_bwd_dkv_kernel[(triton.cdiv(S, tiles.BLOCK_N) * B * k.shape[1],)](
        q, k, v, start, stop, bounds, bias, slopes, *contiguous, dprobs, delta, dk, dv,
        *score_strides(q, k, start, bias, slopes), *_strides(v), *_strides(dprobs),
        bounds.stride(0) if start.shape[0] > 1 else 0,
        H, H // k.shape[1], T, S, offset, scale, softcap or None,
        D=D, V=V, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_V=max(16, triton.next_power_of_2(V)),
        PARTS=parts(q), **tiles._asdict(), enable_fp_fusion=True,
    )
    return dk, dv


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()

"""Gradients of causal linear attention, from those of out and of the end state, by three more prefix products.

    u_t = 1 / den_t, δ_t = dout_t·out_t  (u the scale, δ nothing if not normalized; u = 0 where den is 0)
    dφq_t = u_t Σ_{s ≤ t} e^{G_t − G_s} (dout_t·v_s − δ_t) φk_s + the same of the state, dq = φ'(q) dφq
    dφk_t = Σ_{s ≥ t} e^{G_s − G_t} u_s (v_t·dout_s − δ_s) φq_s + e^{G_T − G_t} (dS v_t + dz), dk = φ'(k) dφk
    dv_t  = Σ_{s ≥ t} e^{G_s − G_t} u_s (φk_t·φq_s) dout_s + e^{G_T − G_t} dSᵀ φk_t
    dg_r  = Σ_{r ≤ t < stop} (φq_t·dφq_t − φk_t·dφk_t) + ⟨dS, S⟩ + ⟨dz, z⟩ at the stop of r's group; a channel each
    dS_0, dz_0: the states that the reversed products end with

Shapes: as in forward.py; dout [B, H, T, V], ds and dz as s and z; ddecay as decay, float32.
Saved by forward: q, k, v, decay, the states, out and den. The group states are formed again, and those of dS.
Precision: as in product.py; den divides float32 scores and sums, never dout, whose quotient float16 could not hold. The
terms of dg are summed in float32 before φ' and cumulated in float64 up to the end of a group, where the states give
the rest: its error does not grow with T. k and v shared by heads get a gradient a head, float32, summed in order.
Cost: three products of the forward's size and two passes over group states.
"""

import torch
import triton
import triton.language as tl

from ._groups import Factor, Groups, States, advance, locate, padded, plan, rows
from .channel import channel_product
from .product import cumulated, product
from .states import group_states

ROWS = 16  # of δ, a program
BLOCK_K = 16  # rows of the states, a step of the decay's gradient


@triton.jit(do_not_specialize=["T"])
def _unit_kernel(
    out_ptr, dout_ptr, den_ptr, unit_ptr, delta_ptr, end_ptr,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_db, stride_dh, stride_dt, stride_dd,
    H, T, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):
    blocks = tl.cdiv(T, ROWS)
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    # rows beyond the last segment are never read
    exists = offs < T if end_ptr is None else offs < tl.load(end_ptr)
    offs_v = tl.arange(0, BLOCK_V)
    mask = exists[:, None] & (offs_v[None, :] < V)
    at = offs[:, None].to(tl.int64)
    out_ptr += pid_bh // H * stride_ob + pid_bh % H * stride_oh
    dout_ptr += pid_bh // H * stride_db + pid_bh % H * stride_dh
    out = tl.load(out_ptr + at * stride_ot + offs_v[None, :] * stride_od, mask=mask, other=0.0)
    dout = tl.load(dout_ptr + at * stride_dt + offs_v[None, :] * stride_dd, mask=mask, other=0.0)
    den = tl.load(den_ptr + pid_bh * T + offs, mask=exists, other=0.0)
    unit = tl.where(den == 0, 0.0, 1 / tl.where(den == 0, 1.0, den))
    tl.store(unit_ptr + pid_bh * T + offs, unit, mask=exists)
    tl.store(delta_ptr + pid_bh * T + offs, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), mask=exists)


def _unit(out, dout, den, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / den, 0 where den is 0, and δ: [B, H, T] float32."""
    B, H, T, V = out.shape
    unit, delta = (torch.empty(B, H, T, dtype=torch.float32, device=out.device) for _ in range(2))
    if unit.numel():
        _unit_kernel[(triton.cdiv(T, ROWS) * B * H,)](
            out, dout, den.contiguous(), unit, delta, None if groups.bounds is None else groups.bounds[-1:],
            *out.stride(), *dout.stride(), H, T, V=V, BLOCK_V=padded(V), ROWS=ROWS, enable_fp_fusion=True,
        )
    return unit, delta


@triton.jit
def _load_end(left, next_ptr, end_ptr, offs, mask):
    """Entries of the state that a group ends with: the next one starts with it, or the sequence ends there."""
    if next_ptr is None:
        x = tl.load(end_ptr + offs, mask=mask, other=0.0)
    elif left == 0:
        x = tl.load(end_ptr + offs, mask=mask, other=0.0)
    else:
        x = tl.load(next_ptr + offs, mask=mask, other=0.0)
    return x


@triton.jit(do_not_specialize=["T"])
def _decay_bwd_kernel(
    moment_q_ptr, moment_k_ptr, ds_ptr, dz_ptr, before_ptr, s_ptr, z_ptr, segment_ptr, first_ptr, bounds_ptr,
    ddecay_ptr, stride_ds, stride_dz, stride_before, stride_tile,
    H, T, each, tokens,
    K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K) if CHANNELS else 1
    pid_k, pid_h = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H
    n = (tl.program_id(0) // (blocks * H)).to(tl.int64)
    sequence, batch, place, count, start, stop = locate(segment_ptr, first_ptr, bounds_ptr, n, each, tokens, T)
    if place >= count:
        return
    left, head = count - 1 - place, (batch * H + pid_h) * T
    end = sequence * H + pid_h
    ds_ptr = advance(ds_ptr, (n * H + pid_h) * stride_ds)
    dz_ptr = advance(dz_ptr, (n * H + pid_h) * stride_dz)
    before_ptr = advance(before_ptr, ((n + 1) * H + pid_h) * stride_before)

    # of all that comes after the group only the states know
    total = tl.zeros([BLOCK_K], tl.float64)
    offs_v = tl.arange(0, BLOCK_V)
    for first_k in range(pid_k * BLOCK_K, (pid_k + 1) * BLOCK_K if CHANNELS else K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        entries = offs_k[:, None] * V + offs_v[None, :]
        mask = (offs_k[:, None] < K) & (offs_v[None, :] < V)
        if ds_ptr is not None:
            s = _load_end(left, before_ptr, s_ptr + end * (K * V), entries, mask)
            total += tl.sum(s * tl.load(ds_ptr + entries, mask=mask, other=0.0), 1)
        if dz_ptr is not None:
            z = _load_end(left, advance(before_ptr, K * V), z_ptr + end * K, offs_k, offs_k < K)
            total += z * tl.load(dz_ptr + offs_k, mask=offs_k < K, other=0.0)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if not CHANNELS:
        total = tl.sum(total, 0)

    chunks = tl.cdiv(stop - start, CHUNK)
    for i in range(chunks):
        # the last token first, whose gradient the others add to
        rows = start + (chunks - i) * CHUNK - 1 - tl.arange(0, CHUNK)
        exists = rows < stop
        if CHANNELS:
            entries = (head + rows)[:, None] * K + offs_k[None, :]
            mask = exists[:, None] & (offs_k[None, :] < K)
        else:
            entries, mask = head + rows, exists
        dG = tl.zeros(entries.shape, tl.float64)
        for tile in tl.static_range(TILES):
            dG += tl.load(moment_q_ptr + tile * stride_tile + entries, mask=mask, other=0.0)
            dG -= tl.load(moment_k_ptr + tile * stride_tile + entries, mask=mask, other=0.0)
        tl.store(ddecay_ptr + entries, (tl.cumsum(dG, 0) + total).to(tl.float32), mask=mask)
        total += tl.sum(dG, 0)


def linear_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature: str,
    normalize: bool,
    scale: float,
    out: torch.Tensor,
    den: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    dout: torch.Tensor,
    ds: torch.Tensor | None,
    dz: torch.Tensor | None,
    decay_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, ddecay (float32, empty unless decay_grad), ds0 and dz0."""
    B, H, T, D = q.shape
    V = v.shape[3]
    q, k, v, dout = (rows(x) for x in (q, k, v, dout))
    channels = decay is not None and decay.dim() == 4
    decay = rows(decay) if channels else decay
    groups = plan(q, cu_seqlens)
    share = H // k.shape[1] if H else 1
    unit, delta = _unit(out, dout, den, groups) if normalize else (None, None)
    fq, fk, fv, fd = Factor(q, 1, feature), Factor(k, share, feature), Factor(v, share), Factor(dout)
    before = group_states(fk, fv, decay, None, None, 1.0, groups, H, s0, z0, z=True)
    after = group_states(fq, fd, decay, unit, delta, scale, groups, H, ds, dz, z=normalize, reverse=True)
    run, G = (channel_product, decay) if channels else (product, cumulated(decay, q, V, groups))

    new = {"dtype": torch.float32, "device": q.device}
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    of_head = q.dtype if share == 1 else torch.float32
    dq = allocate(q.shape, dtype=q.dtype, device=q.device)
    dk = allocate(B, H, T, D, dtype=of_head, device=q.device)
    dv = allocate(B, H, T, V, dtype=of_head, device=q.device)
    ds0, dz0 = torch.empty(groups.sequences, H, D, V, **new), torch.empty(groups.sequences, H, D, **new)
    moment_q = run(
        fd, fv, Factor(k, share, feature), G, unit, delta, scale, groups, before, dq,
        vector="outer" if normalize else None, across=True, own=fq, moment=decay_grad,
    )
    moment_k = run(
        fv, fd, fq, G, unit, delta, scale, groups, after, dk,
        vector="outer", across=True, reverse=True, end_vector=dz0, own=fk, moment=decay_grad,
    )
    run(fk, fq, fd, G, unit, None, scale, groups, after, dv, reverse=True, end=ds0)
    ddecay = torch.empty(0, **new)
    if decay_grad:
        ddecay = _decay_gradient(moment_q, moment_k, groups, before, after, s, z, channels, allocate)
    if share > 1:
        dk, dv = (x.unflatten(1, (-1, share)).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv, ddecay, ds0, dz0


def _decay_gradient(
    moment_q, moment_k, groups: Groups, before: States, after: States, s, z, channels: bool, allocate
) -> torch.Tensor:
    """ddecay [B, H, T] or, channels, [B, H, T, D], float32."""
    tiles, _, H, T = moment_q.shape[:4]
    K, V = s.shape[2:]
    ddecay = allocate(moment_q.shape[1:], dtype=torch.float32, device=s.device)
    if ddecay.numel():
        blocks = triton.cdiv(K, BLOCK_K) if channels else 1
        _decay_bwd_kernel[(groups.count * H * blocks,)](
            moment_q, moment_k, after.s, after.z, before.s if groups.each > 1 else None, s.contiguous(), z.contiguous(),
            *groups.tables, ddecay, after.stride_s, after.stride_z, before.stride_s, moment_q.stride(0),
            H, T, groups.each, groups.tokens,
            K=K, V=V, TILES=tiles, CHANNELS=channels, BLOCK_K=BLOCK_K, BLOCK_V=padded(V), CHUNK=32,
            enable_fp_fusion=True,
        )
    return ddecay

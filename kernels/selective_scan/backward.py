"""Gradients of the selective scan, from those of out and of the last state.

    dy_t = dout_t·silu(z_t),  g_t = C_t dy_t + e^{Δ_{t+1} A} g_{t+1}: the gradient of h_t, scanned from the end
    dC_tn = Σ_e h_t dy_t,  dB_tn = Σ_e g_t w_t u_t,  du_t = Σ_n g_t w_t B_tn + D dy_t,  w = (e^{ΔA} − 1)/A or Δ
    dΔ_t = Σ_n g_t (A e^{ΔA} h_{t−1} + B_tn u_t ∂w/∂Δ),  dA = Σ_bt g_t (Δ e^{ΔA} h_{t−1} + B_tn u_t ∂w/∂A)
    dD = Σ_bt dy_t u_t,  dz_t = dout_t (C_t·h_t + D u_t) silu'(z_t);  ∂w/∂Δ is e^{ΔA} or 1, ∂w/∂A a series near ΔA = 0

Shapes: as in forward.py; dout [B, T, E], dstate [B, E, N] or None; starts and ends, a group's first state and the
gradient of its last, [B, groups, N, E] float32.
Saved by forward: its inputs and starts.
Precision: float32. Groups run side by side: what each adds to a gradient of 0, the carry over groups from the last, the
scan itself. A pass before it writes the states before every SPAN tokens, and a program walks the spans of its group
from the end, each formed again in registers. What sums over channels is summed over a program's, then over programs in
order; dA and dD over a group, then over groups in float64: no atomics.
Cost: three exp2 a token, channel and state. The states before spans pass through memory once, 8·N / SPAN bytes a token
and channel (in slices of WORKSPACE entries), and parts of dB and dC 16·N / BLOCK_E: 80 bytes together at N = 16, which
an H200 moves in 17 ps, against 13 ps of exponentials; the instructions issued take 50 ps under euler and 74 ps under
zoh with a gate, a quarter of them the sums across lanes, so it is they that bound it.
"""


import torch
import triton
import triton.language as tl

from .._primitives import LN2, architecture
from ._groups import carry, discretize, gate, load_rates, load_rows, place, store_rows, tile

WORKSPACE = 2**26  # float32 entries of states before spans, 256 MiB
# tokens whose states are in registers at once
SPAN = 2


@triton.jit(do_not_specialize=["T", "E"])
def _group_gradients_kernel(
    delta_ptr, A_ptr, C_ptr, z_ptr, dout_ptr, ends_ptr, lengths_ptr,
    stride_db, stride_dt, stride_de,
    stride_ae, stride_an,
    stride_cb, stride_ct, stride_cn,
    stride_zb, stride_zt, stride_ze,
    stride_ob, stride_ot, stride_oe,
    groups, T, N, E,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SPAN: tl.constexpr,
):
    """Of every group but the first: the gradient of its start from its own tokens, where the end before it belongs."""
    pid_e, pid_g, pid_b = place(E, groups - 1, BLOCK_E)
    pid_g += 1
    offs_n, offs_e = tl.arange(0, BLOCK_N).to(tl.int64), (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    rate, inverse = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    delta_ptr += pid_b * stride_db
    C_ptr += pid_b * stride_cb
    dout_ptr += pid_b * stride_ob
    if z_ptr is not None:
        z_ptr += pid_b * stride_zb
    r = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    length = tl.zeros([BLOCK_E], tl.float32)
    spans = tl.cdiv(tl.minimum(GROUP, T - pid_g * GROUP), SPAN)
    for k in range(spans):
        t = pid_g * GROUP + (spans - 1 - k) * SPAN
        deltas = load_rows(delta_ptr, t, T, offs_e, E, stride_dt, stride_de, SPAN)
        cs = load_rows(C_ptr, t, T, offs_n, N, stride_ct, stride_cn, SPAN)
        dys = load_rows(dout_ptr, t, T, offs_e, E, stride_ot, stride_oe, SPAN)
        if z_ptr is not None:
            zs = load_rows(z_ptr, t, T, offs_e, E, stride_zt, stride_ze, SPAN)
        for i in tl.static_range(SPAN - 1, -1, -1):
            dy = dys[i]
            if z_ptr is not None:
                dy *= gate(zs[i])[0]
            decay, _, _ = discretize(deltas[i], rate, inverse, False)
            r = (r + cs[i][:, None] * dy[None, :]) * decay  # [BLOCK_N, BLOCK_E]
            length += deltas[i]
    mask_e = offs_e < E
    tl.store(lengths_ptr + (pid_b * groups + pid_g) * E + offs_e, length, mask=mask_e)
    ptrs = ends_ptr + ((pid_b * groups + pid_g - 1) * N + offs_n[:, None]) * E + offs_e[None, :]
    tl.store(ptrs, r, mask=(offs_n[:, None] < N) & mask_e[None, :])


@triton.jit(do_not_specialize=["T", "E", "first"])
def _states_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, starts_ptr, states_ptr,
    stride_ub, stride_ut, stride_ue,
    stride_db, stride_dt, stride_de,
    stride_ae, stride_an,
    stride_bb, stride_bt, stride_bn,
    first, count, groups, T, N, E,
    ZOH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SPAN: tl.constexpr,
):
    """Of count groups from first on: the states before every SPAN tokens, [B, count, GROUP / SPAN, N, E]."""
    pid_e, pid_g, pid_b = place(E, count, BLOCK_E)
    offs_n, offs_e = tl.arange(0, BLOCK_N).to(tl.int64), (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    mask = (offs_n[:, None] < N) & (offs_e[None, :] < E)
    rate, inverse = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    u_ptr += pid_b * stride_ub
    delta_ptr += pid_b * stride_db
    B_ptr += pid_b * stride_bb
    entries = offs_n[:, None] * E + offs_e[None, :]
    h = tl.load(starts_ptr + (pid_b * groups + first + pid_g) * N * E + entries, mask=mask, other=0.0)
    states_ptr += (pid_b * count + pid_g) * (GROUP // SPAN) * N * E
    start = (first + pid_g) * GROUP
    for k in range(tl.cdiv(tl.minimum(GROUP, T - start), SPAN)):
        tl.store(states_ptr + tl.cast(k, tl.int64) * N * E + entries, h, mask=mask)
        t = start + k * SPAN
        us = load_rows(u_ptr, t, T, offs_e, E, stride_ut, stride_ue, SPAN)
        deltas = load_rows(delta_ptr, t, T, offs_e, E, stride_dt, stride_de, SPAN)
        bs = load_rows(B_ptr, t, T, offs_n, N, stride_bt, stride_bn, SPAN)
        for i in tl.static_range(SPAN):
            decay, held, _ = discretize(deltas[i], rate, inverse, ZOH)
            h = h * decay + held * us[i][None, :] * bs[i][:, None]  # [BLOCK_N, BLOCK_E]


@triton.jit(do_not_specialize=["T", "E", "first"])
def _selective_scan_bwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, states_ptr, ends_ptr, dout_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbefore_ptr,
    stride_ub, stride_ut, stride_ue,
    stride_db, stride_dt, stride_de,
    stride_ae, stride_an,
    stride_bb, stride_bt, stride_bn,
    stride_cb, stride_ct, stride_cn,
    stride_Db,
    stride_zb, stride_zt, stride_ze,
    stride_ob, stride_ot, stride_oe,
    first, count, groups, T, N, E,
    ZOH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, SPAN: tl.constexpr,
):
    pid_e, pid_g, pid_b = place(E, count, BLOCK_E)
    n, e = tl.arange(0, BLOCK_N), pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n, offs_e = n.to(tl.int64), e.to(tl.int64)
    mask_e = offs_e < E
    mask = (offs_n[:, None] < N) & mask_e[None, :]
    entries = n[:, None] * E + e[None, :]
    rate, inverse = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    states_ptr += (pid_b * count + pid_g) * (GROUP // SPAN) * N * E
    # its slice's part of dB and dC: [programs of channels, B, count · GROUP, N]
    sequences = tl.num_programs(0) // (tl.cdiv(E, BLOCK_E) * count)
    part = ((pid_e * sequences + pid_b) * count + pid_g) * GROUP * N
    group = pid_b * groups + first + pid_g
    r = tl.load(ends_ptr + group * N * E + entries, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_E]
    dA = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dD = tl.zeros([BLOCK_E], tl.float32)
    if D_ptr is not None:
        skip = tl.load(D_ptr + offs_e * stride_Db, mask=mask_e, other=0.0).to(tl.float32)
    start = (first + pid_g) * GROUP
    spans = tl.cdiv(tl.minimum(GROUP, T - start), SPAN)
    for k in range(spans):
        span = tl.cast(spans - 1 - k, tl.int64)
        t = start + span * SPAN
        us = load_rows(u_ptr + pid_b * stride_ub, t, T, offs_e, E, stride_ut, stride_ue, SPAN)
        deltas = load_rows(delta_ptr + pid_b * stride_db, t, T, offs_e, E, stride_dt, stride_de, SPAN)
        bs = load_rows(B_ptr + pid_b * stride_bb, t, T, offs_n, N, stride_bt, stride_bn, SPAN)
        hs = (tl.load(states_ptr + span * N * E + entries, mask=mask, other=0.0),)
        for i in tl.static_range(SPAN):
            decay, held, _ = discretize(deltas[i], rate, inverse, ZOH)
            hs = hs + (hs[i] * decay + held * us[i][None, :] * bs[i][:, None],)
        douts = load_rows(dout_ptr + pid_b * stride_ob, t, T, offs_e, E, stride_ot, stride_oe, SPAN)
        cs = load_rows(C_ptr + pid_b * stride_cb, t, T, offs_n, N, stride_ct, stride_cn, SPAN)
        if z_ptr is not None:
            zs = load_rows(z_ptr + pid_b * stride_zb, t, T, offs_e, E, stride_zt, stride_ze, SPAN)
        dus, ddeltas, dBs, dCs, dzs = (), (), (), (), ()
        for i in tl.static_range(SPAN - 1, -1, -1):
            dy = douts[i]
            if z_ptr is not None:
                y = tl.sum(hs[i + 1] * cs[i][:, None], 0)  # [BLOCK_E]
                if D_ptr is not None:
                    y += skip * us[i]
                value, slope = gate(zs[i])
                dzs = (dy * y * slope,) + dzs
                dy *= value
            r, dA, du, ddelta, dB, dC = _step_gradients(
                r, dA, hs[i], hs[i + 1], us[i], deltas[i], bs[i], cs[i], dy, rate, inverse, ZOH)
            if D_ptr is not None:
                du += skip * dy
                dD += dy * us[i]
            dus, ddeltas, dBs, dCs = (du,) + dus, (ddelta,) + ddeltas, (dB,) + dBs, (dC,) + dCs
        store_rows(du_ptr + pid_b * T * E, dus, t, T, e, E, SPAN)
        store_rows(ddelta_ptr + pid_b * T * E, ddeltas, t, T, e, E, SPAN)
        if z_ptr is not None:
            store_rows(dz_ptr + pid_b * T * E, dzs, t, T, e, E, SPAN)
        store_rows(dB_ptr + part, dBs, t - start, GROUP, n, N, SPAN)
        store_rows(dC_ptr + part, dCs, t - start, GROUP, n, N, SPAN)
    tl.store(dA_ptr + group * N * E + entries, dA, mask=mask)
    if D_ptr is not None:
        tl.store(dD_ptr + group * E + offs_e, dD, mask=mask_e)
    if first + pid_g == 0:
        tl.store(dbefore_ptr + (pid_b * E + offs_e[None, :]) * N + offs_n[:, None], r, mask=mask)


@triton.jit
def _step_gradients(r, dA, before, after, u, delta, b, c, dy, rate, inverse, ZOH: tl.constexpr):
    """One token: r, the gradient of its state from later tokens, becomes that of the state before; dA is added to."""
    decay, held, by_rate = discretize(delta, rate, inverse, ZOH)
    g = r + c[:, None] * dy[None, :]  # [BLOCK_N, BLOCK_E]
    gb = g * b[:, None]
    dC = tl.sum(after * dy[None, :], 1)  # [BLOCK_N]
    dB = tl.sum(g * (held * u[None, :]), 1)
    du = tl.sum(gb * held, 0)  # [BLOCK_E]
    gb *= u[None, :]
    r = g * decay
    through = r * before
    dA += through * delta[None, :]
    if ZOH:
        dA += gb * by_rate
        gb *= decay
    ddelta = tl.sum(through * (rate * LN2) + gb, 0)
    return r, dA, du, ddelta, dB, dC


@triton.jit(do_not_specialize=["valid", "stride_part", "stride_sb", "stride_xb"])
def _sum_parts_kernel(parts_ptr, sum_ptr, parts, valid, stride_part, stride_sb, stride_xb, BLOCK: tl.constexpr):
    """Σ over parts in order, of the first valid entries of each sequence."""
    blocks = tl.cdiv(valid, BLOCK)
    pid_b = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        ptrs = parts_ptr + tl.cast(p, tl.int64) * stride_part + pid_b * stride_sb + offs
        acc += tl.load(ptrs, mask=offs < valid, other=0.0)
    tl.store(sum_ptr + pid_b * stride_xb + offs, acc.to(sum_ptr.dtype.element_ty), mask=offs < valid)


def selective_scan_bwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    starts: torch.Tensor,
    dout: torch.Tensor,
    dstate: torch.Tensor | None,
    zoh: bool,
    group: int,
) -> tuple[torch.Tensor, ...]:
    """du, ddelta, dA, dB, dC, dD, dz (the last two empty where there is none) and the gradient of the initial state."""
    batch, _, E = u.shape
    N, groups = A.shape[1], starts.shape[1]
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C))
    dz = torch.empty(0 if z is None else z.shape, dtype=u.dtype if z is None else z.dtype, device=u.device)
    dbefore = torch.zeros(batch, E, N, device=u.device) if dstate is None else dstate.clone()
    dA = torch.zeros(starts.shape, device=u.device)
    dD = torch.zeros(batch, groups, 0 if D is None else E, device=u.device)
    if u.numel():
        ends = _ends(delta, A, C, z, dout, dstate, starts, group)
        gradients = (du, ddelta, dA, dB, dC, dD, dz, dbefore)
        _scan(u, delta, A, B, C, D, z, starts, ends, dout, gradients, zoh, group)
    dA = dA.sum((0, 1), dtype=torch.float64).mT.to(A.dtype).contiguous()
    dD = dD.sum((0, 1), dtype=torch.float64).to(u.dtype if D is None else D.dtype)
    return du, ddelta, dA, dB, dC, dD, dz, dbefore


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _ends(delta, A, C, z, dout, dstate, starts, group) -> torch.Tensor:
    """The gradient of the state after every group, [B, groups, N, E]."""
    batch, groups, N, E = starts.shape
    arch = architecture(dout)
    ends = torch.empty_like(starts)
    ends[:, -1] = 0 if dstate is None else dstate.mT
    if groups == 1:
        return ends
    lengths = torch.empty(batch, groups, E, device=starts.device)
    BLOCK_N, BLOCK_E, num_warps = tile(N, arch, 16)
    _group_gradients_kernel[(triton.cdiv(E, BLOCK_E) * (groups - 1) * batch,)](
        delta, A, C, z, dout, ends, lengths,
        *delta.stride(), *A.stride(), *C.stride(), *_strides(z), *dout.stride(),
        groups, dout.shape[1], N, E,
        GROUP=group, BLOCK_N=BLOCK_N, BLOCK_E=BLOCK_E, SPAN=SPAN, num_warps=num_warps, enable_fp_fusion=True,
    )
    carry(ends, lengths, A, arch, reverse=True)
    return ends


def _scan(u, delta, A, B, C, D, z, starts, ends, dout, gradients, zoh, group) -> None:
    batch, T, E = u.shape
    groups, N = starts.shape[1:3]
    du, ddelta, dA, dB, dC, dD, dz, dbefore = gradients
    # few states leave nothing for a second warp
    per_lane, warps = (4, 1) if N <= 4 else (4, 2) if N <= 32 else (2, 2)
    BLOCK_N, BLOCK_E, num_warps = tile(N, architecture(u), per_lane, warps)
    blocks = triton.cdiv(E, BLOCK_E)
    options = {
        "ZOH": zoh, "GROUP": group, "BLOCK_N": BLOCK_N, "BLOCK_E": BLOCK_E, "SPAN": SPAN,
        "num_warps": num_warps, "enable_fp_fusion": True,
    }
    step = max(1, min(groups, WORKSPACE // (batch * N * E * (group // SPAN))))
    for first in range(0, groups, step):
        count = min(step, groups - first)
        sizes = (first, count, groups, T, N, E)
        states = torch.empty(batch, count, group // SPAN, N, E, device=u.device)
        parts = torch.empty(2, blocks, batch, count * group, N, device=u.device)
        grid = (blocks * count * batch,)
        _states_kernel[grid](
            u, delta, A, B, starts, states, *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *sizes, **options
        )
        _selective_scan_bwd_kernel[grid](
            u, delta, A, B, C, D, z, states, ends, dout, du, ddelta, dA, *parts, dD, dz, dbefore,
            *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
            0 if D is None else D.stride(0), *_strides(z), *dout.stride(), *sizes, **options,
        )
        for part, x in zip(parts, (dB, dC), strict=True):
            tokens = x[:, first * group : (first + count) * group]
            valid = tokens.shape[1] * N
            _sum_parts_kernel[(triton.cdiv(valid, 1024) * batch,)](
                part, tokens, blocks, valid, part.stride(0), part.stride(1), x.stride(0), BLOCK=1024
            )

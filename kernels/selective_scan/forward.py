"""Selective scan: the diagonal state-space recurrence of S4D and S6.

    h_t = e^{Δ_t A} h_{t−1} + B̄_t u_t,  out_t = (Σ_n C_tn h_tn + D u_t)·silu(z_t)
    zoh: B̄ = (e^{ΔA} − 1)/A·B, ΔB where A = 0; euler: B̄ = ΔB

Shapes: u, delta, z [B, T, E], A [E, N], B and C [B, T, N], D [E], any strides; out [B, T, E], state [B, E, N] and the
states before every group of tokens, starts [B, groups, N, E], float32.
Saved by forward: starts, 4·N / group bytes a token and channel (1 at N = 16 and groups of 64, beside 6 of u, delta and
out in a 16-bit dtype).
Precision: float32 states and sums, decays in base 2. Groups of tokens run side by side in three passes: what each adds
to a state of 0, the carry over groups in order, the scan itself from each group's start. The N states of a channel stay
in one lane's registers up to N = 16, under zoh up to 8.
Cost: two exp2 a token, channel and state (one within the first group), 10 flops under euler and 30 under zoh beside
them; u, delta and B are read twice, C, z and out moved once. At N = 16 an H200 (4.8 TB/s; 16 exp2 a clock on each of
132 SMs at 1.755 GHz) needs 8.6 ps a token and channel for the exponentials and 2.1 ps for the 10 bytes; the
instructions issued, four a clock, take 11 ps under euler and 24 ps under zoh, so it is they that bound it.
"""


import torch
import triton
import triton.language as tl

from .._primitives import architecture
from ._groups import carry, discretize, gate, load_rates, load_rows, place, store_rows, tile

# states a lane holds, fewer where each step takes more
PER_LANE = {"euler": 16, "zoh": 8}


@triton.jit(do_not_specialize=["T", "E"])
def _group_ends_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, starts_ptr, lengths_ptr,
    stride_ub, stride_ut, stride_ue,
    stride_db, stride_dt, stride_de,
    stride_ae, stride_an,
    stride_bb, stride_bt, stride_bn,
    groups, T, N, E,
    ZOH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):
    """Of every group but the last, which is full: its state from 0, where the next one's start belongs, and ΣΔ."""
    pid_e, pid_g, pid_b = place(E, groups - 1, BLOCK_E)
    offs_n, offs_e = tl.arange(0, BLOCK_N).to(tl.int64), (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    rate, inverse = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    u_ptr += pid_b * stride_ub
    delta_ptr += pid_b * stride_db
    B_ptr += pid_b * stride_bb
    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    length = tl.zeros([BLOCK_E], tl.float32)
    first = pid_g * GROUP
    for t in range(first, first + GROUP, UNROLL):
        us = load_rows(u_ptr, t, T, offs_e, E, stride_ut, stride_ue, UNROLL)
        deltas = load_rows(delta_ptr, t, T, offs_e, E, stride_dt, stride_de, UNROLL)
        bs = load_rows(B_ptr, t, T, offs_n, N, stride_bt, stride_bn, UNROLL)
        for i in tl.static_range(UNROLL):
            decay, held, _ = discretize(deltas[i], rate, inverse, ZOH)
            h = h * decay + held * us[i][None, :] * bs[i][:, None]  # [BLOCK_N, BLOCK_E]
            length += deltas[i]
    mask_e = offs_e < E
    tl.store(lengths_ptr + (pid_b * groups + pid_g) * E + offs_e, length, mask=mask_e)
    next_ptrs = starts_ptr + ((pid_b * groups + pid_g + 1) * N + offs_n[:, None]) * E + offs_e[None, :]
    tl.store(next_ptrs, h, mask=(offs_n[:, None] < N) & mask_e[None, :])


@triton.jit(do_not_specialize=["T", "E"])
def _selective_scan_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, starts_ptr, out_ptr, state_ptr,
    stride_ub, stride_ut, stride_ue,
    stride_db, stride_dt, stride_de,
    stride_ae, stride_an,
    stride_bb, stride_bt, stride_bn,
    stride_cb, stride_ct, stride_cn,
    stride_Db,
    stride_zb, stride_zt, stride_ze,
    groups, T, N, E,
    ZOH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):
    pid_e, pid_g, pid_b = place(E, groups, BLOCK_E)
    offs_n, offs_e = tl.arange(0, BLOCK_N).to(tl.int64), (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    mask_e = offs_e < E
    mask = (offs_n[:, None] < N) & mask_e[None, :]
    rate, inverse = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    u_ptr += pid_b * stride_ub
    delta_ptr += pid_b * stride_db
    B_ptr += pid_b * stride_bb
    C_ptr += pid_b * stride_cb
    out_ptr += pid_b * T * E
    if D_ptr is not None:
        skip = tl.load(D_ptr + offs_e * stride_Db, mask=mask_e, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z_ptr += pid_b * stride_zb
    start_ptrs = starts_ptr + ((pid_b * groups + pid_g) * N + offs_n[:, None]) * E + offs_e[None, :]
    h = tl.load(start_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_E]
    first = pid_g * GROUP
    for t in range(first, tl.minimum(first + GROUP, T), UNROLL):
        us = load_rows(u_ptr, t, T, offs_e, E, stride_ut, stride_ue, UNROLL)
        deltas = load_rows(delta_ptr, t, T, offs_e, E, stride_dt, stride_de, UNROLL)
        bs = load_rows(B_ptr, t, T, offs_n, N, stride_bt, stride_bn, UNROLL)
        cs = load_rows(C_ptr, t, T, offs_n, N, stride_ct, stride_cn, UNROLL)
        if z_ptr is not None:
            zs = load_rows(z_ptr, t, T, offs_e, E, stride_zt, stride_ze, UNROLL)
        ys = ()
        for i in tl.static_range(UNROLL):
            decay, held, _ = discretize(deltas[i], rate, inverse, ZOH)
            h = h * decay + held * us[i][None, :] * bs[i][:, None]
            y = tl.sum(h * cs[i][:, None], 0)  # [BLOCK_E]
            if D_ptr is not None:
                y += skip * us[i]
            if z_ptr is not None:
                y *= gate(zs[i])[0]
            ys = ys + (y,)
        store_rows(out_ptr, ys, t, T, offs_e, E, UNROLL)
    if pid_g == groups - 1:
        state_ptrs = state_ptr + (pid_b * E + offs_e[None, :]) * N + offs_n[:, None]
        tl.store(state_ptrs, h, mask=mask)


def selective_scan_fwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    zoh: bool,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, the last state and the states before every group of tokens."""
    batch, T, E = u.shape
    N, groups = A.shape[1], triton.cdiv(T, group)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    state = torch.empty(batch, E, N, dtype=torch.float32, device=u.device)
    starts = torch.empty(batch, groups, N, E, dtype=torch.float32, device=u.device)
    before = torch.zeros_like(state) if initial_state is None else initial_state
    if out.numel() == 0:
        return out, state.copy_(before), starts
    starts[:, 0] = before.mT
    arch = architecture(u)
    BLOCK_N, BLOCK_E, num_warps = tile(N, arch, PER_LANE["zoh" if zoh else "euler"])
    blocks = triton.cdiv(E, BLOCK_E)
    options = {
        "ZOH": zoh, "GROUP": group, "BLOCK_N": BLOCK_N, "BLOCK_E": BLOCK_E,
        # tokens whose rows are loaded before the first is used
        "UNROLL": 2 if N <= 32 else 1,
        "num_warps": num_warps, "enable_fp_fusion": True,
    }
    if groups > 1:
        lengths = torch.empty(batch, groups, E, dtype=torch.float32, device=u.device)
        _group_ends_kernel[(blocks * (groups - 1) * batch,)](
            u, delta, A, B, starts, lengths,
            *u.stride(), *delta.stride(), *A.stride(), *B.stride(),
            groups, T, N, E, **options,
        )
        carry(starts, lengths, A, arch, reverse=False)
    _selective_scan_kernel[(blocks * groups * batch,)](
        u, delta, A, B, C, D, z, starts, out, state,
        *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
        0 if D is None else D.stride(0), *((0, 0, 0) if z is None else z.stride()),
        groups, T, N, E, **options,
    )
    return out, state, starts

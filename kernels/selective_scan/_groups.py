"""What both directions of the selective scan share: tiles, a step's decay and input weight, the carry over groups.

Tiles are [BLOCK_N, BLOCK_E]. A token past T loads as zeros: a step of length 0, which changes no state.
"""


from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._primitives import LOG2E

# below this |ΔA| / log 2 the derivative of (e^{ΔA} − 1)/A by A is a polynomial: its closed form cancels
NEAR = tl.constexpr(0.72)

class Tile(NamedTuple):
    BLOCK_N: int
    BLOCK_E: int
    num_warps: int


def tile(N: int, arch: int, per_lane: int, warps: int = 1) -> Tile:
    """All N states of as many channels as give each lane per_lane states, and no more channels than a warp has lanes.

    arch is `architecture`'s.
    """
    lanes = 32 if arch else 64
    BLOCK_N = triton.next_power_of_2(N)
    room = lanes * warps * per_lane
    return Tile(BLOCK_N, max(1, min(lanes, room // BLOCK_N)), max(warps, warps * BLOCK_N // room))


@triton.jit
def load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an):
    """A in units of log 2, and 1 / A."""
    ptrs = A_ptr + offs_e[None, :] * stride_ae + offs_n[:, None] * stride_an
    A = tl.load(ptrs, mask=(offs_n[:, None] < N) & (offs_e[None, :] < E), other=-1.0).to(tl.float32)
    return A * LOG2E, 1.0 / tl.where(A == 0, -1.0, A)


@triton.jit
def load_rows(ptr, t, T, offs, count, stride_t, stride_x, ROWS: tl.constexpr):
    """Rows t … t + ROWS − 1 of a [T, count] matrix in float32, zeros beyond it: a tuple of [len(offs)]."""
    rows = ()
    for i in tl.static_range(ROWS):
        row = tl.cast(t + i, tl.int64)
        ptrs = ptr + row * stride_t + offs * stride_x
        rows = rows + (tl.load(ptrs, mask=offs < tl.where(row < T, count, 0), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def store_rows(ptr, rows, t, T, offs, count, ROWS: tl.constexpr):
    """rows, as load_rows gives them, into a contiguous [T, count] matrix."""
    for i in tl.static_range(ROWS):
        row = tl.cast(t + i, tl.int64)
        tl.store(ptr + row * count + offs, rows[i].to(ptr.dtype.element_ty), mask=offs < tl.where(row < T, count, 0))


@triton.jit
def discretize(delta, rate, inverse, ZOH: tl.constexpr):
    """Of one step: e^{ΔA}; what B u is multiplied by; for zoh the derivative of that by A."""
    x = rate * delta[None, :]
    decay = tl.exp2(x)
    if ZOH:
        # log 2 · d/dy (e^y − 1)/y at y = x log 2: Chebyshev's interpolation on |x| ≤ 0.75, good to 2e-8
        slope = (1.3449558537e-5 * x + 1.3319119170e-4) * x + 1.1110934429e-3
        slope = ((slope * x + 7.6941763982e-3) * x + 4.1628085077e-2) * x + 1.6015103459e-1
        slope = slope * x + 3.4657359123e-1
        near = tl.abs(x) < NEAR
        held = tl.where(near, (decay - x * slope) * delta[None, :], (decay - 1) * inverse)
        by_rate = tl.where(near, slope * (delta * delta * LOG2E)[None, :], (decay * delta[None, :] - held) * inverse)
    else:
        held = delta[None, :]
        by_rate = held  # not read
    return decay, held, by_rate


@triton.jit
def gate(z):
    """silu(z) and its derivative."""
    s = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
    return z * s, s * (1.0 + z * (1.0 - s))


@triton.jit
def place(E, groups, BLOCK_E: tl.constexpr):
    """Of a program: which block of channels, which group and which sequence; the channels, in 64 bits."""
    blocks = tl.cdiv(E, BLOCK_E)
    pid = tl.program_id(0)
    pid_e = pid % blocks
    return pid_e, pid // blocks % groups, (pid // blocks // groups).to(tl.int64)


@triton.jit(do_not_specialize=["steps", "E"])
def _carry_kernel(
    states_ptr, length_ptr, A_ptr,
    stride_ae, stride_an,
    stride_sb, stride_sg, stride_lb, stride_lg,
    steps, N, E,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):
    """From a group to the one stride_sg on, steps times: state ← state + e^{A·length} · the state before it."""
    pid_e, _, pid_b = place(E, 1, BLOCK_E)
    offs_n, offs_e = tl.arange(0, BLOCK_N).to(tl.int64), (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    mask = (offs_n[:, None] < N) & (offs_e[None, :] < E)
    rate, _ = load_rates(A_ptr, offs_n, offs_e, N, E, stride_ae, stride_an)
    ptrs = states_ptr + pid_b * stride_sb + offs_n[:, None] * E + offs_e[None, :]
    length_ptr += pid_b * stride_lb
    state = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_E]
    for g in range(0, steps, UNROLL):
        decays, added = (), ()
        for i in tl.static_range(UNROLL):
            step = tl.cast(g + i, tl.int64)
            channels = tl.where(step < steps, E, 0)
            length = tl.load(length_ptr + step * stride_lg + offs_e, mask=offs_e < channels, other=0.0)
            decays = decays + (tl.exp2(rate * length[None, :]),)
            reached = mask & (offs_e[None, :] < channels)
            added = added + (tl.load(ptrs + (step + 1) * stride_sg, mask=reached, other=0.0),)
        for i in tl.static_range(UNROLL):
            step = tl.cast(g + i, tl.int64)
            state = state * decays[i] + added[i]
            channels = tl.where(step < steps, E, 0)
            tl.store(ptrs + (step + 1) * stride_sg, state, mask=mask & (offs_e[None, :] < channels))


def carry(states: torch.Tensor, lengths: torch.Tensor, A: torch.Tensor, arch: int, *, reverse: bool) -> None:
    """Turn local end states [B, groups, N, E] into true ones, in order; lengths [B, groups, E] are sums of Δ.

    states holds in its first group (its last, if reverse) the true state, in the others what their neighbour's tokens
    alone lead to; lengths are those of the group that leads from one to the next.
    """
    B, groups, N, E = states.shape
    first = groups - 1 if reverse else 0
    sign = -1 if reverse else 1
    BLOCK_N, BLOCK_E, num_warps = tile(N, arch, 4)
    _carry_kernel[(triton.cdiv(E, BLOCK_E) * B,)](
        states[:, first:], lengths[:, first:], A, *A.stride(),
        states.stride(0), sign * states.stride(1), lengths.stride(0), sign * lengths.stride(1),
        groups - 1, N, E,
        BLOCK_N=BLOCK_N, BLOCK_E=BLOCK_E, UNROLL=8, num_warps=num_warps, enable_fp_fusion=True,
    )

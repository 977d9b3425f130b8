"""The state that every group of tokens starts from, of long sequences: two of the three phases of the prefix integral.

    S = Σ_s e^{G_stop − G_s} u_s b_s c_sᵀ,  z = Σ_s e^{G_stop − G_s} u_s β_s b_s   over a group, then, in order,
    start_{n+1} = e^{G_n} start_n + (S_n, z_n)

Shapes: b [B, H, T, K] under its feature map, c [B, H, T, V], decay [B, H, T] or, on the axis of b, [B, H, T, K] or
None, u and β = −delta [B, H, T] float32 or a scale and 1 or 0; starts [groups, H, K·V + K] float32, S then z.
Reversed: from the last group to the first, e^{G_s − G_before} in place of e^{G_stop − G_s}.
Precision: operands as in product.py, float32 states. The log-weights of a chunk are sums over the tokens after each
token, never differences of sums, so that −80 a token costs no digit.
Cost: 2·K·V flops a token and head, b and c read once more, 16·K·V / tokens bytes of states written and read twice.
"""

import torch
import triton
import triton.language as tl

from .._primitives import LOG2E, architecture
from ._groups import (
    Factor,
    Groups,
    States,
    Tiles,
    advance,
    load_columns,
    load_factor,
    locate,
    multiply,
    operand,
    padded,
)

ELEMENTS = 512  # of a state, a program of the scan


def launch(K: int, V: int, itemsize: int, arch: int, channels: bool) -> Tiles:
    """Tiles by the padded widths of b and c and by dtype, narrower with a decay a channel."""
    if arch == 0 or itemsize == 4:
        return Tiles(32, min(K, 32), min(V, 32), 4, 1)
    if arch not in (90, 100):
        return Tiles(32, min(K, 64), min(V, 64), 4, 2)
    return Tiles(64, min(K, 128 if arch == 90 and not channels else 64), min(V, 64), 4, 2)


@triton.jit(do_not_specialize=["T", "scale"])
def _group_states_kernel(
    b_ptr, c_ptr, decay_ptr, unit_ptr, delta_ptr, segment_ptr, first_ptr, bounds_ptr, state_ptr, total_ptr,
    stride_bb, stride_bh,
    stride_cb, stride_ch,
    stride_gb, stride_gh, stride_gt,
    H, SHARE_B, SHARE_C, T, each, tokens, scale,
    ROW_B: tl.constexpr, ROW_C: tl.constexpr, ROW_G: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    FEATURE: tl.constexpr, CHANNELS: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
):
    tiles_k, tiles_w = tl.cdiv(K, BLOCK_K), tl.maximum(tl.cdiv(V, BLOCK_W), 1)
    pid = tl.program_id(0)
    first_w, first_k = pid % tiles_w * BLOCK_W, pid // tiles_w % tiles_k * BLOCK_K
    pid_h, n = pid // (tiles_w * tiles_k) % H, (pid // (tiles_w * tiles_k * H)).to(tl.int64)
    _, batch, place, count, start, stop = locate(segment_ptr, first_ptr, bounds_ptr, n, each, tokens, T)
    # nobody starts from the state of the group that comes last
    if (place >= count) | (place == (0 if REVERSE else count - 1)):
        return
    INPUT: tl.constexpr = c_ptr.dtype.element_ty
    b_ptr += batch * stride_bb + pid_h // SHARE_B * stride_bh
    c_ptr += batch * stride_cb + pid_h // SHARE_C * stride_ch
    decay_ptr = advance(decay_ptr, batch * stride_gb + pid_h * stride_gh)
    unit_ptr = advance(unit_ptr, (batch * H + pid_h) * T)
    delta_ptr = advance(delta_ptr, (batch * H + pid_h) * T)

    offs_k, offs_w = first_k + tl.arange(0, BLOCK_K), first_w + tl.arange(0, BLOCK_W)
    s = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    chunks = tl.cdiv(stop - start, CHUNK)
    for i in range(chunks):
        t = start + (chunks - 1 - i if REVERSE else i) * CHUNK
        # the token nearest to where the state is wanted comes first: a weight is a sum over those before it
        offs = tl.arange(0, CHUNK) if REVERSE else CHUNK - 1 - tl.arange(0, CHUNK)
        rows = t + offs
        exists = rows < stop
        b = load_factor(b_ptr, t, offs, exists, first_k, ROW_B, K, BLOCK_K, FEATURE)  # [CHUNK, BLOCK_K]
        c = load_factor(c_ptr, t, offs, exists, first_w, ROW_C, V, BLOCK_W, "identity")
        if decay_ptr is not None:
            later = offs if REVERSE else offs + 1
            within = (t + later < stop) & (later < CHUNK)
            if CHANNELS:
                g = load_columns(decay_ptr, t, later, within, first_k, ROW_G, K, BLOCK_K)
            else:
                g = tl.load(decay_ptr + (t + later).to(tl.int64) * stride_gt, mask=within, other=0.0)
            g = g.to(tl.float32) * LOG2E
            passed = tl.sum(g, 0)
            if not REVERSE:
                head = decay_ptr + tl.cast(t, tl.int64) * stride_gt
                if CHANNELS:
                    passed += tl.load(head + offs_k, mask=offs_k < K, other=0.0).to(tl.float32) * LOG2E
                else:
                    passed += tl.load(head).to(tl.float32) * LOG2E
            total += passed
            weight = tl.exp2(tl.cumsum(g, 0))
            b = b * (weight if CHANNELS else weight[:, None])
            s *= tl.exp2(passed)[:, None] if CHANNELS else tl.exp2(passed)
            z *= tl.exp2(passed)
        if unit_ptr is not None:
            b = b * tl.load(unit_ptr + rows, mask=exists, other=0.0)[:, None]
        if Z:
            if delta_ptr is None:
                z += tl.sum(b.to(tl.float32), 0)
            else:
                z -= tl.sum(b * tl.load(delta_ptr + rows, mask=exists, other=0.0)[:, None], 0)
        s += multiply(tl.trans(operand(b, INPUT)), c, INPUT)

    state = state_ptr + (n * H + pid_h) * (K * V + K)
    mask_k = offs_k < K
    ptrs = state + offs_k[:, None] * V + offs_w[None, :]
    tl.store(ptrs, s * scale, mask=mask_k[:, None] & (offs_w[None, :] < V))
    if first_w == 0:
        tl.store(state + K * V + offs_k, z * scale, mask=mask_k)
        if CHANNELS:
            tl.store(total_ptr + (n * H + pid_h) * K + offs_k, total, mask=mask_k)
        elif decay_ptr is not None:
            # the same from every tile
            tl.store(total_ptr + n * H + pid_h, tl.max(total, 0))


@triton.jit
def _scan_kernel(
    state_ptr, total_ptr, s0_ptr, z0_ptr, first_ptr,
    H, each, K: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr, ELEMENTS: tl.constexpr,
):
    blocks = tl.cdiv(K * V + K, ELEMENTS)
    pid = tl.program_id(0)
    offs = pid % blocks * ELEMENTS + tl.arange(0, ELEMENTS)
    pid_h, sequence = pid // blocks % H, (pid // (blocks * H)).to(tl.int64)
    if first_ptr is None:
        first, count = (sequence * each).to(tl.int32), each
    else:
        first = tl.load(first_ptr + sequence)
        count = tl.load(first_ptr + sequence + 1) - first
    in_s, in_z = offs < K * V, (offs >= K * V) & (offs < K * V + K)
    exists = offs < K * V + K
    channel = tl.where(in_s, offs // V, offs - K * V)

    x = tl.zeros([ELEMENTS], tl.float32)
    if s0_ptr is not None:
        x += tl.load(s0_ptr + (sequence * H + pid_h) * (K * V) + offs, mask=in_s, other=0.0)
    if z0_ptr is not None:
        x += tl.load(z0_ptr + (sequence * H + pid_h) * K + channel, mask=in_z, other=0.0)
    for i in range(count - 1):
        n = (first + (count - 1 - i if REVERSE else i)).to(tl.int64) * H + pid_h
        ptrs = state_ptr + n * (K * V + K) + offs
        local = tl.load(ptrs, mask=exists, other=0.0)
        tl.store(ptrs, x, mask=exists)
        if CHANNELS:
            x *= tl.exp2(tl.load(total_ptr + n * K + channel, mask=exists, other=0.0))
        elif total_ptr is not None:
            x *= tl.exp2(tl.load(total_ptr + n))
        x += local
    last = (first + (0 if REVERSE else count - 1)).to(tl.int64) * H + pid_h
    tl.store(state_ptr + last * (K * V + K) + offs, x, mask=exists)


def group_states(
    b: Factor,
    c: Factor,
    decay: torch.Tensor | None,
    unit: torch.Tensor | None,
    delta: torch.Tensor | None,
    scale: float,
    groups: Groups,
    heads: int,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    *,
    z: bool,
    reverse: bool = False,
) -> States:
    """The states that groups start from; those given where every sequence has one group."""
    K, V = b.x.shape[3], c.x.shape[3]
    s0, z0 = (None if x is None else x.contiguous() for x in (s0, z0))
    if groups.each == 1 or groups.count * heads == 0:
        return States(s0, z0, K * V, K)
    channels = decay is not None and decay.dim() == 4
    width = K * V + K
    state = torch.empty(groups.count, heads, width, dtype=torch.float32, device=b.x.device)
    shape = (groups.count, heads, K) if channels else (groups.count, heads)
    total = None if decay is None else torch.empty(shape, dtype=torch.float32, device=b.x.device)
    tiles = launch(padded(K), padded(V), b.x.element_size(), architecture(b.x), channels)
    grid = groups.count * heads * triton.cdiv(K, tiles.BLOCK_K) * max(1, triton.cdiv(V, tiles.BLOCK_W))
    _group_states_kernel[(grid,)](
        b.x, c.x, decay, unit, delta, *groups.tables, state, total, *b.heads, *c.heads,
        *((0, 0, 0) if decay is None else decay.stride()[:3]),
        heads, b.share, c.share, b.x.shape[2], groups.each, groups.tokens, scale,
        ROW_B=b.row, ROW_C=c.row, ROW_G=decay.stride(2) if channels else 0,
        K=K, V=V, FEATURE=b.feature, CHANNELS=channels, Z=z, REVERSE=reverse, **tiles._asdict(), enable_fp_fusion=True,
    )
    _scan_kernel[(groups.sequences * heads * triton.cdiv(width, ELEMENTS),)](
        state, total, s0, z0, groups.first, heads, groups.each,
        K=K, V=V, CHANNELS=channels, REVERSE=reverse, ELEMENTS=ELEMENTS, enable_fp_fusion=True,
    )
    return States(state, state.view(-1)[K * V :], width, width)

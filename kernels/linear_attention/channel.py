"""The prefix product with a decay a channel: product.py's four uses, in blocks of 16 tokens.

    inner, of out and dv: y_t = Σ_{s ≤ t} (Σ_d e^{G_td − G_sd} a_td b_sd) c_s + (e^{G_t} ⊙ a_t)·S,  S ← e^{G} ⊙ S + …
    outer, of dq and dk:  y_td = Σ_{s ≤ t} (a_t·b_s + α_t β_s) e^{G_td − G_sd} c_sd + e^{G_td} (a_t·S_d + α_t r_d)

Shapes: as in product.py; decay [B, H, T, K] on the inner axis or [B, H, T, W] on the outer, any strides; moments
y φ(own) [1, B, H, T, W] float32, an entry each.
Precision: as in product.py. A block's products are formed element by element, their log-weights summed up step by step
from the nearer token to the farther one: no difference of sums, so that −80 a token costs no digit, and no factor above
one. What a block reads from the state and writes to it is weighted the same way.
Cost a token and head: 16·K exp2 (inner, again for every tile of c) or 16·W (outer), 4·K·W flops on tensor cores; bound
by exp2, at 16 a clock and SM 128 clocks a token at K = 128: on an H200 0.6 ns beside 0.32 ns for the 1536 bytes of
bfloat16 q, k, v, out and float32 decays, so at most half of the bandwidth bound. Expected: 30 %.
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
    causal,
    divided,
    load_factor,
    load_state,
    load_unit,
    load_vector,
    locate,
    mapped,
    multiply,
    operand,
    padded,
    store_end,
    store_product,
)


def launch(K: int, W: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Tiles by the padded widths and by dtype: of an inner decay every tile of c costs its exponentials again."""
    D = max(K, W)
    if arch == 0:
        return Tiles(16, K, min(W, 32), 4, 1)
    if dtype == torch.float32:
        return Tiles(16, K, min(W, 32), 4, 1) if D <= 64 else Tiles(16, K, min(W, 16), 8, 1)
    if arch not in (90, 100):
        return Tiles(16, K, min(W, 64 if D <= 128 else 32), 8, 1)
    return Tiles(16, K, W if D <= 128 else min(W, 64), 4 if D <= 64 else 8, 1)


@triton.jit
def load_row(ptr, t, stop, first, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row in float32, 0 beyond its end and from stop on: [BLOCK]."""
    cols = tl.arange(0, BLOCK)
    width = tl.where(t < stop, WIDTH - first, 0)
    return tl.load(ptr + tl.cast(t, tl.int64) * ROW + first + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def step(near, far, g, j, offs, BEFORE: tl.constexpr, REVERSE: tl.constexpr):
    """Add the decay of row j to the log-weights between the rows and the next one paired with them, and to the others.

    BEFORE its pairs, going back in time, after them going forward: a row's own decay is not between it and itself.
    """
    if BEFORE == REVERSE:
        on = offs[:, None] < j if REVERSE else offs[:, None] >= j
        near += tl.where(on, g[None, :], 0.0)
        far += tl.where(on, 0.0, g[None, :])
    return near, far


@triton.jit
def paired(
    a, b_ptr, decay_ptr, t, stop, offs, ROW_B: tl.constexpr, ROW_G: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, FEATURE: tl.constexpr, INPUT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Decayed scores of a block, then log-weights of what its rows read and write, and its decays."""
    near, far = tl.zeros([CHUNK, BLOCK_K], tl.float32), tl.zeros([CHUNK, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    p = tl.zeros([CHUNK, CHUNK], tl.float32)
    cols = tl.arange(0, CHUNK)
    for i in tl.range(CHUNK, loop_unroll_factor=4 if BLOCK_K <= 128 else 1):
        j = i if REVERSE else CHUNK - 1 - i
        g = load_row(decay_ptr, t + j, stop, 0, ROW_G, K, BLOCK_K) * LOG2E
        total += g
        near, far = step(near, far, g, j, offs, True, REVERSE)
        # what lies beyond K or stop is 0 in a, or masked
        b = load_row(b_ptr, t + j, stop, 0, ROW_B, K, BLOCK_K)
        b = operand(mapped(b, FEATURE), INPUT).to(tl.float32)
        score = tl.sum(a * b[None, :] * tl.exp2(near), 1)
        p = tl.where(cols[None, :] == j, score[:, None], p)
        near, far = step(near, far, g, j, offs, False, REVERSE)
    return p, near, far, total


@triton.jit
def spread(
    p, c_ptr, decay_ptr, t, stop, first_w, offs, ROW_C: tl.constexpr, ROW_G: tl.constexpr,
    W: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr, FEATURE: tl.constexpr, INPUT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Scores of a block times the decayed rows of c that each row reads, log-weights and decays as in `paired`."""
    near, far = tl.zeros([CHUNK, BLOCK_W], tl.float32), tl.zeros([CHUNK, BLOCK_W], tl.float32)
    total = tl.zeros([BLOCK_W], tl.float32)
    y = tl.zeros([CHUNK, BLOCK_W], tl.float32)
    cols = tl.arange(0, CHUNK)
    for i in tl.range(CHUNK, loop_unroll_factor=1 if INPUT == tl.float16 else 2):
        j = i if REVERSE else CHUNK - 1 - i
        g = load_row(decay_ptr, t + j, stop, first_w, ROW_G, W, BLOCK_W) * LOG2E
        total += g
        near, far = step(near, far, g, j, offs, True, REVERSE)
        c = load_row(c_ptr, t + j, stop, first_w, ROW_C, W, BLOCK_W)
        c = operand(mapped(c, FEATURE), INPUT).to(tl.float32)
        score = tl.sum(tl.where(cols[None, :] == j, p, 0.0), 1)
        seen = offs[:, None] <= j if REVERSE else offs[:, None] >= j
        y += tl.where(seen, score[:, None] * tl.exp2(near) * c[None, :], 0.0)
        near, far = step(near, far, g, j, offs, False, REVERSE)
    return y, near, far, total


@triton.jit(do_not_specialize=["T", "scale"])
def _channel_kernel(
    a_ptr, b_ptr, c_ptr, decay_ptr, unit_ptr, delta_ptr, own_ptr, state_ptr, vector_ptr,
    segment_ptr, first_ptr, bounds_ptr, y_ptr, den_ptr, moment_ptr, end_ptr, end_vector_ptr,
    stride_ab, stride_ah,
    stride_bb, stride_bh,
    stride_cb, stride_ch,
    stride_ob, stride_oh,
    stride_gb, stride_gh,
    stride_sn, stride_vn, stride_sk, stride_sw,
    H, SHARE_A, SHARE_B, SHARE_C, SHARE_O, T, each, tokens, scale,
    ROW_A: tl.constexpr, ROW_B: tl.constexpr, ROW_C: tl.constexpr, ROW_O: tl.constexpr, ROW_G: tl.constexpr,
    K: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    FEATURE_A: tl.constexpr, FEATURE_B: tl.constexpr, FEATURE_C: tl.constexpr, FEATURE_O: tl.constexpr,
    OUTER: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
):
    tiles = tl.maximum(tl.cdiv(W, BLOCK_W), 1)
    pid_w, pid_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    n = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    sequence, batch, place, count, start, stop = locate(segment_ptr, first_ptr, bounds_ptr, n, each, tokens, T)
    if place >= count:
        return
    INPUT: tl.constexpr = c_ptr.dtype.element_ty
    first_w, head = pid_w * BLOCK_W, (batch * H + pid_h) * T
    a_ptr += batch * stride_ab + pid_h // SHARE_A * stride_ah
    b_ptr += batch * stride_bb + pid_h // SHARE_B * stride_bh
    c_ptr += batch * stride_cb + pid_h // SHARE_C * stride_ch
    own_ptr = advance(own_ptr, batch * stride_ob + pid_h // SHARE_O * stride_oh)
    decay_ptr += batch * stride_gb + pid_h * stride_gh
    s = load_state(
        advance(state_ptr, (n * H + pid_h) * stride_sn), stride_sk, stride_sw, first_w, K, W, BLOCK_K, BLOCK_W)
    offs_v = first_w + tl.arange(0, BLOCK_W) if OUTER else tl.arange(0, BLOCK_K)
    WIDTH: tl.constexpr = W if OUTER else K
    vector = load_vector(advance(vector_ptr, (n * H + pid_h) * stride_vn), offs_v, WIDTH)

    chunks = tl.cdiv(stop - start, CHUNK)
    for i in tl.range(chunks, disable_licm=True):
        t, offs = start + (chunks - 1 - i if REVERSE else i) * CHUNK, tl.arange(0, CHUNK)
        exists = offs < stop - t
        unit = load_unit(advance(unit_ptr, head + t), offs, exists, scale)
        delta = load_unit(advance(delta_ptr, head + t), offs, exists, 0.0)
        a = load_factor(a_ptr, t, offs, exists, 0, ROW_A, K, BLOCK_K, FEATURE_A)  # [CHUNK, BLOCK_K]
        b = load_factor(b_ptr, t, offs, exists, 0, ROW_B, K, BLOCK_K, FEATURE_B)
        c = load_factor(c_ptr, t, offs, exists, first_w, ROW_C, W, BLOCK_W, FEATURE_C)
        of_row = unit if REVERSE else tl.full([CHUNK], 1.0, tl.float32)
        if OUTER:
            p = multiply(a, tl.trans(b), INPUT) - (delta[None, :] if REVERSE else delta[:, None])  # [CHUNK, CHUNK]
            y, read, write, total = spread(
                p * of_row[None, :], c_ptr, decay_ptr, t, stop, first_w, offs, ROW_C, ROW_G,
                W, BLOCK_W, CHUNK, FEATURE_C, INPUT, REVERSE)
            x = multiply(a, operand(s, INPUT), INPUT)  # [CHUNK, BLOCK_W]
            x += vector[None, :] if REVERSE else -delta[:, None] * vector[None, :]
            y += x * tl.exp2(read)
            written = c * tl.exp2(write) * of_row[:, None]
            s = s * tl.exp2(total)[None, :] + multiply(tl.trans(b), operand(written, INPUT), INPUT)
            # β is 1 or, of the reversed product, −δ
            added = tl.sum(written * -delta[:, None] if REVERSE else written, 0)
        else:
            p, read, write, total = paired(
                a.to(tl.float32), b_ptr, decay_ptr, t, stop, offs, ROW_B, ROW_G,
                K, BLOCK_K, CHUNK, FEATURE_B, INPUT, REVERSE)
            p = operand(tl.where(causal(offs, REVERSE), p * of_row[None, :], 0.0), INPUT)
            x = a * tl.exp2(read)
            y = multiply(operand(x, INPUT), operand(s, INPUT), INPUT) + multiply(p, c, INPUT)
            if NORMALIZE:
                den = tl.sum(x * vector[None, :], 1) + tl.sum(p.to(tl.float32), 1)
                y = divided(y, den)
                if pid_w == 0:
                    tl.store(den_ptr + head + t + offs, den, mask=exists)
            written = b * tl.exp2(write) * of_row[:, None]
            s = s * tl.exp2(total)[:, None] + multiply(tl.trans(operand(written, INPUT)), c, INPUT)
            added = tl.sum(written, 0)
        vector = vector * tl.exp2(total) + added
        if not REVERSE and not NORMALIZE:
            y *= unit[:, None]
        store_product(
            y, advance(y_ptr, head * W), own_ptr, advance(moment_ptr, head * W), t, offs, exists, first_w,
            ROW_O, W, BLOCK_W, FEATURE_O, True)
    if place == (0 if REVERSE else count - 1):
        n = sequence * H + pid_h
        store_end(s, vector, end_ptr, end_vector_ptr, n, first_w, offs_v, WIDTH, K, W, BLOCK_K, BLOCK_W)


def channel_product(
    a: Factor,
    b: Factor,
    c: Factor,
    decay: torch.Tensor,
    unit: torch.Tensor | None,
    delta: torch.Tensor | None,
    scale: float,
    groups: Groups,
    states: States,
    y: torch.Tensor,
    *,
    vector: str | None = None,
    across: bool = False,
    reverse: bool = False,
    den: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    end_vector: torch.Tensor | None = None,
    own: Factor | None = None,
    moment: bool = False,
) -> torch.Tensor | None:
    """`product` with a decay a channel, on the outer axis where states are read across."""
    B, H, T, W = y.shape
    K = a.x.shape[3]
    tiles = launch(padded(K), padded(W), a.x.dtype, architecture(a.x))
    moments = torch.empty(1, B, H, T, W, dtype=torch.float32, device=y.device) if moment else None
    if groups.count * H == 0:
        return moments
    own = own or Factor(None)
    _channel_kernel[(groups.count * H * max(1, triton.cdiv(W, tiles.BLOCK_W)),)](
        a.x, b.x, c.x, decay, unit, delta, own.x, states.s, states.z if vector else None, *groups.tables,
        y, den, moments, end, end_vector,
        *a.heads, *b.heads, *c.heads, *own.heads, *decay.stride()[:2],
        states.stride_s, states.stride_z, *((1, K) if across else (W, 1)),
        H, a.share, b.share, c.share, own.share, T, groups.each, groups.tokens, scale,
        ROW_A=a.row, ROW_B=b.row, ROW_C=c.row, ROW_O=own.row, ROW_G=decay.stride(2),
        K=K, W=W, FEATURE_A=a.feature, FEATURE_B=b.feature, FEATURE_C=c.feature, FEATURE_O=own.feature,
        OUTER=across, NORMALIZE=den is not None, REVERSE=reverse, **tiles._asdict(),
        enable_fp_fusion=True,
    )
    return moments

"""The prefix product without decay or with one decay a token: one kernel, of which output and gradients are four uses.

    y_t = ρ_t · (Σ_{s ≤ t} e^{G_t − G_s} (a_t·b_s + α_t β_s) c_s + e^{G_t} (a_t·S + α_t r))
    S ← e^{G} S + Σ_s e^{G − G_s} b_s c_sᵀ,  r ← e^{G} r + Σ_s e^{G − G_s} β_s c_s
    reversed: y_t = Σ_{s ≥ t} e^{G_s − G_t} (a_t·b_s + β_s) u_s c_s + e^{G_end − G_t} (a_t·R + r)
    out  = (φq, φk, v), ρ = 1 / den or the scale, den_t = Σ_{s ≤ t} e^{G_t − G_s} (a_t·b_s) + e^{G_t} a_t·z
    dφq  = (dout, v, φk), α = −δ, β = 1, ρ = u;   with u = 1 / den or the scale and δ_t = dout_t·out_t or none,
    dφk  = reversed (v, dout, φq), β = −δ;   dv = reversed (φk, φq, dout)

Shapes: a, b [B, heads, T, K], c [B, heads, T, W], a head of a factor read by `share` query heads; decay [B, H, T], any
strides; unit u and delta δ [B, H, T] float32; states [n, H, K, W], or [n, H, W, K] read across, with z [n, H, K] along
the inner axis or r [n, H, W] along the outer, float32; y [B, H, T, W], times φ'(own) where own is given, then with
moments Σ_w y φ(own) [tiles, B, H, T] float32, of which the decay's gradient is formed.
Backward keeps q, k, v, out, den and the end state; group states are formed again, nothing is kept a chunk.
Precision: float32 states, sums and weights. Factors, weighted scores and a copy of the state meet the tensor cores in
bfloat16, or as TF32 where inputs are float16: its mantissa with float32's range, which neither a state nor a score over
den leaves. float32 inputs are multiplied exactly. 1 / den multiplies float32 results or scores, never a factor; z is
multiplied in three parts, to its last digit. A difference of cumulated decays is one exp2; float32 inputs have theirs
summed and subtracted in float64.
A reversed product walks the same chunks from the last to the first: zeros on the right change no bit.
Cost a token and head: 2·C·(K + W) + 4·K·W flops in chunks of C tokens, C exp2 with a decay, (2·K + 2·W) · itemsize
bytes in one pass, half as much again and 16·K·W / tokens in groups. On an H200 at K = W = 128 in bfloat16, C = 64:
98 kflop and 1024 bytes, 0.21 ns at 4.8 TB/s and 0.10 ns at the peak of its tensor cores. Expected of that bound: 70 %
in one group, 50 to 55 % of it in several, whose own bound is 1664 bytes.
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
    multiply,
    operand,
    padded,
    product_vector,
    store_end,
    store_product,
)


def launch(K: int, W: int, dtype: torch.dtype, arch: int, decayed: bool, own: bool) -> Tiles:
    """Tiles by the padded widths and by dtype, CHUNK by no more than these; arch is `architecture`'s.

    What keeps registers: the weights of a decayed forward product, and own with its map.
    """
    D = max(K, W)
    if arch == 0:
        return Tiles(32 if D <= 128 else 16, K, min(W, 32), 4, 1)
    if dtype == torch.float32:
        if D <= 32:
            return Tiles(16, K, min(W, 16), 4, 1)
        return Tiles(16, K, min(W, 64 if D <= 64 else 32 if D <= 128 else 16), 8, 1)
    if arch not in (90, 100):
        return Tiles(32, K, min(W, 32 if own else 64), 8, 1) if D <= 128 else Tiles(16, K, min(W, 32), 8, 1)
    if dtype == torch.float16:
        if D > 128:
            return Tiles(16, K, min(W, 32), 8, 1)
        return Tiles(64, K, min(W, 32), 4, 1) if D <= 64 else Tiles(64, K, min(W, 16 if own else 32), 8, 1)
    if D <= 64:
        return Tiles(64, K, W, 8 if own else 4, 2)
    if D <= 128:
        return Tiles(64, K, min(W, 64), 8, 1) if decayed or own else Tiles(64, K, W, 8, 2)
    return Tiles(64, K, min(W, 16), 8, 2) if own else Tiles(64, K, min(W, 32), 8, 1)


@triton.jit(do_not_specialize=["T"])
def _cumulate_kernel(
    decay_ptr, segment_ptr, first_ptr, bounds_ptr, G_ptr,
    stride_gb, stride_gh, stride_gt,
    H, T, each, tokens,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):
    pid_h, n = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    _, batch, place, count, start, stop = locate(segment_ptr, first_ptr, bounds_ptr, n, each, tokens, T)
    if place >= count:
        return
    decay_ptr += batch * stride_gb + pid_h * stride_gh
    for t in range(start, stop, CHUNK * CHUNKS):
        rows = t + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        g = tl.load(decay_ptr + rows.to(tl.int64) * stride_gt, mask=rows < stop, other=0.0)
        G = tl.cumsum(g.to(tl.float64) * LOG2E, 1)  # [CHUNKS, CHUNK]
        tl.store(G_ptr + (batch * H + pid_h) * T + rows, G.to(G_ptr.dtype.element_ty), mask=rows < stop)


def cumulated(decay: torch.Tensor | None, q: torch.Tensor, V: int, groups: Groups) -> torch.Tensor | None:
    """The decays of each chunk summed up, in base 2: [B, H, T] float32, of which float32 inputs need float64."""
    if decay is None:
        return None
    T, H = decay.shape[2], decay.shape[1]
    G = torch.empty(decay.shape, dtype=torch.float64 if q.element_size() == 4 else torch.float32, device=q.device)
    if G.numel():
        chunk = launch(padded(q.shape[3]), padded(V), q.dtype, architecture(q), True, False).CHUNK
        _cumulate_kernel[(groups.count * H,)](
            decay, *groups.tables, G, *decay.stride(), H, T, groups.each, groups.tokens,
            CHUNK=chunk, CHUNKS=512 // chunk, enable_fp_fusion=True,
        )
    return G


@triton.jit
def chunk_decay(ptr, offs, exists, REVERSE: tl.constexpr):
    """G of a chunk's rows, read anew wherever it is needed: kept, it would fill the registers.

    A row beyond the last token weighs nothing where it is read; where it reads, whatever it reads is dropped.
    """
    return tl.load(ptr + offs, mask=exists, other=float("-inf") if REVERSE else 0.0)


@triton.jit
def scores(
    a, b, G_ptr, unit_ptr, delta_ptr, offs, exists, scale,
    CHUNK: tl.constexpr, INPUT: tl.constexpr, REVERSE: tl.constexpr,
):
    """Weights of a chunk's rows of c in each of its rows of y, an operand: [CHUNK, CHUNK]."""
    p = multiply(a, tl.trans(b), INPUT)
    if delta_ptr is not None:
        delta = load_unit(delta_ptr, offs, exists, 0.0)
        p -= delta[None, :] if REVERSE else delta[:, None]
    if G_ptr is not None:
        G = chunk_decay(G_ptr, offs, exists, REVERSE)
        x = G[None, :] - G[:, None] if REVERSE else G[:, None] - G[None, :]
        p *= tl.exp2(x.to(tl.float32))
    if REVERSE:
        p *= load_unit(unit_ptr, offs, exists, scale)[None, :]
    return operand(tl.where(causal(offs, REVERSE), p, 0.0), INPUT)


@triton.jit
def decayed(x, G_ptr, offs, exists, last, BEFORE: tl.constexpr, REVERSE: tl.constexpr):
    """Rows of x by what decays between them and the state BEFORE the chunk, or after it, as the product walks."""
    if G_ptr is not None:
        G = chunk_decay(G_ptr, offs, exists, REVERSE)
        if BEFORE == REVERSE:
            G = tl.load(G_ptr + last) - G
        weight = tl.exp2(G.to(tl.float32))
        x = x * (weight if len(x.shape) == 1 else weight[:, None])
    return x


@triton.jit
def next_state(
    s, vector, b, c, G_ptr, unit_ptr, delta_ptr, offs, exists, last, scale,
    CHUNK: tl.constexpr, INPUT: tl.constexpr, VECTOR: tl.constexpr, REVERSE: tl.constexpr,
):
    """The state that a chunk leaves."""
    weight = decayed(tl.full([CHUNK], 1.0, tl.float32), G_ptr, offs, exists, last, False, REVERSE)
    if G_ptr is not None:
        end = tl.exp2(tl.load(G_ptr + last).to(tl.float32))
        s *= end
        vector *= end
    x = c
    if REVERSE:
        weight *= load_unit(unit_ptr, offs, exists, scale)
    if REVERSE or G_ptr is not None:
        x = operand(c * weight[:, None], INPUT)
    s += multiply(tl.trans(b), x, INPUT)
    if VECTOR == "inner":
        vector += product_vector(tl.trans(b), weight, INPUT)
    elif VECTOR == "outer":
        # β is 1 or, of the reversed product, −δ
        if REVERSE:
            weight *= -load_unit(delta_ptr, offs, exists, 0.0)
        vector += product_vector(tl.trans(c), weight, INPUT)
    return s, vector


@triton.jit(do_not_specialize=["T", "scale"])
def _product_kernel(
    a_ptr, b_ptr, c_ptr, G_ptr, unit_ptr, delta_ptr, own_ptr, state_ptr, vector_ptr,
    segment_ptr, first_ptr, bounds_ptr, y_ptr, den_ptr, moment_ptr, end_ptr, end_vector_ptr,
    stride_ab, stride_ah,
    stride_bb, stride_bh,
    stride_cb, stride_ch,
    stride_ob, stride_oh,
    stride_sn, stride_vn, stride_sk, stride_sw,
    H, SHARE_A, SHARE_B, SHARE_C, SHARE_O, T, each, tokens, moment_tile, scale,
    ROW_A: tl.constexpr, ROW_B: tl.constexpr, ROW_C: tl.constexpr, ROW_O: tl.constexpr,
    K: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    FEATURE_A: tl.constexpr, FEATURE_B: tl.constexpr, FEATURE_C: tl.constexpr, FEATURE_O: tl.constexpr,
    VECTOR: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
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
    G_ptr = advance(G_ptr, head)
    unit_ptr = advance(unit_ptr, head)
    delta_ptr = advance(delta_ptr, head)
    den_ptr = advance(den_ptr, head)
    y_ptr += head * W
    moment_ptr = advance(moment_ptr, tl.cast(pid_w, tl.int64) * moment_tile + head)
    s = load_state(
        advance(state_ptr, (n * H + pid_h) * stride_sn), stride_sk, stride_sw, first_w, K, W, BLOCK_K, BLOCK_W)
    offs_v = tl.arange(0, BLOCK_K) if VECTOR == "inner" else first_w + tl.arange(0, BLOCK_W)
    WIDTH: tl.constexpr = K if VECTOR == "inner" else W
    vector = load_vector(advance(vector_ptr, (n * H + pid_h) * stride_vn), offs_v, WIDTH)

    chunks = tl.cdiv(stop - start, CHUNK)
    for i in tl.range(chunks, disable_licm=True):
        t, offs = start + (chunks - 1 - i if REVERSE else i) * CHUNK, tl.arange(0, CHUNK)
        # whatever a tensor adds to t takes 64-bit registers
        exists = offs < stop - t
        G_at = advance(G_ptr, t)
        unit_at = advance(unit_ptr, t)
        delta_at = advance(delta_ptr, t)
        last = tl.minimum(CHUNK, stop - t) - 1
        a = load_factor(a_ptr, t, offs, exists, 0, ROW_A, K, BLOCK_K, FEATURE_A)  # [CHUNK, BLOCK_K]
        if NORMALIZE:
            den = product_vector(a, vector, INPUT)
        b = load_factor(b_ptr, t, offs, exists, 0, ROW_B, K, BLOCK_K, FEATURE_B)
        p = scores(a, b, G_at, unit_at, delta_at, offs, exists, scale, CHUNK, INPUT, REVERSE)
        if NORMALIZE and G_ptr is not None:
            # early, where decays leave few registers for scores; late, where they need none
            den = decayed(den, G_at, offs, exists, last, True, REVERSE) + tl.sum(p.to(tl.float32), 1)
        y = multiply(a, operand(s, INPUT), INPUT)  # [CHUNK, BLOCK_W]
        if VECTOR == "outer":
            if REVERSE:
                y += vector[None, :]
            else:
                y -= load_unit(delta_at, offs, exists, 0.0)[:, None] * vector[None, :]
        y = decayed(y, G_at, offs, exists, last, True, REVERSE)
        c = load_factor(c_ptr, t, offs, exists, first_w, ROW_C, W, BLOCK_W, FEATURE_C)
        y += multiply(p, c, INPUT)
        s, vector = next_state(
            s, vector, b, c, G_at, unit_at, delta_at, offs, exists, last, scale, CHUNK, INPUT, VECTOR, REVERSE)
        if NORMALIZE:
            if G_ptr is None:
                den += tl.sum(p.to(tl.float32), 1)
            if pid_w == 0:
                tl.store(den_ptr + t + offs, den, mask=exists)
            y = divided(y, den)
        elif not REVERSE:
            y *= load_unit(unit_at, offs, exists, scale)[:, None]
        store_product(
            y, y_ptr, own_ptr, moment_ptr, t, offs, exists, first_w, ROW_O, W, BLOCK_W, FEATURE_O, False)

    if place == (0 if REVERSE else count - 1):
        n = sequence * H + pid_h
        store_end(s, vector, end_ptr, end_vector_ptr, n, first_w, offs_v, WIDTH, K, W, BLOCK_K, BLOCK_W)


def product(
    a: Factor,
    b: Factor,
    c: Factor,
    G: torch.Tensor | None,
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
    """Write y, den and the end states; moments where asked for. across: states are [n, H, W, K]."""
    B, H, T, W = y.shape
    K = a.x.shape[3]
    decayed = G is not None and not reverse
    tiles = launch(padded(K), padded(W), a.x.dtype, architecture(a.x), decayed, own is not None)
    tiles_w = max(1, triton.cdiv(W, tiles.BLOCK_W))
    moments = torch.empty(tiles_w, B, H, T, dtype=torch.float32, device=y.device) if moment else None
    if groups.count * H == 0:
        return moments
    own = own or Factor(None)
    _product_kernel[(groups.count * H * tiles_w,)](
        a.x, b.x, c.x, G, unit, delta, own.x, states.s, states.z if vector else None, *groups.tables,
        y, den, moments, end, end_vector,
        *a.heads, *b.heads, *c.heads, *own.heads,
        states.stride_s, states.stride_z, *((1, K) if across else (W, 1)),
        H, a.share, b.share, c.share, own.share, T, groups.each, groups.tokens, B * H * T, scale,
        ROW_A=a.row, ROW_B=b.row, ROW_C=c.row, ROW_O=own.row,
        K=K, W=W, FEATURE_A=a.feature, FEATURE_B=b.feature, FEATURE_C=c.feature, FEATURE_O=own.feature,
        VECTOR=vector, NORMALIZE=den is not None, REVERSE=reverse, **tiles._asdict(), enable_fp_fusion=True,
    )
    return moments

"""What the kernels of the prefix integral share: groups of tokens, factors and their feature maps, products."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._primitives import LOG2E, architecture, dot

# of float32 operands, along the axis that a product sums over
SLICE = tl.constexpr(16)


class Groups(NamedTuple):
    """Sequences cut into groups of `tokens`; a segment is a sequence, and an empty one has a group too."""

    tokens: int
    sequences: int
    each: int  # groups of a sequence, without `segment`
    count: int  # groups of all sequences, with `segment` an upper bound
    segment: torch.Tensor | None  # [count] int32: the sequence of a group
    first: torch.Tensor | None  # [sequences + 1] int32: the first group of a sequence
    bounds: torch.Tensor | None  # [sequences + 1] int32: where segments begin and end

    @property
    def tables(self) -> tuple[torch.Tensor | None, ...]:
        return self.segment, self.first, self.bounds


class Tiles(NamedTuple):
    CHUNK: int
    BLOCK_K: int
    BLOCK_W: int
    num_warps: int
    num_stages: int


class States(NamedTuple):
    """Where each group, or each sequence of one group, starts: s [n, H, K, V] and z [n, H, K], rows `stride` apart."""

    s: torch.Tensor | None
    z: torch.Tensor | None
    stride_s: int
    stride_z: int


class Factor(NamedTuple):
    """A tensor [B, heads, T, width] of which `share` query heads read one head, and the map applied to it."""

    x: torch.Tensor | None
    share: int = 1
    feature: str = "identity"

    @property
    def heads(self) -> tuple[int, int]:
        return (0, 0) if self.x is None else self.x.stride()[:2]

    @property
    def row(self) -> int:
        return 0 if self.x is None else self.x.stride(2)


def group_tokens(itemsize: int, arch: int) -> int:
    """Tokens of a group: a second read of k and v costs less the longer it is, few sequences fill a GPU the shorter."""
    return 2048 if itemsize == 2 else 1024


def plan(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Groups:
    """The groups of q's sequences; values of cu_seqlens outside 0 … T or decreasing are moved, never followed."""
    B, T = q.shape[0], q.shape[2]
    tokens = group_tokens(q.element_size(), architecture(q))
    each = max(1, triton.cdiv(T, tokens))
    if cu_seqlens is None:
        return Groups(tokens, B, each, B * each, None, None, None)
    bounds = cu_seqlens.clamp(0, T).to(torch.int32).cummax(0).values
    segments = bounds.shape[0] - 1
    if each == 1 or segments == 0:
        return Groups(tokens, segments, 1, segments, None, None, bounds)
    counts = ((bounds.diff() + (tokens - 1)) // tokens).clamp(min=1)
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    ids = torch.arange(each + segments, dtype=torch.int32, device=q.device)
    segment = torch.searchsorted(first[1:], ids, right=True, out_int32=True).clamp(max=segments - 1)
    return Groups(tokens, segments, each, each + segments, segment, first, bounds)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows, copied where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@triton.jit
def locate(segment_ptr, first_ptr, bounds_ptr, n, each, tokens, T):
    """Of group n: its sequence, that one's batch entry, its place among `count` groups, its first token, the end."""
    if segment_ptr is None:
        sequence, place, count = n // each, n % each, each
    else:
        sequence = tl.load(segment_ptr + n)
        first = tl.load(first_ptr + sequence)
        place, count = n - first, tl.load(first_ptr + sequence + 1) - first
    if bounds_ptr is None:
        batch, low, high = sequence, 0, T
    else:
        batch, low, high = 0, tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    # a sequence's tokens fit 31 bits, its offsets in memory need not
    start = tl.cast(low + place * tokens, tl.int32)
    stop = tl.minimum(start + tokens, high)
    return tl.cast(sequence, tl.int64), tl.cast(batch, tl.int64), place, count, start, stop


@triton.jit
def mapped(x, FEATURE: tl.constexpr):
    """φ(x) in float32."""
    x = x.to(tl.float32)
    if FEATURE == "elu":
        below = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.exp2(below * LOG2E) + tl.maximum(x, 0.0)
    elif FEATURE == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif FEATURE == "exp":
        x = tl.exp2(x * LOG2E)
    return x


@triton.jit
def slope_of(x, FEATURE: tl.constexpr):
    """φ'(x) in float32."""
    x = x.to(tl.float32)
    if FEATURE == "elu":
        x = tl.where(x > 0, 1.0, tl.exp2(x * LOG2E))
    elif FEATURE == "relu":
        x = tl.where(x > 0, 1.0, tl.where(x == x, 0.0, x))
    elif FEATURE == "exp":
        x = tl.exp2(x * LOG2E)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def load_columns(
    ptr, t, offs, exists, first, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr = 0.0
):
    """Columns first … first + BLOCK − 1 of those rows t + offs that exist, OTHER elsewhere: [len(offs), BLOCK]."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + tl.cast(t, tl.int64) * ROW + first + (offs[:, None].to(tl.int64) * ROW + cols[None, :])
    if WIDTH > 0 and WIDTH % BLOCK == 0:
        x = tl.load(ptrs, mask=exists[:, None], other=OTHER)
    else:
        x = tl.load(ptrs, mask=exists[:, None] & (cols[None, :] < WIDTH - first), other=OTHER)
    return x


@triton.jit
def operand(x, INPUT: tl.constexpr):
    """x as `multiply` takes it: bfloat16 and float32 inputs in their dtype, float16 ones as TF32.

    TF32 has float16's ten bits of mantissa and float32's range: states and weights neither overflow nor vanish.
    """
    if INPUT == tl.float16:
        x = x.to(tl.float32)
        # to nearest: the tensor cores would cut the bits off
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        x = x.to(INPUT)
    return x


@triton.jit
def multiply(a, b, INPUT: tl.constexpr):
    """a @ b of operands in float32."""
    if INPUT == tl.float16:
        y = tl.dot(a, b, input_precision="tf32")
    elif INPUT == tl.float32 and a.shape[1] > SLICE:
        # without tensor cores a thread holds whole rows of its operands: one slice of them each
        SLICES: tl.constexpr = a.shape[1] // SLICE
        x = tl.permute(tl.reshape(a, [a.shape[0], SLICES, SLICE]), [1, 0, 2])
        y = tl.sum(dot(x, tl.reshape(b, [SLICES, SLICE, b.shape[1]])), 0)
    else:
        y = dot(a, b)
    return y


@triton.jit
def product_vector(a, x, INPUT: tl.constexpr):
    """a @ x for a float32 vector x, to float32: its leading digits, the next ones and the last are operands each."""
    if INPUT == tl.float32:
        y = tl.sum(a * x[None, :], 1)
    else:
        high = operand(x, INPUT)
        rest = x - high.to(tl.float32)
        middle = operand(rest, INPUT)
        low = operand(rest - middle.to(tl.float32), INPUT)
        col = tl.arange(0, 16)[None, :]
        columns = tl.where(col == 0, high[:, None], tl.where(col == 1, middle[:, None], low[:, None]))
        y = tl.sum(multiply(a, tl.where(col < 3, columns, 0.0).to(high.dtype), INPUT), 1)
    return y


@triton.jit
def load_factor(
    ptr, t, offs, exists, first,
    ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FEATURE: tl.constexpr,
):
    """`load_columns` under a feature map, an operand: φ(0) need not be 0, so what does not exist is 0 after it."""
    x = load_columns(ptr, t, offs, exists, first, ROW, WIDTH, BLOCK)
    INPUT: tl.constexpr = ptr.dtype.element_ty
    if FEATURE != "identity":
        x = operand(mapped(x, FEATURE), INPUT)
        if WIDTH > 0 and WIDTH % BLOCK == 0:
            x = tl.where(exists[:, None], x, 0.0)
        else:
            x = tl.where(exists[:, None] & (tl.arange(0, BLOCK)[None, :] < WIDTH - first), x, 0.0)
    elif INPUT == tl.float16:
        # exact in TF32 as it is
        x = x.to(tl.float32)
    return x


@triton.jit
def load_state(ptr, stride_k, stride_w, first_w, K, W, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr):
    """A tile of a float32 state, zeros without one: [BLOCK_K, BLOCK_W]."""
    if ptr is None:
        s = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    else:
        offs_k, offs_w = tl.arange(0, BLOCK_K), first_w + tl.arange(0, BLOCK_W)
        ptrs = ptr + offs_k[:, None] * stride_k + offs_w[None, :] * stride_w
        s = tl.load(ptrs, mask=(offs_k[:, None] < K) & (offs_w[None, :] < W), other=0.0)
    return s


@triton.jit
def load_vector(ptr, offs, WIDTH):
    """Entries offs of a float32 vector, zeros without one."""
    if ptr is None:
        x = tl.zeros([offs.shape[0]], tl.float32)
    else:
        x = tl.load(ptr + offs, mask=offs < WIDTH, other=0.0)
    return x


@triton.jit
def advance(ptr, offset):
    """ptr + offset, None where there is none."""
    if ptr is None:
        moved = None
    else:
        moved = ptr + offset
    return moved


@triton.jit
def store_product(
    y, y_ptr, own_ptr, moment_ptr, t, offs, exists, first_w,
    ROW: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, FEATURE: tl.constexpr, CHANNELS: tl.constexpr,
):
    """Store rows of y, first through the feature map of own; y · φ(own) is kept a row or, CHANNELS, an entry."""
    cols = first_w + tl.arange(0, BLOCK_W)
    mask = exists[:, None] & (cols[None, :] < W)
    entries = tl.cast(t, tl.int64) * W + (offs[:, None] * W + cols[None, :])
    if own_ptr is not None:
        own = load_columns(own_ptr, t, offs, exists, first_w, ROW, W, BLOCK_W)
        if moment_ptr is not None:
            moment = y * mapped(own, FEATURE)
            if CHANNELS:
                tl.store(moment_ptr + entries, moment, mask=mask)
            else:
                tl.store(moment_ptr + t + offs, tl.sum(tl.where(mask, moment, 0.0), 1), mask=exists)
        if FEATURE != "identity":
            y *= slope_of(own, FEATURE)
    tl.store(y_ptr + entries, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_unit(ptr, offs, exists, scale):
    """A number for each row: of ptr, the scale without one."""
    if ptr is None:
        unit = tl.zeros(offs.shape, tl.float32) + scale
    else:
        unit = tl.load(ptr + offs, mask=exists, other=0.0)
    return unit


@triton.jit
def causal(offs, REVERSE: tl.constexpr):
    """Which rows (first axis) read which (second axis)."""
    if REVERSE:
        seen = offs[:, None] <= offs[None, :]
    else:
        seen = offs[:, None] >= offs[None, :]
    return seen


@triton.jit
def divided(y, den):
    """Rows of y by den, 0 where it is 0."""
    return y * tl.where(den == 0, 0.0, 1 / tl.where(den == 0, 1.0, den))[:, None]


@triton.jit
def store_end(
    s, vector, s_ptr, vector_ptr, n, first_w, offs_v, WIDTH,
    K: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Store a tile of the state that sequence and head n end with, and its vector, where they are wanted."""
    if s_ptr is not None:
        offs_k, offs_w = tl.arange(0, BLOCK_K), first_w + tl.arange(0, BLOCK_W)
        ptrs = s_ptr + n * (K * W) + offs_k[:, None] * W + offs_w[None, :]
        tl.store(ptrs, s, mask=(offs_k[:, None] < K) & (offs_w[None, :] < W))
    if vector_ptr is not None:
        tl.store(vector_ptr + n * WIDTH + offs_v, vector, mask=offs_v < WIDTH)

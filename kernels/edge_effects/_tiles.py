"""What the passes over edges share: a tile of effects from a tile of scores, whichever axis the rows lie along.

    e_ij = w / (1 + w)·‖v_j − o_i‖,  λp' − log(1 + w)  or  w / (1 + w)·(g_i·v_j − g_i·o_i),  w = p·(e^λ − 1)

Shapes: q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V] or None, start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H]; left [B, H, T, V]: o, float32, or g; terms [5, B, H, T]
float32: a row's maximum score in base 2 and probability, the score above which an edge dominates, its effect, g_i·o_i.
edit: w = gain·y with y = 2^shift·p, p' = lift·y / (1 + w), tilt = λ·lift − gain, p = rest·y; None for a hard do.
Precision: float32 scores in base 2, exact products; ‖v − o‖² as ‖v‖² − 2·o·v + ‖o‖², from the differences where that
cancels; sums float32 in a tile, float64 across tiles; no atomics, one order.
Cost: 2·(D + V) flops and one exp2 an edge, and a root or two logarithms; o in float32 beside v in 16 bits takes three
products.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._primitives import FLOOR, LN2, architecture, dot, score_strides

HIGHEST = tl.constexpr(120.0)
CLOSE = tl.constexpr(1 / 16)
# parameters of the kernels
EDIT = ("gain", "shift", "lift", "tilt", "rest")


class Tiles(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    CHUNK: int  # dimensions of operands that registers hold at once
    num_warps: int
    num_stages: int


def launch(itemsize: int, arch: int) -> Tiles:
    """Tiles by dtype, for every head dim, which is gone through in chunks; arch is `architecture`'s."""
    if arch == 0:
        return Tiles(32, 32, 64, 4, 1)
    if itemsize == 4:
        return Tiles(16, 16, 32, 4, 2)
    # of 64 rows Triton 3.6 cannot lay out the row sums that Blackwell's wider products leave
    return Tiles(32 if arch == 100 else 64, 32, {90: 64, 120: 16}.get(arch, 32), 8, 1)


def shared_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    start: torch.Tensor,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    left: torch.Tensor | None,
    signed: bool,
    tight: Tiles | None = None,
) -> tuple[tuple[int, ...], dict[str, object]]:
    """The strides and the sizes that every kernel of effects takes; tight: Hopper's tiles where registers are few."""
    D, V = q.shape[3], q.shape[3] if v is None else v.shape[3]
    strides = (
        *score_strides(q, k, start, bias, slopes), *((0, 0, 0, 0) if v is None else v.stride()),
        *((0, 0, 0, 0) if left is None else left.stride()), q.shape[:3].numel(),
    )
    arch = architecture(q)
    tiles = launch(q.element_size(), arch)
    # chunks of o in three parts each leave too few beside a bias, with Triton 3.6 above all
    split = left is not None and left.dtype != q.dtype and max(D, V) > tiles.CHUNK
    if arch == 90 and tight and split and bias is not None:
        tiles = tight
    # left to itself ptxas spills a few registers where more programs would then fit
    limit = {} if arch == 0 else {"maxnreg": 255}
    return strides, {
        "D": D, "V": V, "BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK_V": max(16, triton.next_power_of_2(V)),
        "SIGNED": signed, **tiles._asdict(), **limit, "enable_fp_fusion": True,
    }


@triton.jit
def load_terms(terms_ptr, stride_rn, offs, T, along: tl.constexpr):
    """pivot, largest, ceiling, dominant and level of rows offs, along the axis of a tile."""
    stride_rn = tl.cast(stride_rn, tl.int64)
    pivot = tl.load(terms_ptr + offs, mask=offs < T, other=0.0)
    largest = tl.load(terms_ptr + stride_rn + offs, mask=offs < T, other=0.0)
    ceiling = tl.load(terms_ptr + 2 * stride_rn + offs, mask=offs < T, other=0.0)
    dominant = tl.load(terms_ptr + 3 * stride_rn + offs, mask=offs < T, other=0.0)
    level = tl.load(terms_ptr + 4 * stride_rn + offs, mask=offs < T, other=0.0)
    return (
        tl.expand_dims(pivot, 1 - along), tl.expand_dims(largest, 1 - along), tl.expand_dims(ceiling, 1 - along),
        tl.expand_dims(dominant, 1 - along), tl.expand_dims(level, 1 - along),
    )


@triton.jit
def _load_chunk(ptr, offs, count, stride_row, stride_d, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """Dimensions first … first + CHUNK of rows offs of a [count, D] matrix: [len(offs), CHUNK]."""
    offs_d = first + tl.arange(0, CHUNK)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=(offs[:, None] < count) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def _split_dot(wide, x, FIRST: tl.constexpr):
    """wide @ xᵀ (x @ wideᵀ unless FIRST) of float32 and 16 bits, by three products of 16 bits, which are exact."""
    # what a part leaves is smaller by its bits, and would underflow in float16
    step: tl.constexpr = 256.0 if x.dtype == tl.bfloat16 else 2048.0
    high = wide.to(x.dtype)
    remainder = (wide - high.to(tl.float32)) * step
    middle = remainder.to(x.dtype)
    low = ((remainder - middle.to(tl.float32)) * step).to(x.dtype)
    if FIRST:
        products = dot(low, tl.trans(x)) * (1 / step) + dot(middle, tl.trans(x))
        products = products * (1 / step) + dot(high, tl.trans(x))
    else:
        products = dot(x, tl.trans(low)) * (1 / step) + dot(x, tl.trans(middle))
        products = products * (1 / step) + dot(x, tl.trans(high))
    return products


@triton.jit
def products_of(
    a_ptr, offs_a, A, stride_an, stride_ad, b_ptr, offs_b, B, stride_bn, stride_bd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):
    """a·b of rows of an [A, D] and a [B, D] matrix, and ‖a‖² + ‖b‖²: [len(offs_a), len(offs_b)] each.

    Without tensor cores operands lie in registers, which hold CHUNK dimensions of them.
    """
    products = tl.zeros([offs_a.shape[0], offs_b.shape[0]], tl.float32)
    a_sq, b_sq = tl.zeros([offs_a.shape[0]], tl.float32), tl.zeros([offs_b.shape[0]], tl.float32)
    SIZE: tl.constexpr = min(CHUNK, BLOCK_D)
    for first in range(0, BLOCK_D, SIZE):
        a = _load_chunk(a_ptr, offs_a, A, stride_an, stride_ad, first, D, SIZE)
        b = _load_chunk(b_ptr, offs_b, B, stride_bn, stride_bd, first, D, SIZE)
        if a.dtype == b.dtype:
            products += dot(a, tl.trans(b))
        elif a.dtype == tl.float32:
            products += _split_dot(a, b, True)
        else:
            products += _split_dot(b, a, False)
        a, b = a.to(tl.float32), b.to(tl.float32)
        a_sq += tl.sum(a * a, 1)
        b_sq += tl.sum(b * b, 1)
    return products, a_sq[:, None] + b_sq[None, :]


@triton.jit
def pull_of(
    a_ptr, offs_a, A, stride_an, stride_ad, b_ptr, offs_b, B, stride_bn, stride_bd, level, allowed,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, SIGNED: tl.constexpr,
):
    """Of rows of left and of v, in either order, what w / (1 + w) multiplies: left·v − level or ‖v − left‖, or None."""
    if b_ptr is None:
        pull = None
    else:
        products, squares = products_of(
            a_ptr, offs_a, A, stride_an, stride_ad, b_ptr, offs_b, B, stride_bn, stride_bd, V, BLOCK_V, CHUNK)
        if SIGNED:
            pull = products - level
        else:
            pull = squares - 2 * products
            close = allowed & (pull <= CLOSE * squares)
            if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
                exact = tl.zeros_like(pull)
                a_ptrs, b_ptrs = a_ptr + offs_a.to(tl.int64) * stride_an, b_ptr + offs_b.to(tl.int64) * stride_bn
                for d in range(V):
                    a = tl.load(a_ptrs + d * stride_ad, mask=offs_a < A, other=0.0).to(tl.float32)
                    b = tl.load(b_ptrs + d * stride_bd, mask=offs_b < B, other=0.0).to(tl.float32)
                    difference = a[:, None] - b[None, :]
                    exact += difference * difference
                pull = tl.where(close, exact, pull)
            pull = tl.sqrt(tl.where(pull < 0, 0.0, pull))
    return pull


@triton.jit
def _divergence(y, log2_p, gain, lift, tilt, rest):
    """λp' − log(1 + w); both forms are exact where they are taken, and neither cancels there."""
    w = gain * y
    total = 1 + w
    u = w / (2 + w)
    z = u * u
    series = z * (1 / 17) + 1 / 15
    for i in tl.static_range(13, 1, -2):
        series = series * z + 1 / i
    small = y * (tilt - gain * w) / total + u * (w - 2 * z * series)
    new = lift * (y / total)
    large = new * (tl.log(new) - log2_p * LN2) - (1 - rest * y) / total * tl.log(total)
    return tl.where(w <= 1, small, large)


@triton.jit
def effects_of(x, pull, terms, gain, shift, lift, tilt, rest, SIGNED: tl.constexpr):
    """Effects of a tile of base-2 scores, 0 where they are forbidden."""
    pivot, largest, ceiling, dominant, _ = terms
    t = x - pivot
    if gain is not None:
        s = t
        if shift is not None:
            s = tl.minimum(t + shift, HIGHEST)
        y = tl.exp2(s) * largest
    if pull is None:
        if gain is None:
            effect = -LN2 * (t + tl.log2(largest))
        else:
            effect = _divergence(y, t + tl.log2(largest), gain, lift, tilt, rest)
    else:
        effect = pull
        if gain is not None:
            w = gain * y
            share = w / (1 + w)
            effect *= share if SIGNED else tl.abs(share)
    effect = tl.where(x > ceiling, dominant, effect)
    return tl.where(x > FLOOR, effect, 0.0)

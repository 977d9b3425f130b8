"""What two or more kernels share: tile loads, masked base-2 scores, the online softmax, and who launches how."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# finite stand-ins for −inf: a running maximum starts above every forbidden score, so no difference is ever NaN
FLOOR = tl.constexpr(-1e30)
FORBIDDEN = tl.constexpr(-2e30)
FAR = tl.constexpr(2147483647)
# the interpreter multiplies bfloat16 tiles as if their bits were integers, so there they are widened first
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))
# float32 entries of dS, 256 MiB, that a gradient of bias is summed from
WORKSPACE = 2**26


class Launch(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def architecture(x: torch.Tensor) -> int:
    """Compute capability × 10 of x's GPU, 0 for AMD and for the interpreter."""
    if not x.is_cuda or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def parts(q: torch.Tensor) -> int:
    """In how many loops tiles are taken: masked, whole and masked ones, or all of them masked.

    float32 takes D multiply-adds a score, beside which a mask is nothing, and three loops would cost it registers.
    """
    return 1 if q.dtype == torch.float32 else 3


def score_strides(q, k, start, bias, slopes) -> tuple[int, ...]:
    """The strides that every kernel of masked scores takes, 0 along a shared axis: of q, k, intervals, bias, slopes."""
    B, H, T, _ = q.shape
    return (
        *q.stride(), *k.stride(), start.stride(0) if start.shape[0] > 1 else 0,
        *((0, 0, 0, 0) if bias is None else bias.expand(B, H, T, k.shape[2]).stride()),
        *((0, 0) if slopes is None else slopes.expand(B, H).stride()),
    )


def by_rows(
    q: torch.Tensor, S: int, dbias: torch.Tensor | None, run: Callable[[int, int, torch.Tensor | None], None]
) -> None:
    """Call run(first, last, ds) for q's rows first … last − 1: all at once or, with dbias, as many as fit WORKSPACE.

    What run writes to ds [B, H, last − first, S], zeros before, is summed into dbias.
    """
    B, H, T, _ = q.shape
    step = T if dbias is None else max(1, WORKSPACE // max(1, B * H * S))
    for first in range(0, T, max(1, step)):
        last = min(first + step, T)
        if dbias is None:
            run(first, last, None)
        else:
            ds = torch.zeros(B, H, last - first, S, dtype=torch.float32, device=q.device)
            run(first, last, ds)
            rows = dbias if dbias.shape[2] == 1 else dbias[:, :, first:last]
            rows += ds.sum_to_size(rows.shape)


@triton.jit
def load_rows(ptr, offs, count, stride_row, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows offs of a [count, D] matrix, 0 beyond it: [len(offs), BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=(offs[:, None] < count) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def load_tile(
    ptr, first, count, stride_row, stride_d, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows first … first + BLOCK − 1 of a [count, D] matrix: [BLOCK, BLOCK_D]; MASKED: some may lie beyond, as 0."""
    offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # in a loop over tiles all but the first summand stays
    ptrs = ptr + tl.cast(first, tl.int64) * stride_row
    ptrs = ptrs + (offs[:, None].to(tl.int64) * stride_row + offs_d[None, :] * stride_d)
    if MASKED:
        x = tl.load(ptrs, mask=(offs[:, None] < count - first) & (offs_d[None, :] < D), other=0.0)
    elif D != BLOCK_D:
        x = tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def reached_keys(offs_n, start, stop, S):
    """offs_n, with S for keys no row may attend: their rows load as 0, for 0 · NaN must not leak from padding."""
    seen = (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None])
    return tl.where(tl.max(seen.to(tl.int32), 0) > 0, offs_n, S)


@triton.jit
def load_intervals(start_ptr, stop_ptr, offs, T):
    """start and stop of rows offs; rows past T are empty."""
    start = tl.load(start_ptr + offs, mask=offs < T, other=0)
    stop = tl.load(stop_ptr + offs, mask=offs < T, other=0)
    return start, stop


@triton.jit
def interval_bounds(start, stop, exists):
    """First and last key that some row may attend, then those that every existing row may attend."""
    low = tl.min(tl.where(stop > start, start, 2147483647), 0)
    inner_low = tl.max(tl.where(exists, start, 0), 0)
    inner_high = tl.min(tl.where(exists, stop, 2147483647), 0)
    return low, tl.max(stop, 0), inner_low, inner_high


@triton.jit
def key_tiles(start, stop, exists, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Where the tiles of keys that some row may attend begin, where those that need no mask begin and end, the end.

    With one part, where they begin and end.
    """
    low, high, inner_low, inner_high = interval_bounds(start, stop, exists)
    # no row at all: low is huge and high is 0
    low = tl.minimum(low, high) // BLOCK_N * BLOCK_N
    high = tl.cdiv(high, BLOCK_N) * BLOCK_N
    if PARTS == 1:
        edges = (low, high)
    else:
        whole_low = tl.minimum(tl.maximum(tl.cdiv(inner_low, BLOCK_N) * BLOCK_N, low), high)
        whole_high = tl.maximum(inner_high // BLOCK_N * BLOCK_N, whole_low)
        edges = (low, whole_low, tl.minimum(whole_high, high), high)
    return edges


@triton.jit(do_not_specialize=["T"])
def _block_bounds_kernel(start_ptr, stop_ptr, bounds_ptr, stride_ib, T, BLOCK_M: tl.constexpr):
    blocks = tl.cdiv(T, BLOCK_M)
    pid_m, pid_b = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    # a row past T counts as one that may attend nothing, so a block that holds one is never whole
    bounds = interval_bounds(start, stop, offs_m >= 0)
    for edge in tl.static_range(4):
        tl.store(bounds_ptr + (pid_b * 4 + edge) * blocks + pid_m, bounds[edge])


def block_bounds(start: torch.Tensor, stop: torch.Tensor, BLOCK_M: int) -> torch.Tensor:
    """`interval_bounds` of every block of rows: [B or 1, 4, blocks] int32."""
    T = start.shape[1]
    blocks = triton.cdiv(T, BLOCK_M)
    bounds = torch.empty(start.shape[0], 4, blocks, dtype=torch.int32, device=start.device)
    _block_bounds_kernel[(blocks * start.shape[0],)](start, stop, bounds, start.stride(0), T, BLOCK_M=BLOCK_M)
    return bounds


@triton.jit
def row_tiles(bounds_ptr, blocks, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Where the tiles of rows that may attend keys first… begin, where those that need no mask begin and end, the end.

    bounds_ptr: `block_bounds` of one sequence. Between may lie tiles that attend none of these keys. With one part,
    where they begin and end.
    """
    low, high, whole_low, whole_high, whole = blocks, 0, blocks, 0, 0
    for c in range(0, blocks, 128):
        block = c + tl.arange(0, 128)
        exists = block < blocks
        reached = exists & (tl.load(bounds_ptr + block, mask=exists, other=0) < first + BLOCK_N)
        reached &= tl.load(bounds_ptr + blocks + block, mask=exists, other=0) > first
        inside = exists & (tl.load(bounds_ptr + 2 * blocks + block, mask=exists, other=0) <= first)
        inside &= tl.load(bounds_ptr + 3 * blocks + block, mask=exists, other=0) >= first + BLOCK_N
        low = tl.minimum(low, tl.min(tl.where(reached, block, blocks), 0))
        high = tl.maximum(high, tl.max(tl.where(reached, block + 1, 0), 0))
        whole_low = tl.minimum(whole_low, tl.min(tl.where(inside, block, blocks), 0))
        whole_high = tl.maximum(whole_high, tl.max(tl.where(inside, block + 1, 0), 0))
        whole += tl.sum(inside.to(tl.int32), 0)
    low = tl.minimum(low, high)
    if PARTS == 1:
        edges = (low * BLOCK_M, high * BLOCK_M)
    else:
        # a gap among the whole tiles: none is taken for whole
        gap = whole != whole_high - whole_low
        whole_low = tl.where(gap, high, tl.minimum(whole_low, high))
        whole_high = tl.where(gap, high, tl.maximum(whole_high, whole_low))
        edges = (low * BLOCK_M, whole_low * BLOCK_M, whole_high * BLOCK_M, high * BLOCK_M)
    return edges


@triton.jit
def dot(a, b):
    """a @ b in float32, exact products: TF32 would cost float32 inputs 13 bits."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh in float32, good to a rounding near 0 too, where 1 − e^{−2x} would cancel (Cephes' polynomial)."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    return tl.where(z < 0.390625, near, tl.where(x < 0, -far, far))


@triton.jit
def base2_scores(dots, scale, softcap):
    """scale · dots, capped if softcap is given, in units of log 2."""
    if softcap is None:
        x = dots * (scale * LOG2E)
    else:
        x = tanh(dots * (scale / softcap)) * (softcap * LOG2E)
    return x


@triton.jit
def head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh):
    """Where a head's bias begins, None without a bias."""
    if bias_ptr is None:
        head_ptr = None
    else:
        head_ptr = bias_ptr + pid_b * stride_bb + pid_h * stride_bh
    return head_ptr


@triton.jit
def slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh):
    """A head's ALiBi slope in units of log 2, None without slopes."""
    if slopes_ptr is None:
        value = None
    else:
        value = tl.load(slopes_ptr + pid_b * stride_lb + pid_h * stride_lh).to(tl.float32) * LOG2E
    return value


@triton.jit
def masked_scores(
    dots, offs_row, offs_key, start, stop, T, S, offset,
    bias_ptr, stride_bt, stride_bs, slope, scale, softcap, MASKED: tl.constexpr,
):
    """Base-2 scores of a tile of dot products, FORBIDDEN where MASKED and outside the interval of a row.

    offs_row, start and stop lie along one axis of the tile and offs_key along the other.
    """
    x = base2_scores(dots, scale, softcap)
    if bias_ptr is not None:
        ptrs = bias_ptr + offs_row.to(tl.int64) * stride_bt + offs_key.to(tl.int64) * stride_bs
        # a whole tile's keys all exist
        exists = (offs_row < T) & (offs_key < S) if MASKED else offs_row < T
        bias = tl.load(ptrs, mask=exists, other=0.0)
        x += bias.to(tl.float32) * LOG2E
        # no maximum: it would swallow a NaN
        x = tl.where(x < FORBIDDEN, FORBIDDEN, x)
    if slope is not None:
        x -= slope * tl.abs(offs_row + offset - offs_key).to(tl.float32)
    if MASKED:
        x = tl.where((offs_key >= start) & (offs_key < stop), x, FORBIDDEN)
    return x


@triton.jit
def row_scores(
    q, k_ptr, offs_m, n, start, stop, T, S, offset, stride_ks, stride_kd,
    bias_ptr, stride_bt, stride_bs, slope, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):
    """Masked base-2 scores of rows offs_m against BLOCK_N keys from n on, [BLOCK_M, BLOCK_N]."""
    k = load_tile(k_ptr, n, S, stride_ks, stride_kd, D, BLOCK_N, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    return masked_scores(
        dot(q, tl.trans(k)), offs_m[:, None], n + tl.arange(0, BLOCK_N)[None, :], start[:, None], stop[:, None],
        T, S, offset, bias_ptr, stride_bt, stride_bs, slope, scale, softcap, MASKED)


@triton.jit
def uncapped_gradient(ds, dots, scale, softcap):
    """The gradient of scale · dots from that of a tile's masked scores, 0 where they are forbidden.

    The scale itself is left to whoever sums the products with q or k: once a sum, not once a score.
    """
    if softcap is not None:
        t = tanh(dots * (scale / softcap))
        # 0 · NaN must not leak from padding
        ds = tl.where(ds == 0, 0.0, ds * ((1 - t) * (1 + t)))
    return ds


@triton.jit
def normalizer(m_i, l_i, sink):
    """From a row's maximum and sum, with a learned sink logit or None: lse − m_i in base 2 and exp2(m_i − lse)."""
    if sink is None:
        gap = tl.log2(l_i)
        unit = 1.0 / l_i
    else:
        pivot = tl.maximum(m_i, sink)
        total = l_i * tl.exp2(m_i - pivot) + tl.exp2(sink - pivot)
        gap = pivot - m_i + tl.log2(total)
        unit = tl.exp2(m_i - pivot) / total
    return tl.where(l_i == 0, float("-inf"), gap), tl.where(l_i == 0, 0.0, unit)


@triton.jit
def empty_slots(n_best, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    """Of n_best values a row, FLOOR in each slot, and their indices: both [BLOCK_M, SLOTS]."""
    slots = tl.arange(0, SLOTS)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    # a slot past n_best is never the worst; those yet free are told apart by their index
    return tl.where(slots < n_best, FLOOR, float("inf")), -1 - slots


@triton.jit
def hold(best, index, x, keys, top):
    """Take in every value of a tile above the worst one held; x [BLOCK_M, BLOCK_N] has the row maxima top.

    best and index are [BLOCK_M, SLOTS], in no order; keys broadcasts to x. Keys ascend from tile to tile, so an equal
    value never enters.
    """
    worst = tl.min(best, 1)
    while tl.max((top > worst).to(tl.int32), 0) > 0:
        key = tl.min(tl.where(x == top[:, None], keys, FAR), 1)
        out = best == worst[:, None]
        out &= index == tl.max(tl.where(out, index, -FAR), 1)[:, None]
        out &= (top > worst)[:, None]
        best = tl.where(out, top[:, None], best)
        index = tl.where(out, key[:, None], index)
        x = tl.where(keys == key[:, None], FORBIDDEN, x)
        top = tl.max(x, 1)
        worst = tl.min(best, 1)
    return best, index


@triton.jit
def take_best(best, index, n_best):
    """What is held without its largest value, that value, FLOOR if none is left, and its index, equal ones by index."""
    best = tl.where(tl.arange(0, best.shape[1])[None, :] < n_best, best, float("-inf"))
    top = tl.max(best, 1)
    key = tl.min(tl.where(best == top[:, None], index, FAR), 1)
    return tl.where((best == top[:, None]) & (index == key[:, None]), float("-inf"), best), top, key


@triton.jit
def cell_members(edges_ptr, first, step, count, cells, BLOCK: tl.constexpr, SIDE: tl.constexpr):
    """Tokens step … step + SIDE of BLOCK // SIDE cells of count tokens, count itself where there is none."""
    cell = first + tl.arange(0, BLOCK) // SIDE
    token = tl.load(edges_ptr + cell, mask=cell < cells, other=0) + step + tl.arange(0, BLOCK) % SIDE
    return tl.where(token < tl.load(edges_ptr + cell + 1, mask=cell < cells, other=0), token, count)


@triton.jit
def reached_cells(start, stop, exists, S, C, CELLS_N: tl.constexpr):
    """First and last of the C cells of S keys that some row may attend, the first a multiple of CELLS_N."""
    low, high, _, _ = interval_bounds(start, stop, exists)
    # cell c holds key j where c·S < (j + 1)·C ≤ (c + 1)·S, rounded
    left = ((tl.minimum(low, high).to(tl.int64) + 1) * C - 1) // S // CELLS_N * CELLS_N
    right = tl.where(high > 0, (high.to(tl.int64) * C - 1) // S + 1, 0)
    return left.to(tl.int32), right.to(tl.int32)

"""G = ∂L/∂A of a tile, from the gradients of the statistics: what both gradient kernels of the statistics share."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._primitives import LN2, dot, load_rows, masked_scores


class Coefficients(NamedTuple):
    """Of G: along the tile's axis of rows or of keys, or one number; None where G has not."""

    constant: tl.tensor  # what of G is one number a row
    entropy: tl.tensor | None
    sum_sq: tl.tensor | None
    below: tl.tensor | None
    distance: tl.tensor | None
    received: tl.tensor | None
    cells: tl.tensor | None
    squares: tl.tensor | None  # of pairs, this and the next
    absolute: tl.tensor | None


@triton.jit
def optional(ptr, offs, mask):
    """What ptr holds at offs, None without ptr."""
    if ptr is None:
        value = None
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0)
    return value


@triton.jit
def shifted(ptr, offs):
    """ptr + offs, None without ptr."""
    if ptr is None:
        shifted = None
    else:
        shifted = ptr + offs
    return shifted


@triton.jit
def cell_gradient(up, head, offs_row, offs_key, T, S):
    """The gradient of the cell that each pair lies in, None without cells."""
    if up.cells is None:
        value = None
    else:
        row = tl.load(up.row_cells + offs_row, mask=offs_row < T, other=0)
        key = tl.load(up.key_cells + offs_key, mask=offs_key < S, other=0)
        value = tl.load(up.cells + head + row + key)
    return value


@triton.jit
def of_row(up, largest, rows, mask):
    """What of G is one number a row."""
    constant = tl.zeros_like(largest)
    if up.mass is not None:
        constant += tl.load(up.mass + rows, mask=mask, other=0.0)
    if up.entropy is not None:
        # lse − S − 1 = −log of the largest A_ij − log 2·(x − pivot) − 1; of an empty row any number does
        depth = -LN2 * tl.log2(tl.where(largest == 0, 1.0, largest)) - 1
        constant += tl.load(up.entropy + rows, mask=mask, other=0.0) * depth
    return constant


@triton.jit
def probs_and_exponents(
    dots, offs_row, offs_key, start, stop, pivot, largest, T, S, offset,
    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, MASKED: tl.constexpr,
):
    """A of a tile of dot products and its exponents, base-2 scores less their row's pivot."""
    x = masked_scores(
        dots, offs_row, offs_key, start, stop, T, S, offset,
        bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, MASKED) - pivot
    return tl.exp2(x) * largest, x


@triton.jit
def mirrored(
    up, along, other_ptr, offs_other, stride_other, stride_d, start_ptr, stop_ptr, pivot_ptr, largest_ptr,
    offs_row, offs_key, T, offset, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """A of queries offs_key and keys offs_row, None without a gradient of pairs; along belongs to the tile's axis 0."""
    if up.pairs is None:
        mirror = None
    else:
        other = load_rows(other_ptr, offs_other, T, stride_other, stride_d, D, BLOCK_D)
        mask = offs_key < T
        mirror, _ = probs_and_exponents(
            dot(along, tl.trans(other)), offs_key, offs_row,
            tl.load(start_ptr + offs_key, mask=mask, other=0), tl.load(stop_ptr + offs_key, mask=mask, other=0),
            tl.load(pivot_ptr + offs_key, mask=mask, other=0.0), tl.load(largest_ptr + offs_key, mask=mask, other=0.0),
            T, T, offset, bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)
    return mirror


@triton.jit
def map_gradient(
    p, x, of, offs_row, offs_key, offset, mirror, chosen_ptr, picked_ptr, stride_cn, N, mask_row,
):
    """p·G of a tile; x is its base-2 scores less their row's pivot, mirror A of the same pairs reversed or None."""
    grad = of.constant
    position = offs_row + offset
    if of.entropy is not None:
        grad -= of.entropy * LN2 * x
    if of.sum_sq is not None:
        grad += of.sum_sq * 2 * p
    if of.below is not None:
        grad += tl.where(offs_key < position, of.below, 0.0)
    if of.distance is not None:
        grad += of.distance * tl.abs(position - offs_key).to(tl.float32)
    if of.received is not None:
        grad += of.received
    if of.cells is not None:
        grad += of.cells
    if picked_ptr is not None:
        grad += tl.zeros_like(p)
        for c in range(N):
            j = tl.load(chosen_ptr + c * stride_cn, mask=mask_row, other=-1)
            grad += tl.where(offs_key == j, tl.load(picked_ptr + c, mask=mask_row, other=0.0), 0.0)
    if mirror is not None:
        # on the diagonal they are one number, however two products round it
        difference = tl.where(offs_row == offs_key, 0.0, p - mirror)
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        grad += 4 * of.squares * difference + 2 * of.absolute * sign
    # whatever G is where A is 0, upstream gradients of padding included
    return tl.where(p == 0, 0.0, p * grad)

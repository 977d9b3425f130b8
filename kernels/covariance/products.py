"""Covariances between rows of attention: the products of two panels, tile by tile, and their mirror.

    C_ij = Σ_k P_ik P_jk for i ≤ j

Shapes, of one head: panels [rows, keys] float32, 0 where they reach beyond the rows there are; C [T, T]; low and high
[blocks of a tile's rows] int32.
Precision: three TF32 dots (IEEE on AMD), good to 2⁻²² each, FLUSH keys in a tensor core's accumulator, which truncates,
then float32. Products of float64 panels are left to the BLAS: what Triton makes of a float64 dot is DMMA.8x8x4 on
Hopper (3.9) or no code at all on Blackwell (3.6).
Cost: 2·keys flops (6 in TF32) an entry of C above the diagonal, over the keys that both blocks of rows may attend.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._primitives import architecture

# keys that are summed in the accumulator of the tensor cores
FLUSH = 128
# rows and columns of C that a program owns
TILE = 128


class Products(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def launch_products(arch: int) -> Products:
    """Tiles of C, which divide TILE: square ones spill where they are mirrored; arch is `architecture`'s."""
    if arch == 0:
        return Products(128, 64, 32, 4, 1)
    return Products(128, 64, 32 if arch in (90, 100) else 16, 8, 2)


@triton.jit
def _write_tile(C_ptr, c, first_row, first_col, T, stride_ct, whole, UPPER: tl.constexpr, ADD: tl.constexpr):
    """c as the tile of C at first_row and first_col, or added to it; unless whole, only what exists, on one side."""
    offs_row, offs_col = tl.arange(0, c.shape[0])[:, None], tl.arange(0, c.shape[1])[None, :]
    C_ptr += tl.cast(first_row, tl.int64) * stride_ct + first_col
    ptrs = C_ptr + (offs_row * stride_ct + offs_col)
    if whole:
        if ADD:
            c += tl.load(ptrs)
        tl.store(ptrs, c)
    else:
        mask = (offs_row < T - first_row) & (offs_col < T - first_col)
        above = first_row + offs_row <= first_col + offs_col
        mask &= above == UPPER
        if ADD:
            c += tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, c, mask=mask)


@triton.jit(do_not_specialize=["T", "first_m", "first_n"])
def _products_kernel(
    left_ptr, right_ptr, low_ptr, high_ptr, C_ptr,
    stride_pr, stride_ct,
    T, first_m, first_n,
    ADD: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, FLUSH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    block_m, block_n = (first_m + m) // TILE, (first_n + n) // TILE
    low = tl.maximum(tl.load(low_ptr + block_m), tl.load(low_ptr + block_n)) // FLUSH * FLUSH
    high = tl.minimum(tl.load(high_ptr + block_m), tl.load(high_ptr + block_n))
    # what lies below the diagonal is a mirror
    above = first_m + m <= first_n + n
    high = tl.where(above, high, low)

    left_ptrs = left_ptr + (m + offs_m[:, None]).to(tl.int64) * stride_pr + offs_k[None, :]
    right_ptrs = right_ptr + (n + offs_n[:, None]).to(tl.int64) * stride_pr + offs_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in range(low, high, FLUSH):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, FLUSH, BLOCK_K):
            a = tl.load(left_ptrs + j + step)  # [BLOCK_M, BLOCK_K]
            b = tl.load(right_ptrs + j + step)  # [BLOCK_N, BLOCK_K]
            part = tl.dot(a, tl.trans(b), part, input_precision="ieee" if EXACT else "tf32x3")
        acc += part

    if above:
        m, n = first_m + m, first_n + n
        # where a tile meets the diagonal, what lies below it is the mirror of what lies above
        whole = (m + BLOCK_M <= n) & (n + BLOCK_N <= T)
        _write_tile(C_ptr, acc, m, n, T, stride_ct, whole, True, ADD)
        _write_tile(C_ptr, tl.trans(acc), n, m, T, stride_ct, whole, False, ADD)


def products_fwd(
    left: torch.Tensor,
    right: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    C: torch.Tensor,
    first_m: int,
    first_n: int,
    add: bool,
) -> None:
    """C = the products of rows first_m… and first_n ≥ first_m…, or C +=, and their mirror.

    low and high: the first and one past the last key of each TILE of rows.
    """
    tiles = launch_products(architecture(C))
    _products_kernel[(left.shape[0] // tiles.BLOCK_M, right.shape[0] // tiles.BLOCK_N)](
        left, right, low, high, C, left.stride(0), C.stride(0), C.shape[0], first_m, first_n,
        ADD=add, EXACT=architecture(C) == 0, TILE=TILE, FLUSH=FLUSH, **tiles._asdict(), enable_fp_fusion=True,
    )

"""C = P Pᵀ from panels of rows of P that are formed as they are needed, two at a time; only tiles on and above the
diagonal are multiplied, over the keys that both may attend, and mirrored."""

from typing import Protocol

import torch
from torch import Tensor

# of a panel
PANEL_BLOCKS = 2
# numbers of a row that are multiplied at once are a multiple of this
WIDTH = 128


class Rows(Protocol):
    """T rows, what they are made of, and which of their numbers meet."""

    T: int
    width: int  # numbers of a row, a multiple of chunk
    block: int  # rows that are formed at once
    tile: int  # rows and columns of C that are multiplied at once, of which a block is made
    chunk: int  # numbers of a row, at once too

    def fill(self, panel: Tensor, first: int) -> None:
        """Write rows first… and zeros beyond the last: [rows, width]."""

    def chunks(self, m: int, n: int) -> range:
        """Where the chunks begin in which some row of tile m and some of tile n ≥ m are not 0."""

    def multiply(self, C: Tensor, left: Tensor, right: Tensor, m: int, n: int, add: bool) -> None:
        """Products of panels whose first rows are m and n ≥ m into C, and their mirror."""


class MatrixRows:
    """The rows of x [T, W], less their means where center is set."""

    def __init__(self, x: Tensor, center: bool, kernel: bool):
        self.x, self.kernel = x, kernel
        self.T, self.W = x.shape
        self.block, self.tile = block_and_tile(x, kernel)
        self.chunk = min(self.block, -(-self.W // WIDTH) * WIDTH) or WIDTH
        self.width = -(-self.W // self.chunk) * self.chunk
        self.hull = torch.arange(2, dtype=torch.int32, device=x.device) * self.W if center else None

    def fill(self, panel: Tensor, first: int) -> None:
        panel.zero_()
        x = self.x[first : first + len(panel)]
        panel[: len(x), : self.W] = x
        if self.hull is not None:
            center_panel(panel, self.hull, self.block, self.chunk)

    def chunks(self, m: int, n: int) -> range:
        return range(0, self.W, self.chunk)

    def multiply(self, C: Tensor, left: Tensor, right: Tensor, m: int, n: int, add: bool) -> None:
        if self.kernel and C.dtype == torch.float32:
            from ..kernels.covariance.products import TILE, products_fwd

            low = torch.zeros(-(-self.T // self.block) * self.block // TILE, dtype=torch.int32, device=C.device)
            products_fwd(left, right, low, torch.full_like(low, self.W), C, m, n, add)
        else:
            multiply(self, C, left, right, m, n, add)


def block_and_tile(x: Tensor, kernel: bool) -> tuple[int, int]:
    """A tile that fills the multiprocessors of a GPU; one as good as any on a CPU, and no larger than a few tokens."""
    if x.is_cuda:
        return 1024, 1024
    return 128 if kernel else 512, 128


def panel_dtype(x: Tensor, dtype: torch.dtype, kernel: bool) -> torch.dtype:
    """In which rows of x are multiplied for a C of dtype: on a GPU float32 products are exact in a kernel alone."""
    return torch.float64 if x.is_cuda and not kernel else dtype


def add_products(C: Tensor, rows: Rows, dtype: torch.dtype, add: bool) -> None:
    """C [T, T] = P Pᵀ, or C += P Pᵀ, from panels of dtype."""
    T, block = rows.T, rows.block
    if T == 0:
        return
    height = min(PANEL_BLOCKS, -(-T // block)) * block
    space = C.new_empty(1 if height >= T else 2, height, rows.width, dtype=dtype)
    left, right = space[0], space[-1]
    rows.fill(left, 0)
    for m in range(0, T, height):
        rows.multiply(C, left, left, m, m, add)
        for n in reversed(range(m + height, T, height)):
            rows.fill(right, n)
            rows.multiply(C, left, right, m, n, add)
        # the panel that was met last comes next
        left, right = right, left


def multiply(rows: Rows, C: Tensor, left: Tensor, right: Tensor, m0: int, n0: int, add: bool) -> None:
    """As `Rows.multiply`, by the BLAS: products of one fixed shape, summed in float64."""
    T, tile, chunk = rows.T, rows.tile, rows.chunk
    c = C.new_empty(tile, tile, dtype=torch.float64)
    product = c if left.dtype == c.dtype else left.new_empty(tile, tile)
    for m in range(m0, min(m0 + len(left), T), tile):
        for n in range(max(m, n0), min(n0 + len(right), T), tile):
            chunks = rows.chunks(m, n)
            if not chunks:
                c.zero_()
            for j in chunks:
                a, b = left[m - m0 :][:tile, j : j + chunk], right[n - n0 :][:tile, j : j + chunk].T
                if product is not c:
                    _place(c, torch.mm(a, b, out=product), j > chunks[0])
                elif j == chunks[0]:
                    torch.mm(a, b, out=c)
                else:
                    c.addmm_(a, b)
            # both halves of a tile on the diagonal from one of them
            whole = c.triu() + c.triu(1).T if m == n else c
            _place(C[m : m + tile, n : n + tile], whole, add)
            if m != n:
                _place(C[n : n + tile, m : m + tile], whole.T, add)


def _place(target: Tensor, c: Tensor, add: bool) -> None:
    c = c[: target.shape[0], : target.shape[1]]
    if add:
        target += c
    else:
        target.copy_(c)


def center_panel(panel: Tensor, hull: Tensor, block: int, chunk: int) -> None:
    """Subtract from each row its mean over the keys hull[0] ≤ j < hull[1], in place; elsewhere it holds 0."""
    keys = torch.arange(panel.shape[1], device=panel.device)
    inside = (keys >= hull[0]) & (keys < hull[1])
    count = (hull[1] - hull[0]).clamp(min=1)
    for rows in panel.split(block):
        # tiles of one shape, so that the bits of a sum do not depend on how far a row is padded
        mean = sum(x.sum(1, keepdim=True, dtype=torch.float64) for x in rows.split(chunk, 1)) / count
        for x, some in zip(rows.split(chunk, 1), inside.split(chunk), strict=True):
            x.copy_(torch.where(some, x - mean, 0))


def normalize(C: Tensor) -> None:
    """R_ij = C_ij / √(C_ii C_jj), in place; the diagonal is 1, or 0 where it was."""
    deviation = C.diagonal().sqrt()
    for m in range(0, len(C), 512):
        product = deviation[m : m + 512, None] * deviation
        C[m : m + 512].div_(product).masked_fill_(product == 0, 0)
    # a NaN stays
    C.diagonal().masked_fill_(deviation > 0, 1)

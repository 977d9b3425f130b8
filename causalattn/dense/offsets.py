"""Means along the diagonals of a matrix at hand, in blocks of rows and float64."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulator
from ..masks import Intervals

# elements of A that are held in float64 at once
BLOCK_SIZE = 2**22


def offset_means(A: Tensor, intervals: Intervals) -> Tensor:
    """A [B, H, T, S] with every allowed entry replaced by the mean of those at its offset p_i − j, 0 elsewhere."""
    B, H, T, S = A.shape
    result = A.new_zeros(A.shape, dtype=accumulator(A))
    if A.numel() == 0:
        return result
    for b in range(B):
        for h in range(H):
            # row i, key j holds the mean of diagonal j − i: window T − 1 − i of the means
            windows = _diagonal_means(A[b, h], intervals, b).unfold(0, S, 1)
            for rows in _row_blocks(T, S):
                expected = windows[T - rows.stop : T - rows.start].flip(0)
                result[b, h, rows] = expected.masked_fill(~_seen(intervals, b, rows, S), 0).to(result.dtype)
    return result


def _diagonal_means(A: Tensor, intervals: Intervals, b: int) -> Tensor:
    """The mean of A over the allowed entries of each diagonal j − i = 1 − T … S − 1: [T + S − 1]."""
    T, S = A.shape
    sums, counts = A.new_zeros(2, T + S - 1, dtype=torch.float64)
    for rows in _row_blocks(T, S):
        seen = _seen(intervals, b, rows, S)
        span = slice(T - rows.stop, T - rows.start + S - 1)
        sums[span] += _diagonal_sums(A[rows].double().masked_fill(~seen, 0))
        counts[span] += _diagonal_sums(seen.double())
    return sums / counts.clamp(min=1)


def _diagonal_sums(tile: Tensor) -> Tensor:
    """Sums along the diagonals of tile [R, S], lowest first, [R + S − 1]: rows shifted until diagonals are columns."""
    R, S = tile.shape
    return F.pad(tile.flip(0), (0, R)).flatten()[: R * (R + S - 1)].view(R, R + S - 1).sum(0)


def _row_blocks(T: int, S: int) -> Iterator[slice]:
    step = max(1, BLOCK_SIZE // max(1, S))
    for m in range(0, T, step):
        yield slice(m, min(m + step, T))


def _seen(intervals: Intervals, b: int, rows: slice, S: int) -> Tensor:
    """bool [rows, S]: who may attend whom."""
    row = b if len(intervals.start) > 1 else 0
    keys = torch.arange(S, device=intervals.start.device)
    return (keys >= intervals.start[row, rows, None]) & (keys < intervals.stop[row, rows, None])

"""The specification of masks: who may attend whom, asked of every pair in turn."""

from collections.abc import Callable, Sequence

import numpy as np


def table(T: int, S: int, offset: int, may: Callable[[int, int], bool]) -> np.ndarray:
    """bool [1, T, S]: may(p, j) of the query at position p = offset + i and key j."""
    return np.array([[bool(may(offset + i, j)) for j in range(S)] for i in range(T)], dtype=bool).reshape(1, T, S)


def full(T: int, S: int, offset: int) -> np.ndarray:
    return table(T, S, offset, lambda p, j: True)


def causal(T: int, S: int, offset: int) -> np.ndarray:
    return table(T, S, offset, lambda p, j: j <= p)


def sliding_window(T: int, S: int, offset: int, w: int, right: int | None = 0) -> np.ndarray:
    return table(T, S, offset, lambda p, j: p - w < j and (right is None or j <= p + right))


def chunked(T: int, S: int, offset: int, c: int) -> np.ndarray:
    return table(T, S, offset, lambda p, j: p // c == j // c)


def prefix(T: int, S: int, offset: int, n: int) -> np.ndarray:
    return table(T, S, offset, lambda p, j: j < n or j <= p)


def packed(T: int, S: int, offset: int, cu_seqlens: Sequence[int]) -> np.ndarray:
    segment = [s for s, n in enumerate(np.diff(cu_seqlens)) for _ in range(n)]
    return table(T, S, offset, lambda p, j: 0 <= p < S and segment[p] == segment[j])


def padding(T: int, S: int, offset: int, lengths: Sequence[int], side: str = "right") -> np.ndarray:
    """bool [B, T, S]: query and key are both real tokens."""
    tables = []
    for n in lengths:
        real = range(n) if side == "right" else range(S - n, S)
        tables.append(table(T, S, offset, lambda p, j, real=real: p in real and j in real)[0])
    return np.array(tables, dtype=bool).reshape(len(lengths), T, S)


def first(own: np.ndarray) -> np.ndarray:
    """The first real key of each row's own sequence or segment, [B or 1, T], −1 without one.

    own [B or 1, T, S]: j is a real key of i's sequence or segment (packing and padding alone), attended or not.
    """
    return np.array([[next(iter(np.flatnonzero(row)), -1) for row in rows] for rows in own]).reshape(own.shape[:2])

"""What is known before a search: edges that must or must not be, and an order in time."""

from collections.abc import Collection, Sequence
from operator import index
from typing import NamedTuple

import numpy as np

from .marks import ARROW, CIRCLE, NONE, TAIL

Pairs = Collection[tuple[int, int]]


class Background(NamedTuple):
    """Background knowledge of a search over T tokens.

    required: (a, b) of each a → b that is there whatever the tests say.
    forbidden: (a, b) of each pair that has no edge.
    tiers: of each token the tier it belongs to; a token of a later tier is no cause of one of an earlier.
    """

    required: Pairs = ()
    forbidden: Pairs = ()
    tiers: Sequence[int] | None = None


def start_of(T: int, background: Background, order: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The marks [T, T] that a search starts from, and which edges [T, T] it must keep; order as in `icd`."""
    required, forbidden = (_pairs(name, x, T) for name, x in zip(background._fields, background[:2], strict=False))
    marks = np.full((T, T), CIRCLE, np.int8)
    np.fill_diagonal(marks, NONE)
    for tiers in (background.tiers, order):
        if tiers is not None:
            tiers = _tiers(tiers, T)
            marks[(tiers[:, None] < tiers) & (marks != NONE)] = ARROW
    if ((marks == ARROW) & (marks.T == ARROW)).any():
        raise ValueError("background knowledge must agree with itself, got tiers against the order")
    for a, b in forbidden:
        marks[a, b] = marks[b, a] = NONE
    kept = np.zeros((T, T), bool)
    for a, b in required:
        if marks[a, b] == NONE or marks[b, a] == ARROW or marks[a, b] == TAIL:
            against = "forbidden" if marks[a, b] == NONE else "against an order or another one"
            raise ValueError(f"background knowledge must agree with itself, got {a} → {b} required and {against}")
        marks[a, b], marks[b, a] = ARROW, TAIL
        kept[a, b] = kept[b, a] = True
    _check_cycles(kept & (marks == ARROW))
    return marks, kept


def _pairs(name: str, pairs: Pairs, T: int) -> list[tuple[int, int]]:
    if not isinstance(pairs, Collection):
        raise TypeError(f"{name} must be a collection of pairs, which can be read twice, got {type(pairs).__name__}")
    try:
        found = [tuple(map(index, pair)) for pair in pairs]
    except TypeError:
        raise TypeError(f"{name} must hold pairs of token numbers, got {pairs!r}") from None
    for pair in found:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= t < T for t in pair):
            raise ValueError(f"{name} must hold pairs of two tokens in 0…{T - 1}, got {pair}")
    return found


def _tiers(tiers: Sequence[int], T: int) -> np.ndarray:
    tiers = np.asarray(tiers)
    if tiers.shape != (T,):
        raise ValueError(f"tiers and order must have a place for each of the {T} tokens, got shape {list(tiers.shape)}")
    if not np.issubdtype(tiers.dtype, np.number) or not np.isfinite(tiers).all():
        raise ValueError(f"tiers and order must be numbers, got {tiers.tolist()}")
    return tiers


def _check_cycles(causes: np.ndarray) -> None:
    """Refuse required edges a → b [T, T] that lead back to where they start."""
    left = causes.any(0) | causes.any(1)
    while left.any():
        first = left & ~causes[left].any(0)
        if not first.any():
            raise ValueError(f"required edges must form no cycle, got one among {left.nonzero()[0].tolist()}")
        left &= ~first

"""How near a graph is to another over the same tokens: its edges, and the marks of those that both have."""

import math
from typing import NamedTuple

import numpy as np

from .pag import PAG, Mark


class Agreement(NamedTuple):
    """A graph found beside a true one; a share of nothing is NaN.

    precision, recall, f1: of edges, whatever their marks. chance: the mean f1 of all graphs of as many edges, and so of
    the one found with its tokens named at random. arrow_precision, arrow_recall, tail_precision, tail_recall: of the
    arrows and of the tails at the ends of edges that both graphs have; a circle claims nothing, so it costs recall and
    no precision. distance: ends at which the graphs differ, two for an edge that only one has.
    """

    precision: float
    recall: float
    f1: float
    chance: float
    arrow_precision: float
    arrow_recall: float
    tail_precision: float
    tail_recall: float
    distance: int


def compare(found: PAG, truth: PAG) -> Agreement:
    """Compare a graph with the true one.

        precision = |found ∩ true| / |found|,  recall = |found ∩ true| / |true|
        f1 = 2 |found ∩ true| / (|found| + |true|)
        chance = 2 |found| |true| / (pairs · (|found| + |true|)),  pairs = T (T − 1) / 2

    Args:
        found, truth: over the same tokens, in the same order.

    Returns:
        Agreement. Two graphs without an edge have f1 = chance = 1.

    Raises:
        TypeError: either is no PAG.
        ValueError: they have other numbers of tokens, or other names.

    Example:
        >>> truth = PAG.from_edges([(0, 1, "o->"), (1, 2, "<-o")], "abc")
        >>> compare(PAG.from_edges([(0, 1, "o->"), (0, 2, "o-o")], "abc"), truth)[:4]
        (0.5, 0.5, 0.5, 0.6666666666666666)
    """
    for name, graph in (("found", found), ("truth", truth)):
        if not isinstance(graph, PAG):
            raise TypeError(f"{name} must be a PAG, got {type(graph).__name__}")
    if found.names != truth.names:
        raise ValueError(f"found and truth must be over the same tokens, got {found.names} and {truth.names}")
    both = found.skeleton & truth.skeleton
    ours, theirs, shared = (int(x.sum()) // 2 for x in (found.skeleton, truth.skeleton, both))
    by_chance = ours * theirs / max(1, math.comb(len(found.names), 2))
    f1, chance = (2 * edges / (ours + theirs) if ours + theirs else 1.0 for edges in (shared, by_chance))
    shares = [_share(shared, ours), _share(shared, theirs), f1, chance]
    for mark in (Mark.ARROW, Mark.TAIL):
        claimed, true = both & (found.marks == mark), both & (truth.marks == mark)
        right = int((claimed & true).sum())
        shares += [_share(right, int(claimed.sum())), _share(right, int(true.sum()))]
    return Agreement(*shares, int(np.count_nonzero(found.marks != truth.marks)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

"""How near a graph is to another over the same tokens: its edges, and the marks of those that both have."""

import math
from typing import NamedTuple

import numpy as np

from .pag import PAG, Mark


class Agreement(NamedTuple):
    """A graph found beside a true one; a share of nothing is NaN.

    precision, recall, f1: of edges, whatever their marks. arrow_precision, arrow_recall, tail_precision, tail_recall:
    of the arrows and of the tails at the ends of edges that both graphs have; a circle claims nothing, so it costs
    recall and no precision. distance: ends at which the graphs differ, two for an edge that only one has.
    """

    precision: float
    recall: float
    f1: float
    arrow_precision: float
    arrow_recall: float
    tail_precision: float
    tail_recall: float
    distance: int


def compare(found: PAG, truth: PAG) -> Agreement:
    """Compare a graph with the true one.

        precision = |found ∩ true| / |found|,  recall = |found ∩ true| / |true|
        f1 = 2 |found ∩ true| / (|found| + |true|)

    Args:
        found, truth: over the same tokens, in the same order.

    Returns:
        Agreement. Two graphs without an edge have f1 = 1.

    Raises:
        TypeError: either is no PAG.
        ValueError: they have other numbers of tokens, or other names.

    Example:
        >>> truth = PAG.from_edges([(0, 1, "o->"), (1, 2, "<-o")], "abc")
        >>> compare(PAG.from_edges([(0, 1, "o->"), (0, 2, "o-o")], "abc"), truth)[:4]
        (0.5, 0.5, 0.5, 1.0)
    """
    for name, graph in (("found", found), ("truth", truth)):
        if not isinstance(graph, PAG):
            raise TypeError(f"{name} must be a PAG, got {type(graph).__name__}")
    if found.names != truth.names:
        raise ValueError(f"found and truth must be over the same tokens, got {found.names} and {truth.names}")
    both = found.skeleton & truth.skeleton
    ours, theirs, shared = (int(x.sum()) for x in (found.skeleton, truth.skeleton, both))
    shares = [_share(shared, ours), _share(shared, theirs), 2 * shared / (ours + theirs) if ours + theirs else 1.0]
    for mark in (Mark.ARROW, Mark.TAIL):
        claimed, true = both & (found.marks == mark), both & (truth.marks == mark)
        right = int((claimed & true).sum())
        shares += [_share(right, int(claimed.sum())), _share(right, int(true.sum()))]
    return Agreement(*shares, int(np.count_nonzero(found.marks != truth.marks)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

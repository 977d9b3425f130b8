"""ICD, its time-ordered form, and CLEANN's sets: which tests are made, which edges fall, which nodes may explain.

Iterative causal discovery: Rohekar, Nisimov, Gurwicz, Novik, NeurIPS 2021 (arXiv 2111.04095); CLEANN: Rohekar, Gurwicz,
Nisimov, NeurIPS 2023 (arXiv 2310.20307). Both here without regard to the order of the nodes: a level's sets are all
taken from the graph as it stood before the level.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .rules import Sepsets, neighbours, orient_arrowheads, orient_tails
from .separation import ARROW, CIRCLE, NONE, ancestors

Independent = Callable[[int, int, tuple[int, ...]], bool | tuple[bool, float]]
Sets = Callable[[np.ndarray, int, int, int], list[tuple[int, ...]]]


class Found(NamedTuple):
    """A PAG, the sets that took its other edges away, and how many tests each level made."""

    marks: np.ndarray
    sepsets: Sepsets
    tests: list[int]


def possible_ancestors(marks: np.ndarray) -> np.ndarray:
    """[z, i]: z is i, or some path from z to i has no arrow at the nearer end of an edge.

    Tails at both ends pass: what an undirected edge leads to may need its set as much as a descendant does.
    """
    return ancestors((marks != NONE) & (marks.T != ARROW))


def pds_extends(marks: np.ndarray, u: int, v: int, w: int) -> bool:
    """Whether a PDS path goes on from u–v to w: u, v, w are a triangle, or u *→ v ←* w."""
    return u != w and bool(marks[u, w] or marks[u, v] == ARROW == marks[w, v])


def pds_distances(marks: np.ndarray, root: int, inside: Collection[int], depth: int | None = None) -> dict[int, int]:
    """The nodes of a set that a PDS path from the root reaches through the set alone, and the fewest edges to each, of
    which there are at most `depth` and at most as many as the set has nodes.

    These are the branches of the root's PDS-tree whose nodes all lie in the set. How a branch goes on depends on its
    last edge only, and no edge is used up by another branch. A branch may come to a node again, never to the root; by
    that it reaches no node in under 5 edges that a path of distinct nodes does not reach in as many.
    """
    front = {(root, v) for v in neighbours(marks, root) if v in inside}
    found: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    longest = len(inside) if depth is None else min(depth, len(inside))
    edges = 1
    while front and edges <= longest:
        seen |= front
        for _, v in sorted(front):
            found.setdefault(v, edges)
        ahead = {(u, v, w) for u, v in front for w in neighbours(marks, v) if w in inside}
        front = {(v, w) for u, v, w in ahead if pds_extends(marks, u, v, w)} - seen
        edges += 1
    return found


def candidates(
    marks: np.ndarray,
    i: int,
    j: int,
    order: int,
    *,
    roots: Sequence[int] | None = None,
    among: Collection[int] | None = None,
) -> list[tuple[int, ...]]:
    """The sets of a level that are tested for an edge, in lexical order: the conditions of ICD-Sep.

    S has `order` nodes, i and j not among them (1); from i or from j (from one of `roots`, if given) each node of S is
    reached by a PDS path of at most `order` edges (2a) whose inner nodes are in S (2b); from order 2 on each is a
    possible ancestor of i or j (3). `among` limits the nodes of S.
    """
    above = possible_ancestors(marks)
    pool = [z for z in (range(len(marks)) if among is None else sorted(among)) if z not in (i, j)]
    if order > 1:
        pool = [z for z in pool if above[z, i] or above[z, j]]
    roots = (i, j) if roots is None else roots
    near = sorted({z for root in roots for z in pds_distances(marks, root, pool, order)})
    return [
        given
        for given in combinations(near, order)
        if any(len(pds_distances(marks, root, given, order)) == order for root in roots)
    ]


def icd(T: int, independent: Independent, *, selection_bias: bool = True, max_order: int | None = None) -> Found:
    """The PAG of T nodes by iterative causal discovery.

    Level r tests every edge i < j of the graph given each of its candidate sets of r nodes: `independent(i, j, given)`
    with given sorted, a bool or (bool, |r|). An edge falls when any test says independent; of those sets the one of
    least |r| is kept, the first in lexical order where they tie. Then all marks become circles again, and R0 and R1 to
    R4 orient. The search ends before the first level without candidates, or after max_order; R5 to R7, unless selection
    bias is ruled out, and R8 to R10 come last. After level r two nodes are adjacent unless r or fewer separate them.
    """
    start = np.full((T, T), CIRCLE, np.int8)
    np.fill_diagonal(start, NONE)
    return search(start, independent, candidates, selection_bias=selection_bias, max_order=max_order)


def ord_icd(order: Sequence[int], independent: Independent, *, max_order: int | None = None) -> Found:
    """ICD where the time order of the nodes is known, order[0] the first.

    Every edge begins, and begins again, as earlier o→ later. An edge is tested given nodes before the later one, from
    the later one's PDS-tree alone: it is no ancestor of the earlier one, so that tree holds a separating set if there
    is any. Selection bias is ruled out: a later node may be an ancestor of the selection, which the arrow denies.
    """
    T = len(order)
    at = {node: t for t, node in enumerate(order)}
    start = np.full((T, T), NONE, np.int8)
    for t, later in enumerate(order):
        for earlier in order[:t]:
            start[earlier, later], start[later, earlier] = ARROW, CIRCLE

    def sets(marks: np.ndarray, i: int, j: int, size: int) -> list[tuple[int, ...]]:
        later = max(i, j, key=at.__getitem__)
        return candidates(marks, i, j, size, roots=[later], among=order[: at[later]])

    return search(start, independent, sets, selection_bias=False, max_order=max_order)


def search(
    start: np.ndarray, independent: Independent, sets: Sets, *, selection_bias: bool, max_order: int | None
) -> Found:
    """The levels of ICD from a complete graph whose marks an edge has until the rules orient it."""
    T = len(start)
    marks, sepsets, tests = start, {}, []
    for order in range(T - 1 if max_order is None else min(max_order + 1, T - 1)):
        tried = {(i, j): sets(marks, i, j, order) for i, j in combinations(range(T), 2) if marks[i, j]}
        if not any(tried.values()):
            break
        tests.append(sum(map(len, tried.values())))
        for (i, j), level in tried.items():
            hits = [(size, given) for given in level for yes, size in [answer(independent(i, j, given))] if yes]
            if hits:
                sepsets[i, j] = min(hits)[1]
        kept = start.copy()
        for i, j in sepsets:
            kept[i, j] = kept[j, i] = NONE
        marks = orient_arrowheads(kept, sepsets)
    return Found(orient_tails(marks, sepsets, selection_bias=selection_bias), sepsets, tests)


def answer(said: bool | tuple[bool, float]) -> tuple[bool, float]:
    """What a test said, with size 0 where it gave none."""
    return said if isinstance(said, tuple) else (said, 0.0)


def explanation_sets(
    marks: np.ndarray, target: int, max_size: int | None = None, max_range: int | None = None
) -> list[tuple[tuple[int, ...], int]]:
    """CLEANN's candidates (set, sum of distances): by size, then by the sum, then in lexical order.

    Each node of a set is reached from the target by a PDS path of at most max_range edges whose inner nodes are in the
    set. A node's distance is that of the shortest PDS path to it, through any nodes.
    """
    T = len(marks)
    far = pds_distances(marks, target, [z for z in range(T) if z != target], max_range)
    found = []
    for size in range(1, min(len(far), T if max_size is None else max_size) + 1):
        sets = [S for S in combinations(sorted(far), size) if len(pds_distances(marks, target, S, max_range)) == size]
        found += sorted(((S, sum(far[z] for z in S)) for S in sets), key=lambda item: (item[1], item[0]))
    return found

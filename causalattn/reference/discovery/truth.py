"""True graphs: the MAG that a DAG leaves on its observed nodes, and its PAG, by enumeration and by the rules."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

from .rules import Sepsets, orient
from .separation import ARROW, CIRCLE, NONE, TAIL, ancestors, d_separated, directed_edges, m_separated

EDGES = ((ARROW, ARROW), (ARROW, TAIL), (TAIL, ARROW), (TAIL, TAIL))


def oracle(
    dag: np.ndarray, observed: Sequence[int], selected: Sequence[int] = ()
) -> Callable[[int, int, Sequence[int]], bool]:
    """A test that is never wrong: independent(i, j, given), all three positions in `observed`."""

    def independent(i: int, j: int, given: Sequence[int]) -> bool:
        return d_separated(dag, observed[i], observed[j], [*(observed[z] for z in given), *selected])

    return independent


def separating_set(
    dag: np.ndarray, observed: Sequence[int], selected: Sequence[int], i: int, j: int
) -> tuple[int, ...] | None:
    """A set of observed nodes that separates two of them given the selection, as positions in `observed`, or None.

    Z = an({i, j} ∪ selected) ∩ observed \\ {i, j}; where this set does not separate, none does (Richardson and
    Spirtes 2002, §4.2).
    """
    above = ancestors(dag)[:, [observed[i], observed[j], *selected]].any(1)
    given = tuple(z for z, node in enumerate(observed) if above[node] and z not in (i, j))
    return given if oracle(dag, observed, selected)(i, j, given) else None


def mag(dag: np.ndarray, observed: Sequence[int], selected: Sequence[int] = ()) -> np.ndarray:
    """The maximal ancestral graph over the observed nodes, [T, T] in the order of `observed`; other nodes are latent.

    i and j are adjacent when no set of observed nodes separates them given the selection. The mark at j is a tail when
    j is an ancestor of i or of a selected node, else an arrow. Richardson and Spirtes 2002, §4.2.
    """
    T = len(observed)
    above = ancestors(dag)
    marks = np.zeros((T, T), np.int8)
    for i, j in combinations(range(T), 2):
        if separating_set(dag, observed, selected, i, j) is None:
            for a, b in ((i, j), (j, i)):
                tail = above[observed[b], [observed[a], *selected]].any()
                marks[a, b] = TAIL if tail else ARROW
    return marks


def true_pag(dag: np.ndarray, observed: Sequence[int], selected: Sequence[int] = ()) -> np.ndarray:
    """The PAG of the observed nodes: the adjacencies of the MAG, exact separating sets, and the rules R0 to R10.

    On an unshielded triple, and at the end of a discriminating path, either every separating set holds the node asked
    for or none does, so one set a pair is enough. Zhang 2008.
    """
    T = len(observed)
    sepsets: Sepsets = {}
    for i, j in combinations(range(T), 2):
        given = separating_set(dag, observed, selected, i, j)
        if given is not None:
            sepsets[i, j] = given
    marks = np.full((T, T), CIRCLE, np.int8)
    np.fill_diagonal(marks, NONE)
    for i, j in sepsets:
        marks[i, j] = marks[j, i] = NONE
    return orient(marks, sepsets)


def pag_by_enumeration(marks: np.ndarray) -> np.ndarray:
    """The PAG of a small MAG by its definition: a mark stays that all Markov equivalent MAGs share, others are circles.

    Equivalent MAGs have the same adjacencies, the same unshielded colliders and the same separations. All orientations
    that agree in the first two are tried, until none of the marks is left.
    """
    wanted = separations(marks)
    shared = marks.copy()
    for other in ancestral_orientations(marks):
        differs = (other != shared) & (shared != CIRCLE)
        if differs.any() and all(m_separated(other, x, y, given) == is_in for (x, y, given), is_in in wanted.items()):
            shared[differs] = CIRCLE
            if not np.isin(shared, (ARROW, TAIL)).any():
                break
    return shared


def separations(marks: np.ndarray) -> dict[tuple[int, int, tuple[int, ...]], bool]:
    """Whether (x, y | given) are separated, for every pair and set."""
    T = len(marks)
    found = {}
    for x, y in combinations(range(T), 2):
        others = [z for z in range(T) if z not in (x, y)]
        for size in range(T - 1):
            for given in combinations(others, size):
                found[x, y, given] = m_separated(marks, x, y, given)
    return found


def ancestral_orientations(marks: np.ndarray) -> Iterator[np.ndarray]:
    """Every ancestral graph with the adjacencies and the unshielded colliders of this one."""
    edges = [(a, b) for a, b in combinations(range(len(marks)), 2) if marks[a, b]]
    colliders = unshielded_colliders(marks, marks)

    def extend(graph: np.ndarray, k: int) -> Iterator[np.ndarray]:
        if k == len(edges):
            yield graph
            return
        a, b = edges[k]
        for at_a, at_b in EDGES:
            further = graph.copy()
            further[a, b], further[b, a] = at_b, at_a
            if is_ancestral(further) and unshielded_colliders(further, marks) == {
                (u, v, w) for u, v, w in colliders if further[u, v] and further[v, w]
            }:
                yield from extend(further, k + 1)

    yield from extend(np.zeros_like(marks), 0)


def unshielded_colliders(graph: np.ndarray, skeleton: np.ndarray) -> set[tuple[int, int, int]]:
    """(a, c, b), a < b: a *→ c ←* b in the graph, a and b not adjacent in the skeleton."""
    into = graph == ARROW
    return {
        (a, c, b)
        for c in range(len(graph))
        for a, b in combinations(into[:, c].nonzero()[0].tolist(), 2)
        if not skeleton[a, b]
    }


def is_ancestral(marks: np.ndarray) -> bool:
    """No arrow at a node that is an ancestor of the edge's other end, and none at a node with an undirected edge.

    Richardson and Spirtes 2002, §3.1.
    """
    above = ancestors(directed_edges(marks))
    into = marks == ARROW
    undirected = ((marks == TAIL) & (marks.T == TAIL)).any(0)
    return not (into & above.T).any() and not (into.any(0) & undirected).any()

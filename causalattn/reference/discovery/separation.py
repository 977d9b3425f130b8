"""Separation in graphs with marks: what a path passes, given a set."""

from collections.abc import Iterable

import numpy as np

NONE, CIRCLE, ARROW, TAIL = range(4)


def ancestors(directed: np.ndarray) -> np.ndarray:
    """[a, b]: a is b, or a directed path runs from a to b. directed[a, b] is a → b."""
    reached = np.eye(len(directed), dtype=bool) | directed
    while True:
        further = (reached.astype(int) @ reached) > 0
        if np.array_equal(further, reached):
            return reached
        reached = further


def directed_edges(marks: np.ndarray) -> np.ndarray:
    """[a, b]: a → b."""
    return (marks == ARROW) & (marks.T == TAIL)


def m_separated(marks: np.ndarray, x: int, y: int, given: Iterable[int]) -> bool:
    """Whether no path between x and y is open given a set: a MAG's edges, or a DAG's.

    A path is open when each collider on it (u *→ v ←* w) is in the set or has a descendant there, and no other inner
    node is in the set. There is one exactly when there is a walk whose colliders all are in the set and whose other
    inner nodes are not: it goes down to the descendant and back. Whether a walk goes on depends on its last edge.
    Richardson and Spirtes, Ancestral graph Markov models, Annals of Statistics 30 (2002), §3.4.
    """
    given = {*given}
    neighbours = [row.nonzero()[0].tolist() for row in marks]
    mark = marks.tolist()
    front = [(x, v) for v in neighbours[x]]
    seen = set(front)
    while front:
        u, v = front.pop()
        if v == y:
            return False
        for w in neighbours[v]:
            collider = mark[u][v] == ARROW == mark[w][v]
            if collider == (v in given) and (v, w) not in seen:
                seen.add((v, w))
                front.append((v, w))
    return True


def dag_marks(dag: np.ndarray) -> np.ndarray:
    """A DAG's edges as marks."""
    return np.where(dag, ARROW, np.where(dag.T, TAIL, NONE)).astype(np.int8)


def d_separated(dag: np.ndarray, x: int, y: int, given: Iterable[int]) -> bool:
    """Whether a set separates x from y in a DAG; selection variables belong to every set."""
    return m_separated(dag_marks(dag), x, y, given)

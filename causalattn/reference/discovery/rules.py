"""The orientation rules R0 to R10, each as published: Zhang, On the completeness of orientation rules for causal
discovery in the presence of latent confounders and selection bias, Artificial Intelligence 172 (2008), §3 and §4.

A rule reads a graph and hands back the marks it calls for, as (a, b, mark): that mark at b on the edge a–b. It changes
nothing, so no rule sees half of its own work and the order of the nodes is nowhere felt. `set_marks` then changes
circles only, and where a rule calls for both an arrow and a tail at one place, which exact separating sets never do,
the arrow is set: colliders at both ends of an edge make it a ↔ b, and so do two uses of R1 from opposite sides.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations

import numpy as np

from .separation import ARROW, CIRCLE, TAIL

Calls = list[tuple[int, int, int]]
Sepsets = dict[tuple[int, int], tuple[int, ...]]
Rule = Callable[[np.ndarray, Sepsets], Calls]


def neighbours(marks: np.ndarray, a: int) -> list[int]:
    """The nodes with an edge to a."""
    return marks[a].nonzero()[0].tolist()


def sepset(sepsets: Sepsets, a: int, b: int) -> tuple[int, ...]:
    """The set that separated a from b."""
    return sepsets[min(a, b), max(a, b)]


def r0(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a *–* b *–* c, a and c not adjacent, b outside their separating set: a *→ b ←* c."""
    return [
        call
        for b in range(len(marks))
        for a, c in combinations(neighbours(marks, b), 2)
        if not marks[a, c] and b not in sepset(sepsets, a, c)
        for call in ((a, b, ARROW), (c, b, ARROW))
    ]


def r1(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a *→ b o–* c, a and c not adjacent: b → c."""
    return [
        call
        for b in range(len(marks))
        for a, c in permutations(neighbours(marks, b), 2)
        if marks[a, b] == ARROW and marks[c, b] == CIRCLE and not marks[a, c]
        for call in ((c, b, TAIL), (b, c, ARROW))
    ]


def r2(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a → b *→ c or a *→ b → c, and a *–o c: a *→ c."""
    return [
        (a, c, ARROW)
        for b in range(len(marks))
        for a, c in permutations(neighbours(marks, b), 2)
        if marks[a, b] == ARROW == marks[b, c]
        and (marks[b, a] == TAIL or marks[c, b] == TAIL)
        and marks[a, c] == CIRCLE
    ]


def r3(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a *→ b ←* c, a *–o d o–* c, a and c not adjacent, d *–o b: d *→ b."""
    return [
        (d, b, ARROW)
        for b in range(len(marks))
        for a, c in combinations(neighbours(marks, b), 2)
        if marks[a, b] == ARROW == marks[c, b] and not marks[a, c]
        for d in neighbours(marks, b)
        if marks[a, d] == CIRCLE == marks[c, d] and marks[d, b] == CIRCLE
    ]


def r4(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """A discriminating path ⟨d, …, a, b, c⟩ for b, and b o–* c: b → c if b separated d from c, else a ↔ b ↔ c."""
    calls: Calls = []
    for b in range(len(marks)):
        for a, c in permutations(neighbours(marks, b), 2):
            if marks[c, b] != CIRCLE:
                continue
            for d in discriminating_ends(marks, a, b, c):
                if b in sepset(sepsets, d, c):
                    calls += [(c, b, TAIL), (b, c, ARROW)]
                else:
                    calls += [(a, b, ARROW), (b, a, ARROW), (b, c, ARROW), (c, b, ARROW)]
    return calls


def discriminating_ends(marks: np.ndarray, a: int, b: int, c: int) -> Iterator[int]:
    """Every d with a discriminating path ⟨d, …, a, b, c⟩ for b.

    d and c are not adjacent, and each node between d and b is a collider on the path and a parent of c.
    """

    def extend(path: list[int]) -> Iterator[int]:
        before, node = path[-2:]
        if not (marks[before, node] == ARROW == marks[node, c] and marks[c, node] == TAIL):
            return
        for d in neighbours(marks, node):
            if d not in path and d != c and marks[d, node] == ARROW:
                if marks[d, c]:
                    yield from extend([*path, d])
                else:
                    yield d

    yield from extend([b, a])


def uncovered_paths(
    marks: np.ndarray, a: int, b: int, goes: Callable[[np.ndarray, int, int], bool]
) -> Iterator[list[int]]:
    """Every path from a to b whose edges may be gone, and of which no two nodes two steps apart are adjacent."""

    def extend(path: list[int]) -> Iterator[list[int]]:
        if path[-1] == b:
            yield path
            return
        for v in neighbours(marks, path[-1]):
            if v not in path and goes(marks, path[-1], v) and not (len(path) > 1 and marks[path[-2], v]):
                yield from extend([*path, v])

    yield from extend([a])


def circles(marks: np.ndarray, u: int, v: int) -> bool:
    """u o–o v."""
    return marks[u, v] == CIRCLE == marks[v, u]


def potentially_directed(marks: np.ndarray, u: int, v: int) -> bool:
    """The edge could be u → v: it is not into u, nor out of v."""
    return marks[v, u] in (CIRCLE, TAIL) and marks[u, v] in (CIRCLE, ARROW)


def r5(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a o–o b, and an uncovered circle path ⟨a, c, …, d, b⟩, a and d, b and c not adjacent: it and a–b become –."""
    calls: Calls = []
    for a, b in combinations(range(len(marks)), 2):
        if circles(marks, a, b):
            for path in uncovered_paths(marks, a, b, circles):
                if len(path) > 3 and not marks[a, path[-2]] and not marks[b, path[1]]:
                    for u, v in zip(path, [*path[1:], a], strict=True):
                        calls += [(u, v, TAIL), (v, u, TAIL)]
    return calls


def r6(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a – b o–* c: b –* c."""
    return [
        (c, b, TAIL)
        for b in range(len(marks))
        for a, c in permutations(neighbours(marks, b), 2)
        if marks[a, b] == TAIL == marks[b, a] and marks[c, b] == CIRCLE
    ]


def r7(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a –o b o–* c, a and c not adjacent: b –* c."""
    return [
        (c, b, TAIL)
        for b in range(len(marks))
        for a, c in permutations(neighbours(marks, b), 2)
        if marks[b, a] == TAIL and marks[a, b] == CIRCLE == marks[c, b] and not marks[a, c]
    ]


def r8(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a → b → c or a –o b → c, and a o→ c: a → c."""
    return [
        (c, a, TAIL)
        for b in range(len(marks))
        for a, c in permutations(neighbours(marks, b), 2)
        if marks[b, a] == TAIL
        and marks[a, b] in (ARROW, CIRCLE)
        and (marks[c, b], marks[b, c]) == (TAIL, ARROW)
        and (marks[c, a], marks[a, c]) == (CIRCLE, ARROW)
    ]


def partly_directed(marks: np.ndarray) -> list[tuple[int, int]]:
    """Every a o→ c."""
    return [(int(a), int(c)) for a, c in np.argwhere((marks == ARROW) & (marks.T == CIRCLE))]


def r9(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a o→ c and an uncovered potentially directed path ⟨a, b, …, c⟩, b and c not adjacent: a → c."""
    return [
        (c, a, TAIL)
        for a, c in partly_directed(marks)
        if any(len(p) > 3 and not marks[p[1], c] for p in uncovered_paths(marks, a, c, potentially_directed))
    ]


def r10(marks: np.ndarray, sepsets: Sepsets) -> Calls:
    """a o→ c, b → c ← d, uncovered potentially directed paths ⟨a, u, …, b⟩ and ⟨a, v, …, d⟩, where u and v, which may
    be b and d, are distinct and not adjacent: a → c.
    """
    calls: Calls = []
    for a, c in partly_directed(marks):
        parents = ((marks[:, c] == ARROW) & (marks[c] == TAIL)).nonzero()[0].tolist()
        first = {b: {p[1] for p in uncovered_paths(marks, a, b, potentially_directed)} for b in parents}
        if any(u != v and not marks[u, v] for b, d in combinations(parents, 2) for u in first[b] for v in first[d]):
            calls.append((c, a, TAIL))
    return calls


RULES: tuple[Rule, ...] = (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10)


def set_marks(marks: np.ndarray, calls: Calls) -> np.ndarray:
    """The graph with the circles that are called for replaced; an arrow goes before a tail."""
    out = marks.copy()
    for mark in (TAIL, ARROW):
        for a, b, called in calls:
            if called == mark and marks[a, b] == CIRCLE:
                out[a, b] = mark
    return out


def until_still(marks: np.ndarray, sepsets: Sepsets, rules: Sequence[Rule]) -> np.ndarray:
    """Rounds of the rules, each in its turn and on the whole graph at once, until a round changes nothing."""
    while True:
        before = marks
        for rule in rules:
            marks = set_marks(marks, rule(marks, sepsets))
        if np.array_equal(marks, before):
            return marks


def orient_arrowheads(marks: np.ndarray, sepsets: Sepsets) -> np.ndarray:
    """R0, then R1 to R4 until nothing changes."""
    return until_still(set_marks(marks, r0(marks, sepsets)), sepsets, RULES[1:5])


def orient_tails(marks: np.ndarray, sepsets: Sepsets, *, selection_bias: bool = True) -> np.ndarray:
    """R5 to R7 where there may be selection bias, then R8 to R10, each group until nothing changes."""
    if selection_bias:
        marks = until_still(marks, sepsets, RULES[5:8])
    return until_still(marks, sepsets, RULES[8:11])


def orient(marks: np.ndarray, sepsets: Sepsets, *, selection_bias: bool = True) -> np.ndarray:
    """All the rules, from a skeleton of circles, or with marks known beforehand."""
    return orient_tails(orient_arrowheads(marks, sepsets), sepsets, selection_bias=selection_bias)

"""Where a separating set may lie: the trees of paths that may d-separate a token, and possible ancestors."""

from collections.abc import Iterator

import numpy as np

from .marks import Marks, bool_rows, tokens_of

SETS_AT_ONCE = 2**16


def legal_sets(marks: Marks, root: int, size: int, inside: int) -> Iterator[int]:
    """The sets of so many tokens of inside, each of them reached from root by a path within the set, as bit sets.

    A path root = t₀, t₁, … of neighbours goes on from t₁ to t₂ where t₀ and t₂ are adjacent or t₀ *→ t₁ ←* t₂, and so
    on along it. A legal set less the token that is furthest in it is legal too, so sets grow a token at a time.

    Source: the conditions of Rohekar et al. 2021 (arXiv:2111.04095) on a set's size, depth and connection.
    """
    inside &= ~(1 << root)
    steps: dict[tuple[int, int], int] = {}

    def onward(u: int, v: int) -> int:
        if (u, v) not in steps:
            collider = marks.arrow_from[v] if marks.arrow[u] >> v & 1 else 0
            steps[u, v] = marks.near[v] & (marks.near[u] | collider) & inside & ~(1 << u)
        return steps[u, v]

    def reached(members: int) -> int:
        """What a path within the members, or one step beyond them, reaches."""
        found = marks.near[root] & inside
        to_do = [(root, v) for v in tokens_of(found & members)]
        seen = set(to_do)
        while to_do:
            u, v = to_do.pop()
            more = onward(u, v)
            found |= more
            for w in tokens_of(more & members):
                if (v, w) not in seen:
                    seen.add((v, w))
                    to_do.append((v, w))
        return found

    sets = {0}
    for _ in range(size):
        sets = {members | 1 << t for members in sets for t in tokens_of(reached(members) & ~members)}
    yield from sets


def possible_ancestors(marks: Marks) -> np.ndarray:
    """[T, T] bool: a is a possible ancestor of c, by a path none of whose edges has an arrow behind or a tail ahead."""
    onward = [marks.onward(a) for a in range(marks.T)]
    found = []
    for a in range(marks.T):
        seen = frontier = 1 << a
        while frontier:
            frontier = _union(onward, frontier) & ~seen
            seen |= frontier
        found.append(seen)
    return bool_rows(found, marks.T)


def _union(sets: list[int], members: int) -> int:
    union = 0
    for token in tokens_of(members):
        union |= sets[token]
    return union


def members_of(sets: list[int], size: int, T: int) -> np.ndarray:
    """Bit sets of so many tokens as rows of numbers, ascending: [sets, size] int64."""
    rows = np.empty((len(sets), size), np.int64)
    for n in range(0, len(sets), SETS_AT_ONCE):
        some = bool_rows(sets[n : n + SETS_AT_ONCE], T)
        rows[n : n + len(some)] = some.nonzero()[1].reshape(len(some), size)
    return rows

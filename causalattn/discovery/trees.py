"""Where a separating set may lie: the trees of paths that may d-separate a token, and possible ancestors."""

from collections.abc import Iterable, Iterator

import numpy as np

from .marks import Marks, bool_rows, tokens_of

SETS_AT_ONCE = 2**16


class Tree:
    """The paths from a root that may d-separate it: root = t₀, t₁, … of neighbours, each step to a token of inside.

    A path goes on from t₁ to t₂ ≠ t₀ where t₀ and t₂ are adjacent or t₀ *→ t₁ ←* t₂, and so on along it.

    Source: the trees of possible d-separators of Rohekar et al. 2021 (arXiv:2111.04095), no edge of which is taken away
    because another branch has it.
    """

    def __init__(self, marks: Marks, root: int, inside: int) -> None:
        self.marks, self.root, self.inside = marks, root, inside & ~(1 << root)
        self.first = marks.near[root] & self.inside
        self.steps: dict[tuple[int, int], int] = {}

    def onward(self, u: int, v: int) -> int:
        """Where a path … u, v goes on to."""
        if (u, v) not in self.steps:
            marks = self.marks
            collider = marks.arrow_from[v] if marks.arrow[u] >> v & 1 else 0
            self.steps[u, v] = marks.near[v] & (marks.near[u] | collider) & self.inside & ~(1 << u)
        return self.steps[u, v]

    def levels(self, members: int, depth: int) -> Iterator[int]:
        """What paths of 1, 2, … depth steps reach whose inner tokens are members."""
        states = [(self.root, v) for v in tokens_of(self.first & members)]
        seen, reached = set(states), self.first
        yield reached
        for _ in range(depth - 1):
            reached, new = 0, []
            for u, v in states:
                more = self.onward(u, v)
                reached |= more
                new += [(v, w) for w in tokens_of(more & members) if (v, w) not in seen]
            states = list(dict.fromkeys(new))
            seen.update(states)
            yield reached
            if not states:
                return

    def sets(self, size: int, depth: int | None = None, most: int | None = None) -> set[int]:
        """The sets of so many tokens, each reached within the set in at most depth steps; size steps by default.

        Such a set less the token that is furthest in it is one too, so sets grow a token at a time; where there are
        more than `most`, some of them, one more than that at least.
        """
        depth = size if depth is None else min(size, depth)
        sets = {0}
        for n in range(size):
            grown: set[int] = set()
            for members in sets:
                more = _union_of(self.levels(members, depth)) & ~members
                grown.update(members | 1 << t for t in tokens_of(more))
                if n == size - 1 and most is not None and len(grown) > most:
                    break
            sets = grown
        return sets


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
    return _union_of(sets[token] for token in tokens_of(members))


def _union_of(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union


def members_of(sets: list[int], size: int, T: int) -> np.ndarray:
    """Bit sets of so many tokens as rows of numbers, ascending: [sets, size] int64."""
    rows = np.empty((len(sets), size), np.int64)
    for n in range(0, len(sets), SETS_AT_ONCE):
        some = bool_rows(sets[n : n + SETS_AT_ONCE], T)
        rows[n : n + len(some)] = some.nonzero()[1].reshape(len(some), size)
    return rows

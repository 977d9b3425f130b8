"""A mixed graph in bit sets: which marks its edges have at either end, as one integer a token."""

from collections.abc import Iterator

import numpy as np

NONE, CIRCLE, ARROW, TAIL = range(4)


class Marks:
    """Edges among T tokens and the marks at their ends; a set of tokens is an int, token a its bit 2ᵃ.

    near[a]         {c : a and c adjacent}
    arrow[a]        {c : a *→ c};   arrow_from[c] its transpose {a : a *→ c}
    tail[a]         {c : a *— c};   tail_from[c] its transpose
    """

    def __init__(self, marks: np.ndarray) -> None:
        """From a matrix, marks[a, c] being the mark at c: 0 none, 1 circle, 2 arrow, 3 tail."""
        self.T = len(marks)
        self.near = bit_rows(marks != NONE)
        self.arrow, self.arrow_from = bit_rows(marks == ARROW), bit_rows(marks.T == ARROW)
        self.tail, self.tail_from = bit_rows(marks == TAIL), bit_rows(marks.T == TAIL)

    def matrix(self) -> np.ndarray:
        """The matrix it could be made from."""
        marks = bool_rows(self.near, self.T).astype(np.int8)
        marks[bool_rows(self.arrow, self.T)] = ARROW
        marks[bool_rows(self.tail, self.T)] = TAIL
        return marks

    def circle_at(self, c: int) -> int:
        """{a : a *-o c}."""
        return self.near[c] & ~self.arrow_from[c] & ~self.tail_from[c]

    def circle(self, a: int) -> int:
        """{c : a *-o c}."""
        return self.near[a] & ~self.arrow[a] & ~self.tail[a]

    def children(self, a: int) -> int:
        """{c : a → c}."""
        return self.arrow[a] & self.tail_from[a]

    def parents(self, c: int) -> int:
        """{a : a → c}."""
        return self.arrow_from[c] & self.tail[c]

    def onward(self, a: int) -> int:
        """{c : the edge a–c may point from a to c}: no arrow at a, no tail at c."""
        return self.near[a] & ~self.arrow_from[a] & ~self.tail[a]

    def orient(self, arrows: list[int], tails: list[int]) -> bool:
        """Turn circles at arrows[a] of edges from a into arrows, then those at tails[a] into tails; whether any was."""
        changed = False
        for wanted, forward, backward in ((arrows, self.arrow, self.arrow_from), (tails, self.tail, self.tail_from)):
            for a, ends in enumerate(wanted):
                new = ends & self.circle(a)
                forward[a] |= new
                for c in tokens_of(new):
                    backward[c] |= 1 << a
                changed |= new != 0
        return changed


def tokens_of(bits: int) -> Iterator[int]:
    """The members of a set, the smallest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def bit_rows(rows: np.ndarray) -> list[int]:
    """Each row of a bool matrix as a set."""
    packed = np.packbits(rows, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def bool_rows(sets: list[int], T: int) -> np.ndarray:
    """Sets as the rows of a bool matrix."""
    width = -(-T // 8)
    packed = np.frombuffer(b"".join(x.to_bytes(width, "little") for x in sets), np.uint8).reshape(len(sets), width)
    return np.unpackbits(packed, axis=1, count=T, bitorder="little").astype(bool)

"""Partial ancestral graphs: what independencies tell of causes where some are hidden, a mark at each end of an edge."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from causallearn.graph.GeneralGraph import GeneralGraph
    from networkx import DiGraph


class Mark(IntEnum):
    """What stands at one end of an edge."""

    NONE = 0
    CIRCLE = 1
    ARROW = 2
    TAIL = 3


LEFT = {Mark.CIRCLE: "o", Mark.ARROW: "<", Mark.TAIL: "-"}
RIGHT = {Mark.CIRCLE: "o", Mark.ARROW: ">", Mark.TAIL: "-"}
SYMBOLS = {f"{LEFT[at_a]}-{RIGHT[at_b]}": (at_a, at_b) for at_a in LEFT for at_b in RIGHT}


@dataclass(frozen=True, eq=False, repr=False)
class PAG:
    """A graph over tokens with a mark at both ends of each edge, in the coding of pcalg's amat.pag.

        marks[a, b] = the mark at b on the edge between a and b: 0 no edge, 1 circle, 2 arrow, 3 tail

    So a → b is marks[a, b] = 2 and marks[b, a] = 3. An arrow at b says that b is no cause of a, a tail at a that a is
    a cause of b or of what was selected on, a circle that the data leave it open; a ↔ b has a hidden common cause.

    Args:
        marks: [T, T], the codes above; copied, and read-only from then on.
        names: T distinct strings, "0", "1", … by default; `token_names` makes them of tokens that repeat.

    Raises:
        ValueError: marks are not square, hold another code, a loop or half an edge, or names do not fit.
        TypeError: a name is no string.

    Source: Zhang (2008), Artificial Intelligence 172, whose marks and words these are.

    Example:
        >>> pag = PAG([[0, 2, 1], [3, 0, 0], [2, 0, 0]], ["storm", "sank", "ship"])
        >>> print(pag)
        storm --> sank
        storm <-o ship
        >>> pag.children(0), pag.parents(0), pag.parents(0, possible=True)
        ((1,), (), (2,))
    """

    marks: np.ndarray
    names: tuple[str, ...] = None

    def __post_init__(self) -> None:
        marks = _check_marks(self.marks)
        marks.setflags(write=False)
        names = map(str, range(len(marks))) if self.names is None else self.names
        object.__setattr__(self, "marks", marks)
        object.__setattr__(self, "names", _check_names(tuple(names), len(marks)))

    @classmethod
    def from_edges(cls, edges: Iterable[tuple[int, int, str]], names: Sequence[str]) -> "PAG":
        """Make the graph over names that has these edges, as `edges` gives them.

        Raises:
            ValueError: a token outside 0…T − 1, an unknown symbol, a loop, or a second edge between two tokens.

        Example:
            >>> PAG.from_edges([(0, 1, "o->")], ["storm", "sank"]).marks
            array([[0, 2],
                   [1, 0]], dtype=int8)
        """
        marks = np.zeros((len(names), len(names)), np.int8)
        for a, b, symbol in edges:
            if symbol not in SYMBOLS:
                raise ValueError(f"symbol must be one of {' '.join(SYMBOLS)}, got {symbol!r}")
            if _check_token(a, len(names)) == _check_token(b, len(names)) or marks[a, b]:
                raise ValueError(f"edges must be one a pair of two tokens, got another between {a} and {b}")
            marks[b, a], marks[a, b] = SYMBOLS[symbol]
        return cls(marks, names)

    def edges(self) -> Iterator[tuple[int, int, str]]:
        """Each edge once, as (a, b, symbol) with a < b: a's mark first, as in "o->", "<->", "-->" or "---"."""
        for a, b in np.argwhere(np.triu(self.marks)).tolist():
            yield a, b, f"{LEFT[self.marks[b, a]]}-{RIGHT[self.marks[a, b]]}"

    def __str__(self) -> str:
        """One edge a line, by name."""
        return "\n".join(f"{self.names[a]} {symbol} {self.names[b]}" for a, b, symbol in self.edges()) or "no edges"

    def __repr__(self) -> str:
        return f"PAG({len(self.names)} tokens, {int(self.skeleton.sum()) // 2} edges)"

    def __eq__(self, other: object) -> bool:
        """Whether names and marks are the same, in the same order."""
        if not isinstance(other, PAG):
            return NotImplemented
        return self.names == other.names and np.array_equal(self.marks, other.marks)

    def __hash__(self) -> int:
        return hash((self.names, self.marks.tobytes()))

    @property
    def skeleton(self) -> np.ndarray:
        """Where there is an edge, [T, T] bool, symmetric."""
        return self.marks != Mark.NONE

    def adjacent(self, a: int) -> tuple[int, ...]:
        """The tokens that a has an edge with."""
        return _indices(self.skeleton[_check_token(a, len(self.names))])

    def parents(self, b: int, *, possible: bool = False) -> tuple[int, ...]:
        """The a of each a → b; with possible, of each edge that its circles may still make one."""
        return _indices(self._directed(possible)[:, _check_token(b, len(self.names))])

    def children(self, a: int, *, possible: bool = False) -> tuple[int, ...]:
        """The b of each a → b; with possible, of each edge that its circles may still make one."""
        return _indices(self._directed(possible)[_check_token(a, len(self.names))])

    def spouses(self, a: int) -> tuple[int, ...]:
        """The b of each a ↔ b."""
        a = _check_token(a, len(self.names))
        return _indices((self.marks[a] == Mark.ARROW) & (self.marks[:, a] == Mark.ARROW))

    def ancestors(self, b: int, *, possible: bool = False) -> tuple[int, ...]:
        """The tokens with a directed path to b, b left out; with possible, a possibly directed one."""
        directed = self._directed(possible)
        found, new = {_check_token(b, len(self.names))}, [b]
        while new:
            new = [a for a in np.flatnonzero(directed[:, new].any(1)).tolist() if a not in found]
            found.update(new)
        return tuple(sorted(found - {b}))

    def subgraph(self, tokens: Sequence[int]) -> "PAG":
        """The edges among some tokens: token n of the result is tokens[n].

        Raises:
            ValueError: tokens repeat, or lie outside 0…T − 1.
        """
        tokens = [_check_token(int(a), len(self.names)) for a in tokens]
        if len({*tokens}) < len(tokens):
            raise ValueError(f"tokens must be distinct, got {tokens}")
        return PAG(self.marks[np.ix_(tokens, tokens)], tuple(self.names[a] for a in tokens))

    def permuted(self, order: Sequence[int]) -> "PAG":
        """The same graph with its tokens in another order: token n of the result is order[n].

        Raises:
            ValueError: order is no permutation of 0…T − 1.
        """
        order = [*map(int, order)]
        if sorted(order) != [*range(len(self.names))]:
            raise ValueError(f"order must be a permutation of 0…{len(self.names) - 1}, got {order}")
        return self.subgraph(order)

    def to_pcalg(self) -> np.ndarray:
        """The matrix of pcalg's type amat.pag, [T, T] int: marks themselves."""
        return self.marks.astype(int)

    @classmethod
    def from_pcalg(cls, matrix: np.ndarray, names: Sequence[str] | None = None) -> "PAG":
        """The graph of a matrix of pcalg's type amat.pag, as in `fci(…)@amat`; checked as marks are."""
        return cls(matrix, names)

    def to_networkx(self) -> "DiGraph":
        """Both directions of each edge, each with its mark: see `integrations.networkx.to_networkx`."""
        from ..integrations.networkx import to_networkx

        return to_networkx(self)

    @classmethod
    def from_networkx(cls, graph: "DiGraph") -> "PAG":
        """The inverse of `to_networkx`: see `integrations.networkx.from_networkx`."""
        from ..integrations.networkx import from_networkx

        return from_networkx(graph)

    def to_causal_learn(self) -> "GeneralGraph":
        """A graph of causal-learn: see `integrations.causal_learn.to_causal_learn`."""
        from ..integrations.causal_learn import to_causal_learn

        return to_causal_learn(self)

    @classmethod
    def from_causal_learn(cls, graph: "GeneralGraph") -> "PAG":
        """The graph that causal-learn's `fci` returns first: see `integrations.causal_learn.from_causal_learn`."""
        from ..integrations.causal_learn import from_causal_learn

        return from_causal_learn(graph)

    def to_pywhy(self):
        """A `pywhy_graphs.PAG`: see `integrations.pywhy.to_pywhy`."""
        from ..integrations.pywhy import to_pywhy

        return to_pywhy(self)

    @classmethod
    def from_pywhy(cls, graph) -> "PAG":
        """The graph of a `pywhy_graphs.PAG`: see `integrations.pywhy.from_pywhy`."""
        from ..integrations.pywhy import from_pywhy

        return from_pywhy(graph)

    def _directed(self, possible: bool) -> np.ndarray:
        """Where a → b, or may be: [T, T] bool."""
        at_b, at_a = self.marks, self.marks.T
        if possible:
            return (at_b != Mark.NONE) & (at_b != Mark.TAIL) & (at_a != Mark.ARROW)
        return (at_b == Mark.ARROW) & (at_a == Mark.TAIL)


def token_names(tokens: Sequence[str]) -> tuple[str, ...]:
    """Name tokens so that no two names are the same: those that repeat are followed by their position.

    Example:
        >>> token_names(["the", "storm", "the", "ship"])
        ('the@0', 'storm', 'the@2', 'ship')
    """
    count = Counter(tokens)
    names = tuple(f"{token}@{n}" if count[token] > 1 else token for n, token in enumerate(tokens))
    # a token may read like another one's name
    return names if len({*names}) == len(names) else tuple(f"{token}@{n}" for n, token in enumerate(tokens))


def _check_marks(marks: np.ndarray) -> np.ndarray:
    """A copy of marks as int8."""
    given = np.asarray(marks)
    # no tokens at all
    given = given.reshape(0, 0) if given.shape == (0,) else given
    if given.ndim != 2 or given.shape[0] != given.shape[1]:
        raise ValueError(f"marks must be square, [T, T], got {[*given.shape]}")
    unknown = given[~np.isin(given, [*Mark])]
    if unknown.size:
        raise ValueError(f"marks must be 0 none, 1 circle, 2 arrow or 3 tail, got {unknown[0]}")
    if given.diagonal().any():
        raise ValueError(f"marks must be 0 on the diagonal, got a loop at {np.flatnonzero(given.diagonal())[0]}")
    halves = np.argwhere((given != 0) & (given.T == 0)).tolist()
    if halves:
        a, b = halves[0]
        raise ValueError(f"marks must have a mark at both ends of an edge, got one at {b} and none at {a}")
    return given.astype(np.int8)


def _check_names(names: tuple[str, ...], T: int) -> tuple[str, ...]:
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise TypeError(f"names must be strings, got {strange[0]!r}")
    if len(names) != T:
        raise ValueError(f"names must be {T}, one a token, got {len(names)}")
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"names must be distinct, got {repeated[0]!r} twice; see token_names")
    return names


def _check_token(token: int, T: int) -> int:
    if not 0 <= token < T:
        raise ValueError(f"tokens must lie in 0…{T - 1}, got {token}")
    return token


def _indices(row: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(row).tolist())

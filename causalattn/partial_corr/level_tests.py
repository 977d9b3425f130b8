"""All tests of a level of a graph search."""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import Backend
from .arguments import check_adjacency, check_candidates, check_correlation, check_cut
from .level import level_one, level_sets

# tokens of a set that the kernels keep in registers
MOST = 8


class Candidates(NamedTuple):
    """Sets to test at a level: each against every token next to its node.

    node: [M], or [..., M] with R's leading axes, where −1 fills up; given: [..., M, order], each a set without its
    node, −1 where it has fewer tokens; ancestors: [..., T, T] bool or None, a test is made where every member z of its
    set has ancestors[z, i] or ancestors[z, j]; others: [..., T, T] bool or None, a node's sets are tested against j
    only where others[node, j].
    """

    node: Tensor
    given: Tensor
    ancestors: Tensor | None = None
    others: Tensor | None = None


class LevelTests(NamedTuple):
    """What a level found, symmetric in i and j; [..., T, T] where not said otherwise.

    r: the correlation of least size, NaN where no test of the pair was decided; given: [..., T, T, order] int64, its
    set in ascending order, −1 for none; independent: |r| < cut; tests, singular: [...] int64, tests made and those that
    were SINGULAR.
    """

    r: Tensor
    given: Tensor
    independent: Tensor
    tests: Tensor
    singular: Tensor


def level_tests(
    R: Tensor,
    adjacency: Tensor,
    order: int,
    *,
    cut: float,
    candidates: Candidates | None = None,
    backend: Backend = "auto",
) -> LevelTests:
    """Make every test of a level and keep, of each adjacent pair, the least |r(i, j | S)| and its S.

        order 0     r = R
        order 1     S = {k} for every k next to i or to j
        order ≥ 2   the sets that candidates hands in, each node's with every token next to it

    Tests are reduced as they are made: O(T²) memory whatever their number. The answer does not depend on the order in
    which they run: equal |r| fall to the set that is first in lexical order. A SINGULAR test says nothing: it neither
    separates nor keeps a pair.

    Args:
        R: correlations, [..., T, T], as in `partial_correlation`.
        adjacency: the pairs to test, [..., T, T] bool, symmetric, none with itself.
        order: |S|, at least 0; with Triton at most 8.
        cut: the |r| below which a pair is independent, 0 < cut < 1: see `critical_correlation`.
        candidates: needed from order 2 on, allowed at order 1 in place of all neighbours.
        backend: "auto" takes Triton for CUDA tensors up to order 8, of float64 too, and torch otherwise.

    Returns:
        LevelTests, without gradient.

    Raises:
        ValueError: what `partial_correlation` says of R; an adjacency that does not fit, is not symmetric or has a
            loop; a negative order, a cut outside (0, 1); candidates missing, at order 0, of another order, with a node
            or token out of range, a node in its own set or a token twice.
        TypeError: a dtype that does not fit.
        NotImplementedError: backend="triton" with candidates of order > 8 or without the triton package.

    Source: one factor for all pairs of a set as in cuPC-S (Zarebavani et al. 2020, arXiv:1812.08491), whose first
        writer wins; the order-independent level of Colombo and Maathuis 2014 ("PC-stable").

    Example:
        >>> R = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.25], [0.5, 0.25, 1.0]], dtype=torch.float64)
        >>> found = level_tests(R, ~torch.eye(3, dtype=torch.bool), 1, cut=0.1)
        >>> found.independent[1, 2], found.given[1, 2]
        (tensor(True), tensor([0]))
    """
    flat = check_correlation(R)
    adjacency = check_adjacency(adjacency, R)
    if isinstance(order, bool) or not isinstance(order, Integral) or order < 0:
        raise ValueError(f"order must be an integer of at least 0, got {order!r}")
    order, cut = int(order), check_cut(cut)
    if candidates is None and order > 1:
        raise ValueError(f"candidates must be given from order 2 on, got None at order {order}")
    if candidates is not None and order == 0:
        raise ValueError("candidates must be None at order 0, whose only set is empty")
    if order == 0:
        r, given, counts = _level_zero(flat, adjacency)
    elif candidates is None:
        r, given, counts = _level_one(flat, adjacency, backend)
    elif backend == "triton" and order > MOST:
        raise NotImplementedError(f"backend='triton' takes candidates up to order {MOST}, got {order}")
    else:
        node, sets, ancestors, others = check_candidates(candidates, R, order)
        tested = adjacency if others is None else adjacency & others
        r, given, counts = _level_sets(flat, tested, node, sets, ancestors, backend if order <= MOST else "torch")
    tests, singular = counts.sum(1).reshape(*R.shape[:-2], 2).unbind(-1)
    r, given = r.reshape(R.shape), given.reshape(*R.shape, order)
    return LevelTests(r, given, r.abs() < cut, tests, singular)


def _level_zero(R: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = R.clamp(-1, 1).masked_fill_(~adjacency, torch.nan)
    tests = adjacency.triu(1).sum(2)
    return r, R.new_empty(*R.shape, 0, dtype=torch.int64), torch.stack([tests, torch.zeros_like(tests)], 2)


def _level_one(R: Tensor, adjacency: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    r, place, counts = level_one(R, adjacency, backend)
    r, place = (x.triu(1) + x.triu(1).mT for x in (r.nan_to_num(posinf=2.0), place.long()))
    none = ~adjacency | (place < 0)
    return r.clamp(-1, 1).masked_fill_(none, torch.nan), place.masked_fill_(none, -1)[..., None], counts


def _level_sets(
    R: Tensor, adjacency: Tensor, node: Tensor, given: Tensor, ancestors: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    G, T, _ = R.shape
    if given.shape[1] == 0:
        # what fills up, so that every pair has a set to point at
        node, given = F.pad(node, (0, 1), value=-1), F.pad(given, (0, 0, 0, 1), value=-1)
    node, given, rank = _ordered(node.expand(G, -1), given.expand(G, -1, -1), T)
    tokens = torch.arange(T + 1, device=R.device).expand(G, -1).contiguous()
    first = torch.searchsorted(node, tokens, out_int32=True)
    r, place, counts = level_sets(R, adjacency, ancestors, first, given, backend)
    place = place.long()
    # the pair as j has tested it, and the one of lesser size, or of the set that comes first
    size, theirs = r.abs(), r.abs().mT
    ranks = rank.gather(1, place.clamp(min=0).flatten(1)).view_as(place).masked_fill_(place < 0, rank.shape[1])
    mine = (size < theirs) | ((size == theirs) & (ranks <= ranks.mT))
    r, place = torch.where(mine, r, r.mT), torch.where(mine, place, place.mT)
    none = place < 0
    chosen = _at(given, place.clamp(min=0).flatten(1)).view(G, T, T, -1)
    return r.masked_fill_(none, torch.nan), chosen.masked_fill_(none[..., None], -1), counts


def _ordered(node: Tensor, given: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates by node and then by set in lexical order, what fills up last, node T; and the rank of each set."""
    given = given.sort(-1).values
    places = torch.arange(node.shape[1], device=node.device).expand(node.shape)
    for column in reversed(given.unbind(-1)):
        places = places.gather(1, column.gather(1, places).argsort(dim=1, stable=True))
    sets = _at(given, places)
    changes = F.pad((sets[:, 1:] != sets[:, :-1]).any(-1), (1, 0))
    by_node = node.masked_fill(node < 0, T).gather(1, places)
    node, order = by_node.sort(dim=1, stable=True)
    sets = _at(sets, order)
    return node, sets.contiguous(), changes.cumsum(1).gather(1, order)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x [G, N, m] at places [G, n]: [G, n, m]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))

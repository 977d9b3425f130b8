"""Every test of a level, reduced to each pair's least |r|: the passes behind `level_tests`."""

import torch
from torch import Tensor

from .._backend import use_triton
from .factor import decide, factorize, pivot_floor, solve, unexplained

ROWS_AT_ONCE = 32
# of a node's tests
TESTS_AT_ONCE = 2**16


@torch.library.custom_op("causalattn::level_one", mutates_args=())
def level_one(R: Tensor, adjacency: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """r and place [G, T, T] of the least |r(i, j | k)| over k next to i or j, for every i < j; counts as `level_sets`.

    R [G, T, T] and adjacency bool. r is ∞ and place −1 where nothing could be decided, anything for i ≥ j; place int32.
    """
    left = 1 - R * R
    known = left > pivot_floor(R.dtype)
    known.diagonal(dim1=1, dim2=2).zero_()
    inverse = left.rsqrt().masked_fill_(~known, torch.nan)
    counts = _count(adjacency, known)
    if use_triton(backend, R, float64=True):
        from ..kernels.partial_corr.level import level_one_fwd

        return *level_one_fwd(R, inverse, adjacency), counts
    r, place = torch.full_like(R, torch.inf), torch.full_like(R, -1, dtype=torch.int32)
    for each in zip(R, inverse, adjacency, r, place, strict=True):
        for m in range(0, R.shape[1], ROWS_AT_ONCE):
            _one_of_rows(*each, m)
    return r, place, counts


@level_one.register_fake
def _(R, adjacency, backend):
    return torch.empty_like(R), torch.empty_like(R, dtype=torch.int32), R.new_empty(*R.shape[:2], 2, dtype=torch.int64)


def _one_of_rows(R: Tensor, inverse: Tensor, adjacency: Tensor, r: Tensor, place: Tensor, m: int) -> None:
    """Fill rows m… of r and place, from column m on."""
    rows = slice(m, m + ROWS_AT_ONCE)
    tile = R[rows, m:].contiguous()
    least, where = torch.full_like(tile, torch.inf), torch.full_like(tile, -1)
    x, size = torch.empty_like(tile), torch.full_like(tile, torch.inf)
    better, near = torch.empty_like(tile, dtype=torch.bool), torch.empty_like(tile, dtype=torch.bool)
    for k in range(R.shape[0]):
        torch.addr(tile, R[k, rows], R[k, m:], alpha=-1, out=x)
        x.mul_(inverse[k, rows, None]).mul_(inverse[k, None, m:])
        torch.logical_or(adjacency[k, rows, None], adjacency[k, None, m:], out=near)
        # a NaN is never less
        torch.lt(x.abs(), size, out=better).logical_and_(near)
        torch.where(better, x, least, out=least)
        torch.abs(least, out=size)
        where.masked_fill_(better, k)
    r[rows, m:], place[rows, m:] = least, where.to(torch.int32)


def _count(adjacency: Tensor, known: Tensor) -> Tensor:
    """Tests (i, j | k) and SINGULAR ones of each i, [G, T, 2]; i < j."""
    near, good = adjacency.double(), known.double()
    both, pairs = near * good, near.triu(1)
    apart = 1 - torch.eye(near.shape[1], dtype=near.dtype, device=near.device)
    near, others = near * apart, apart.expand_as(near)

    def over_k(x: Tensor, y: Tensor) -> Tensor:
        """How many k are near i or j and good for both."""
        return x @ y.mT + y @ x.mT - x @ x.mT

    tests, decided = over_k(near, others), over_k(both, good)
    # k = i and k = j are near the other one
    return torch.stack([(pairs * x).sum(2) for x in (tests, tests - decided)], 2).long()


@torch.library.custom_op("causalattn::level_sets", mutates_args=())
def level_sets(
    R: Tensor, adjacency: Tensor, ancestors: Tensor | None, first: Tensor, given: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """r and place [G, T, T] of the least |r(node, j | S)| over the node's sets, for every j next to it; counts.

    given [G, N, M] int64, those of node t from first[:, t] to first[:, t + 1]; -1 pads a set. With ancestors [G, T, T]
    bool every member is one of the node or of j: ancestors[member, token]. r is ∞ and place −1 where nothing could be
    decided. counts [G, T, 2] int64: tests and SINGULAR ones of each node.
    """
    if use_triton(backend, R, float64=True):
        from ..kernels.partial_corr.level import level_sets_fwd

        return level_sets_fwd(R, adjacency, ancestors, first, given, pivot_floor(R.dtype))
    G, T, _ = R.shape
    r, place = torch.full_like(R, torch.inf), torch.full_like(R, -1, dtype=torch.int32)
    counts = R.new_zeros(G, T, 2, dtype=torch.int64)
    for g in range(G):
        bounds = first[g].tolist()
        may = None if ancestors is None else ancestors[g]
        for node in range(T):
            others = adjacency[g, node].nonzero()[:, 0]
            step = max(1, TESTS_AT_ONCE // max(1, len(others)))
            for n in range(bounds[node], bounds[node + 1] if len(others) else 0, step):
                sets = given[g, n : min(n + step, bounds[node + 1])]
                x, tested = _sets_of_node(R[g], may, node, others, sets)
                counts[g, node] += torch.stack([tested.sum(), (tested & x.isnan()).sum()])
                size, at = torch.where(tested & ~x.isnan(), x.abs(), torch.inf).min(0)
                better = size < r[g, node, others].abs()
                r[g, node, others[better]] = x.gather(0, at[None])[0, better]
                place[g, node, others[better]] = (at[better] + n).int()
    return r, place, counts


@level_sets.register_fake
def _(R, adjacency, ancestors, first, given, backend):
    return torch.empty_like(R), torch.empty_like(R, dtype=torch.int32), R.new_empty(*R.shape[:2], 2, dtype=torch.int64)


def _sets_of_node(
    R: Tensor, ancestors: Tensor | None, node: int, others: Tensor, sets: Tensor
) -> tuple[Tensor, Tensor]:
    """r(node, j | S) and whether it is a test, [sets, others]."""
    tested = (sets[:, :, None] != others).all(1) & (sets != node).all(1)[:, None]
    members, there = sets.clamp(min=0).unbind(1), (sets >= 0).unbind(1)
    if ancestors is not None:
        for member, known in zip(members, there, strict=True):
            tested &= ancestors[member, node][:, None] | ancestors[member][:, others] | ~known[:, None]

    def entry(a: int, b: int) -> Tensor:
        return (R[members[a], members[b]] * (there[a] & there[b]))[:, None]

    M, columns = len(members), R[:, others]
    factor = factorize(entry, M, R.new_empty(len(sets), 1))
    w_i = solve(factor, [R[member, node, None] * known[:, None] for member, known in zip(members, there, strict=True)])
    w_j = solve(factor, [columns[member] * known[:, None] for member, known in zip(members, there, strict=True)])
    covariance = columns[node].expand(len(sets), -1).clone()
    for x, y in zip(w_i, w_j, strict=True):
        covariance.addcmul_(y, x, value=-1)
    left_i, left_j = unexplained(w_i, factor.pivot), unexplained(w_j, covariance)
    r, _ = decide(covariance, left_i, left_j, factor.pivot, pivot_floor(R.dtype))
    return r, tested

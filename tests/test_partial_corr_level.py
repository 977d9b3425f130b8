"""level_tests against the specification, which makes one test after another, on every path."""

import itertools
import time

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor
from helpers import DEVICE, PATHS, SEEDS, grown_memory, to_numpy
from hypothesis import example, given
from hypothesis import strategies as st

import causalattn as ca
from causalattn.reference import partial_corr as reference

CUT = 0.2


def some_graph(T, share, seed):
    adjacency = torch.rand(T, T, generator=torch.Generator().manual_seed(seed)) < share
    adjacency = adjacency.triu(1)
    return (adjacency | adjacency.T).to(DEVICE)


def every_set(T, order, share=1.0, seed=0):
    """Candidates in no order: each node's sets, members in no order either."""
    rng = np.random.default_rng(seed)
    found = [
        (node, tuple(rng.permutation(S).tolist()))
        for node in range(T)
        for S in itertools.combinations([t for t in range(T) if t != node], order)
        if rng.random() < share
    ]
    rng.shuffle(found)
    return found


def candidates(found, order, ancestors=None):
    node = torch.tensor([node for node, _ in found], dtype=torch.int64, device=DEVICE)
    given = torch.tensor([S for _, S in found], dtype=torch.int64, device=DEVICE).view(len(found), order)
    return ca.Candidates(node, given, ancestors)


def assert_is(found, R, best, tests, singular, *, ties=False):
    """found, of one matrix, is what the specification found; with ties another set may be as good but for rounding."""
    T = len(R)
    r, sets, independent = map(to_numpy, found[:3])
    assert (int(found.tests), int(found.singular)) == (tests, singular)
    for i, j in itertools.combinations(range(T), 2):
        for a, b in ((i, j), (j, i)):
            if (i, j) not in best:
                assert np.isnan(r[a, b]) and (sets[a, b] == -1).all() and not independent[a, b]
                continue
            value, S = best[i, j]
            chosen = tuple(sets[a, b].tolist())
            assert abs(r[a, b] - value) < 1e-11, (a, b)
            again = reference.partial_correlation(R, i, j, chosen)[0] if ties else value
            assert chosen == S or (ties and abs(abs(again) - abs(value)) < 1e-11), (a, b)
            assert independent[a, b] == (abs(r[a, b]) < CUT)
    assert np.isnan(np.diagonal(r)).all()


@pytest.mark.parametrize("backend", PATHS)
@given(
    T=st.sampled_from([1, 2, 9, 33]), order=st.sampled_from([0, 1]), share=st.sampled_from([0.0, 0.3, 1.0]), seed=SEEDS
)
def test_every_set_of_neighbours(backend, T, order, share, seed):
    R, adjacency = correlation(attention(T, S=T + 5, seed=seed)), some_graph(T, share, seed)
    found = ca.level_tests(tensor(R), adjacency, order, cut=CUT, backend=backend)
    assert_is(found, R, *reference.level_tests(R, to_numpy(adjacency), order))


@pytest.mark.parametrize("backend", PATHS)
@given(
    T=st.sampled_from([4, 9, 12]),
    order=st.integers(1, 4),
    share=st.sampled_from([0.2, 1.0]),
    limited=st.booleans(),
    seed=SEEDS,
)
@example(12, 4, 1.0, False, 0)
def test_sets_that_are_handed_in(backend, T, order, share, limited, seed):
    R, adjacency = correlation(attention(T, S=T + 5, seed=seed)), some_graph(T, 0.7, seed)
    found = every_set(T, order, share * min(1.0, 200 / T**order), seed)
    ancestors = (torch.rand(T, T, generator=torch.Generator().manual_seed(seed)) < 0.6).to(DEVICE) if limited else None
    result = ca.level_tests(
        tensor(R), adjacency, order, cut=CUT, candidates=candidates(found, order, ancestors), backend=backend
    )
    limits = None if ancestors is None else to_numpy(ancestors)
    assert_is(result, R, *reference.level_tests(R, to_numpy(adjacency), order, found, limits))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", PATHS)
def test_singular_tests_neither_separate_nor_keep(backend, order):
    A = attention(8, S=20)
    A[3], A[5] = A[1], A[1]
    R = correlation(A)
    R[[1, 1, 3], [3, 5, 5]] = R[[3, 5, 5], [1, 1, 3]] = 1.0
    adjacency = some_graph(8, 1.1, 0)
    found = every_set(8, order) if order > 1 else None
    handed = None if found is None else candidates(found, order)
    result = ca.level_tests(tensor(R), adjacency, order, cut=CUT, candidates=handed, backend=backend)
    best, tests, singular = reference.level_tests(R, to_numpy(adjacency), order, found)
    assert singular > 0
    assert_is(result, R, best, tests, singular, ties=True)


@pytest.mark.parametrize("backend", PATHS)
def test_ties_fall_to_the_first_set(backend):
    # every r given one other token is the same number
    R = torch.full((6, 6), 0.5, dtype=torch.float64, device=DEVICE).fill_diagonal_(1)
    adjacency = ~torch.eye(6, dtype=torch.bool, device=DEVICE)
    one = ca.level_tests(R, adjacency, 1, cut=CUT, backend=backend).given[..., 0]
    found = every_set(6, 2)
    two = ca.level_tests(R, adjacency, 2, cut=CUT, candidates=candidates(found, 2), backend=backend).given
    for i, j in itertools.permutations(range(6), 2):
        rest = [t for t in range(6) if t not in (i, j)]
        assert int(one[i, j]) == rest[0]
        assert two[i, j].tolist() == rest[:2]
    # whichever of the pair hands it in
    for found in ([(0, (2, 3)), (1, (4, 5))], [(0, (4, 5)), (1, (2, 3))]):
        two = ca.level_tests(R, adjacency, 2, cut=CUT, candidates=candidates(found, 2), backend=backend).given
        assert two[0, 1].tolist() == two[1, 0].tolist() == [2, 3]


@pytest.mark.parametrize("backend", PATHS)
@given(seed=SEEDS)
def test_renaming_the_tokens_renames_the_answer(backend, seed):
    R, adjacency = tensor(correlation(attention(11, S=30, seed=seed))), some_graph(11, 0.8, seed)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    plain = ca.level_tests(R, adjacency, 1, cut=CUT, backend=backend)
    renamed = ca.level_tests(R[order][:, order], adjacency[order][:, order], 1, cut=CUT, backend=backend)
    assert (plain.r[order][:, order] - renamed.r).abs().nan_to_num(0).max() < 1e-14
    names = torch.cat([order, order.new_tensor([-1])])
    assert torch.equal(plain.given[order][:, order], names[renamed.given])
    assert torch.equal(plain.independent[order][:, order], renamed.independent)


@pytest.mark.parametrize("backend", PATHS)
def test_heads_at_once_with_candidates_of_their_own(backend):
    R = torch.stack([tensor(correlation(attention(9, S=30, seed=s))) for s in range(4)]).view(2, 2, 9, 9)
    adjacency = torch.stack([some_graph(9, 0.8, s) for s in range(4)]).view(2, 2, 9, 9)
    found = [every_set(9, 2, share, seed) for seed, share in enumerate([0.2, 0.0, 1.0, 0.5])]
    M = max(map(len, found))
    node = torch.stack([torch.tensor([n for n, _ in f] + [-1] * (M - len(f))) for f in found]).view(2, 2, M)
    given = torch.stack([torch.tensor([S for _, S in f] + [(0, 1)] * (M - len(f))) for f in found]).view(2, 2, M, 2)
    handed = ca.Candidates(node.to(DEVICE), given.to(DEVICE))
    both = ca.level_tests(R, adjacency, 2, cut=CUT, candidates=handed, backend=backend)
    ones = ca.level_tests(R, adjacency, 1, cut=CUT, backend=backend)
    assert both.r.shape == (2, 2, 9, 9) and both.given.shape == (2, 2, 9, 9, 2) and both.tests.shape == (2, 2)
    for n, (b, h) in enumerate(itertools.product(range(2), repeat=2)):
        alone = ca.level_tests(
            R[b, h], adjacency[b, h], 2, cut=CUT, candidates=candidates(found[n], 2), backend=backend
        )
        assert all(torch.equal(x[b, h].nan_to_num(9), y.nan_to_num(9)) for x, y in zip(both, alone, strict=True))
        alone = ca.level_tests(R[b, h], adjacency[b, h], 1, cut=CUT, backend=backend)
        assert all(torch.equal(x[b, h].nan_to_num(9), y.nan_to_num(9)) for x, y in zip(ones, alone, strict=True))


def test_sets_beyond_the_kernels_registers():
    found = every_set(11, 9)
    R, adjacency = correlation(attention(11, S=40)), some_graph(11, 1.1, 0)
    result = ca.level_tests(tensor(R), adjacency, 9, cut=CUT, candidates=candidates(found, 9))
    assert_is(result, R, *reference.level_tests(R, to_numpy(adjacency), 9, found))
    with pytest.raises(NotImplementedError, match="backend='triton' takes candidates up to order 8, got 9"):
        ca.level_tests(tensor(R), adjacency, 9, cut=CUT, candidates=candidates(found, 9), backend="triton")


@pytest.mark.full
def test_every_test_of_512_tokens():
    R = tensor(correlation(attention(512, S=700, spread=2.0)))
    adjacency = ~torch.eye(512, dtype=torch.bool, device=DEVICE)
    start = time.perf_counter()
    found = ca.level_tests(R, adjacency, 1, cut=CUT)
    assert int(found.tests) == 512 * 511 // 2 * 510 and time.perf_counter() - start < 60
    i, j = torch.randint(512, (2, 200), device=DEVICE)
    keep = i != j
    i, j = i[keep], j[keep]
    again = ca.partial_correlation(R, i, j, found.given[i, j]).r
    assert (again - found.r[i, j]).abs().max() < 1e-12


DEFINITION = """
import itertools
def run(T):
    n = min(T, 600) // 10
    A = torch.rand(n, 2 * n, dtype=torch.float64)
    R = torch.corrcoef(A)
    given = torch.combinations(torch.arange(n), 2)
    node = torch.arange(n).repeat_interleave(len(given))
    given = given.repeat(n, 1)
    keep = (given != node[:, None]).all(1)
    handed = ca.Candidates(node[keep], given[keep])
    return ca.level_tests(R, ~torch.eye(n, dtype=torch.bool), 2, cut=0.1, candidates=handed)
"""


def test_tests_are_not_written_out():
    # 60 tokens: 100 thousand sets, 6 million tests, of which one number each would be 48 MB
    (grown,) = grown_memory(DEFINITION, 600)
    assert grown < 40_000, f"{grown} KiB"


GOOD = torch.eye(4, dtype=torch.float64)
ALL = ~torch.eye(4, dtype=torch.bool)
PAIR = ca.Candidates(torch.tensor([0]), torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((GOOD, ALL[:3], 0), {}, ValueError, r"adjacency must have R's shape \[4, 4\], got \[3, 4\]"),
        ((GOOD, ALL.int(), 0), {}, TypeError, "adjacency must be a bool tensor, got int32"),
        ((GOOD, ALL.triu(), 0), {}, ValueError, "adjacency must be symmetric"),
        ((GOOD, ~ALL, 0), {}, ValueError, "adjacency must have no loops"),
        ((GOOD, ALL, -1), {}, ValueError, "order must be an integer of at least 0, got -1"),
        ((GOOD, ALL, 1.0), {}, ValueError, "order must be an integer of at least 0, got 1.0"),
        ((GOOD, ALL, 0), {"cut": 0.0}, ValueError, "cut must lie between 0 and 1, got 0.0"),
        ((GOOD, ALL, 0), {"cut": float("nan")}, ValueError, "cut must lie between 0 and 1, got nan"),
        ((GOOD, ALL, 0), {"cut": None}, TypeError, "cut must be a number, got NoneType"),
        ((GOOD, ALL, 2), {"candidates": {"node": [0]}}, TypeError, "candidates must be Candidates, got dict"),
        ((GOOD, ALL, 2), {}, ValueError, "candidates must be given from order 2 on"),
        ((GOOD, ALL, 0), {"candidates": PAIR}, ValueError, "candidates must be None at order 0"),
        ((GOOD, ALL, 3), {"candidates": PAIR}, ValueError, "given one axis more, of order = 3"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(node=torch.tensor([4]))}, ValueError, "node must lie in -1…3"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(node=torch.tensor([1]))}, ValueError, "not hold its own node"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(given=torch.tensor([[1, 4]]))}, ValueError, "must lie in -1"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(given=torch.tensor([[1, 1]]))}, ValueError, "hold a token once"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(ancestors=ALL[:2])}, ValueError, "ancestors must have R's shape"),
        ((GOOD, ALL, 2), {"candidates": PAIR._replace(node=torch.tensor([0.5]))}, TypeError, "node must hold integers"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ca.level_tests(*arguments, **{"cut": 0.5, **options})

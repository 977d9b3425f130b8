"""Single tests and surrogate data against the batched tests, and inside a search written by others."""

from itertools import combinations

import numpy as np
import pytest
import torch
from correlations import ROUNDINGS, attention, correlation, smallest_pivot, some_tests, tensor
from helpers import SEEDS
from hypothesis import given
from hypothesis import strategies as st

import causalattn as ca
from causalattn.discovery import CorrelationTest, surrogate_data


@given(m=st.integers(0, 8), sink=st.sampled_from([0.0, 4.0, 8.0]), seed=SEEDS)
def test_one_at_a_time_is_all_at_once(m, sink, seed):
    R = tensor(correlation(attention(20, causal=sink > 0, sink=sink, seed=seed))).cpu()
    i, j, given = (x.cpu() for x in some_tests(20, 30, m, seed))
    batch = ca.partial_correlation(R, i, j, given)
    test = CorrelationTest(R, cut=0.3)
    for n in range(len(i)):
        S = [t for t in given[n].tolist() if t >= 0]
        r, status = test.correlation(int(i[n]), int(j[n]), S)
        assert status == batch.status[n]
        bound = 2 * ROUNDINGS * 2**-53 / smallest_pivot(R.numpy(), [*S, int(i[n]), int(j[n])])
        assert abs(r - float(batch.r[n])) <= bound
        independent = status != ca.Status.SINGULAR and abs(r) < 0.3
        assert test.cond_indep(int(i[n]), int(j[n]), set(S)) == independent
    assert test.tests == 2 * len(i) and test.singular == 2 * int((batch.status == ca.Status.SINGULAR).sum())


def skeleton(test, nodes):
    """The first levels of a search as causality-lab asks its tests: cond_indep(x, y, zz) and nothing else."""
    edges = set(combinations(nodes, 2))
    for order in range(3):
        for x, y in sorted(edges):
            others = [z for z in nodes if z not in (x, y) and {(min(x, z), max(x, z)), (min(y, z), max(y, z))} & edges]
            if any(test.cond_indep(x, y, zz) for zz in combinations(others, order)):
                edges.discard((x, y))
    return edges


def test_a_search_finds_the_chain():
    # 0 → 1 → 2 → 3 with unit noise, from the population
    A = np.tril(0.8 ** np.subtract.outer(np.arange(4), np.arange(4)).clip(0))
    R = tensor(correlation(A)).cpu()
    assert skeleton(CorrelationTest(R, cut=1e-9), range(4)) == {(0, 1), (1, 2), (2, 3)}
    # a cut from n and alpha is the same test
    test = CorrelationTest(R, n=1000, alpha=0.01)
    assert test.cut(2) == ca.critical_correlation(1000, 0.01, 2)
    assert skeleton(test, range(4)) == {(0, 1), (1, 2), (2, 3)}


@given(T=st.sampled_from([1, 2, 15]), extra=st.sampled_from([2, 40]), sink=st.sampled_from([0.0, 6.0]), seed=SEEDS)
def test_surrogate_data_has_the_correlations(T, extra, sink, seed):
    R = correlation(attention(T, S=30, sink=sink, seed=seed))
    X = surrogate_data(tensor(R).cpu(), T + extra, generator=torch.Generator().manual_seed(seed))
    assert X.shape == (T + extra, T) and X.dtype == torch.float64
    assert np.abs(np.corrcoef(X.numpy().T) - R).max() < 1e-12
    assert np.abs(X.numpy().mean(0)).max() < 1e-12
    again = surrogate_data(tensor(R).cpu(), T + extra, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(X, again)


def test_rows_that_are_dependent_have_surrogate_data_too():
    R = correlation(attention(12, S=5))
    X = surrogate_data(tensor(R).cpu(), 50)
    assert np.abs(np.corrcoef(X.numpy().T) - R).max() < 1e-7


EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"cut": 0.1, "n": 10, "alpha": 0.1}, {"n": 10}, {"alpha": 0.1}, {"cut": 0.1, "n": 5}]
)
def test_one_way_to_say_the_cut(options):
    with pytest.raises(ValueError, match="give cut, or n and alpha, got cut="):
        CorrelationTest(EYE, **options)


def test_bad_input():
    with pytest.raises(ValueError, match="cut must lie between 0 and 1, got 1"):
        CorrelationTest(EYE, cut=1)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 2"):
        CorrelationTest(EYE, n=100, alpha=2)
    with pytest.raises(ValueError, match=r"R must be one matrix \[T, T\], got \[2, 3, 3\]"):
        CorrelationTest(EYE.expand(2, 3, 3), cut=0.5)
    with pytest.raises(ValueError, match="R must have 1 on its diagonal"):
        CorrelationTest(2 * EYE, cut=0.5)
    test = CorrelationTest(EYE, cut=0.5)
    for x, y, zz in ((0, 0, ()), (0, 1, (1,)), (0, 1, (0, 2))):
        with pytest.raises(ValueError, match="x and y must be two tokens outside the set"):
            test.cond_indep(x, y, zz)
    with pytest.raises(ValueError, match=r"tokens must lie in 0…2, got \[0, 3\]"):
        test.cond_indep(0, 3, ())
    with pytest.raises(ValueError, match="n must be greater than T = 3, got 3"):
        surrogate_data(EYE, 3)
    indefinite = torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]], dtype=torch.float64)
    with pytest.raises(ValueError, match="R must be positive semidefinite, got an eigenvalue of"):
        surrogate_data(indefinite, 10)

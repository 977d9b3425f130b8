"""Explanations against the specification's candidates, which are looked for one set at a time."""

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor
from hypothesis import given
from hypothesis import strategies as st

from causalattn.discovery import PAG, discover, explain
from causalattn.reference import discovery as reference


def found_in(marks):
    """A discovery of any graph."""
    return discover(torch.eye(len(marks), dtype=torch.float64), cut=0.5)._replace(pag=PAG(marks))


def some_marks(seed, T):
    rng = np.random.default_rng(seed)
    marks = np.triu(rng.random((T, T)) < 0.5, 1) * rng.integers(1, 4, (T, T))
    return (marks + ((marks > 0) * rng.integers(1, 4, (T, T))).T).astype(np.int8)


@given(seed=st.integers(0, 10**6), max_size=st.sampled_from([1, 3, None]), max_range=st.sampled_from([1, 2, 3, None]))
def test_every_candidate_is_asked_in_order(seed, max_size, max_range):
    marks, asked = some_marks(seed, 6), []

    def tester(sets, target):
        assert target == 0 and len(sets) <= 4
        asked.extend(sets)
        return [False] * len(sets)

    explained = explain(found_in(marks), 0, tester, max_size=max_size, max_range=max_range, batch=4)
    expected = reference.explanation_sets(marks, 0, max_size, max_range)
    assert asked == [S for S, _ in expected]
    assert explained == ([], len(expected))


@given(seed=st.integers(0, 10**6))
def test_the_first_size_that_changes_the_prediction(seed):
    marks = some_marks(seed, 6)
    rng = np.random.default_rng(seed)
    candidates = reference.explanation_sets(marks, 2)
    flips = {S for S, _ in candidates if rng.random() < 0.1 * len(S)}
    explained = explain(found_in(marks), 2, lambda sets, _: [S in flips for S in sets])
    least = min((len(S) for S in flips), default=None)
    assert [tuple(x) for x in explained.found] == [(S, far) for S, far in candidates if S in flips and len(S) == least]
    assert explained.tested == sum(least is None or len(S) <= least for S, _ in candidates)


def test_heads_are_pooled():
    one, other = np.zeros((4, 4), np.int8), np.zeros((4, 4), np.int8)
    one[0, 1] = one[1, 0] = 1
    other[0, 2] = other[2, 0] = other[0, 1] = other[1, 0] = 1
    asked = []
    explained = explain(
        [found_in(one), found_in(other)], 0, lambda sets, _: [asked.append(S) or S == (2,) for S in sets]
    )
    assert asked == [(1,), (2,)] and explained.found == [((2,), 1)]
    assert explain(found_in(one), 3, lambda sets, _: [True for _ in sets]) == ([], 0)


def test_bad_input():
    found = discover(tensor(correlation(attention(4, S=9))).cpu(), cut=0.2)
    for discoveries, arguments, message in (
        ([], {}, "discoveries must hold at least one graph"),
        ([found, discover(torch.eye(3), cut=0.5)], {}, "discoveries must be over the same tokens"),
        (found, {"target": 4}, "target must lie in 0…3, got 4"),
        (found, {"max_size": 0}, "max_size must be at least 1, got 0"),
        (found, {"batch": 0}, "batch must be at least 1, got 0"),
        (found, {"tester": lambda sets, target: []}, "tester must answer each of the"),
    ):
        options = {"target": 0, "tester": lambda sets, target: [False for _ in sets], **arguments}
        with pytest.raises(ValueError, match=message):
            explain(discoveries, **options)

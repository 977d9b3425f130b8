"""The graphs of a sweep of cuts are those of single searches, and so are what they share."""

import re

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor
from helpers import SEEDS
from hypothesis import given

from causalattn.discovery import discover, sweep_cuts


@given(seed=SEEDS)
def test_shares_are_counted(seed):
    R = tensor(correlation(attention(7, S=12, seed=seed))).cpu()
    cuts = [0.3, 0.1, 0.6]
    told = []
    sweep = sweep_cuts(R, cuts, max_order=1, progress=lambda *x: told.append(x))
    alone = [discover(R, cut=cut, max_order=1).pag for cut in sorted(cuts)]
    assert told == [(1, 3), (2, 3), (3, 3)] and sweep.cuts == (0.1, 0.3, 0.6)
    assert [each.pag for each in sweep.found] == alone
    for a, b in np.ndindex(7, 7):
        marks = [int(pag.marks[a, b]) for pag in alone if pag.marks[a, b]]
        assert sweep.edges[a, b] == pytest.approx(len(marks) / 3)
        shares = [sweep.arrows[a, b], sweep.tails[a, b]]
        expected = [marks.count(mark) / len(marks) if marks else np.nan for mark in (2, 3)]
        np.testing.assert_allclose(shares, expected)


def test_in_a_known_order():
    R = tensor(correlation(attention(7, S=12))).cpu()
    sweep = sweep_cuts(R, [0.2], order="time")
    assert sweep.found[0].pag == discover(R, cut=0.2, order="time").pag
    upper = np.triu_indices(7, 1)
    assert np.nanmin(sweep.arrows[upper]) == 1


def test_bad_input():
    R = torch.eye(3, dtype=torch.float64)
    for cuts, options, message in [
        ([], {}, "cuts must be distinct and at least one, got []"),
        ([0.2, 0.2], {}, "cuts must be distinct and at least one, got [0.2, 0.2]"),
        ([0.2, 1.0], {}, "cut must lie between 0 and 1, got 1.0"),
        ([0.3, 1.0], {"on_level": lambda found: 1 / 0}, "cut must lie between 0 and 1, got 1.0"),
        ([0.2], {"n": 30, "alpha": 0.1}, "cuts takes the place of cut, n and alpha, got alpha, n"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            sweep_cuts(R, cuts, **options)

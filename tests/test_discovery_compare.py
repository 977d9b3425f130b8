"""Agreement of two graphs, counted by hand and held to what must be true of any two."""

import math
import re
from itertools import permutations

import numpy as np
import pytest
from graphs import graph
from hypothesis import given
from hypothesis import strategies as st

from causalattn.discovery import PAG, compare


def marks(T):
    """A graph's marks, any at either end of any edge."""
    ends = st.one_of(st.just((0, 0)), st.tuples(st.integers(1, 3), st.integers(1, 3)))

    def build(pairs):
        matrix = np.zeros((T, T), int)
        for (a, b), (at_a, at_b) in zip(zip(*np.triu_indices(T, 1), strict=True), pairs, strict=True):
            matrix[a, b], matrix[b, a] = at_b, at_a
        return PAG(matrix)

    return st.lists(ends, min_size=T * (T - 1) // 2, max_size=T * (T - 1) // 2).map(build)


def test_by_hand():
    truth = PAG(graph("0 o-> 1, 2 --> 1, 2 --> 3, 3 <-> 4", 6))
    found = PAG(graph("0 o-> 1, 2 <-> 1, 2 o-o 3, 4 --> 5", 6))
    got = compare(found, truth)
    assert got[:4] == (3 / 4, 3 / 4, 3 / 4, 4 / 15)
    # of the shared edges 0-1, 1-2, 2-3: arrows found at 1, 1, 2 and true at 1, 1, 3; a true tail at 2 twice
    assert got[4:6] == (2 / 3, 2 / 3)
    assert math.isnan(got.tail_precision) and got.tail_recall == 0
    # 1-2 at 2, 2-3 at both ends, 3-4 and 4-5 whole
    assert got.distance == 7


@given(found=marks(5), truth=marks(5))
def test_of_any_two(found, truth):
    there, back = compare(found, truth), compare(truth, found)
    swapped = (back.recall, back.precision, back.f1, back.chance, back.arrow_recall, back.arrow_precision)
    np.testing.assert_equal(there[:6], swapped)
    assert there.distance == back.distance and (there.distance == 0) == (found == truth)
    both = there.precision + there.recall
    if both > 0:
        assert math.isclose(there.f1, 2 * there.precision * there.recall / both)
    order = [3, 1, 4, 0, 2]
    np.testing.assert_equal(compare(found.permuted(order), truth.permuted(order)), there)


def test_chance_is_the_mean_over_all_namings():
    truth, found = PAG(graph("0 --> 1, 1 --> 2, 3 <-> 4")), PAG(graph("0 o-o 4, 1 o-o 2", 5))
    f1 = [compare(PAG(found.permuted(order).marks), truth).f1 for order in permutations(range(5))]
    assert compare(found, truth).chance == pytest.approx(np.mean(f1), rel=1e-12)
    assert compare(PAG(np.zeros((5, 5), int)), truth).chance == 0


def test_graphs_without_edges_agree():
    got = compare(PAG(np.zeros((3, 3), int)), PAG(np.zeros((3, 3), int)))
    assert got.f1 == got.chance == 1 and got.distance == 0 and math.isnan(got.precision)


def test_bad_input_is_named():
    pag = PAG(graph("0 --> 1"))
    with pytest.raises(ValueError, match=re.escape("over the same tokens, got ('0', '1') and ('0', '1', '2')")):
        compare(pag, PAG(graph("0 --> 1", 3)))
    with pytest.raises(TypeError, match="truth must be a PAG, got ndarray"):
        compare(pag, pag.marks)

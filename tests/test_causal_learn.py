"""Our test inside causal-learn's own searches, against its own fisherz on the same data."""

import sys

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor

from causalattn.discovery import surrogate_data
from causalattn.integrations import causal_learn


@pytest.fixture(scope="module")
def searches():
    pytest.importorskip("causallearn")
    from causallearn.search.ConstraintBased.FCI import fci
    from causallearn.search.ConstraintBased.PC import pc
    from causallearn.utils.cit import CIT

    causal_learn.register()
    return {
        "pc": lambda data, test, **options: pc(data, 0.01, test, show_progress=False, **options).G.graph,
        "fci": lambda data, test, **options: fci(data, test, 0.01, show_progress=False, **options)[0].graph,
        "CIT": CIT,
    }


def linear_data(p, samples, seed):
    """Samples of a random linear model with unit noise."""
    rng = np.random.default_rng(seed)
    weights = np.tril(rng.uniform(0.5, 1.5, (p, p)) * rng.choice([-1, 0, 0, 1], (p, p)), -1)
    return rng.normal(size=(samples, p)) @ np.linalg.inv(np.eye(p) - weights).T


@pytest.mark.parametrize("search", ["pc", "fci"])
@pytest.mark.parametrize("seed", range(4))
def test_the_graph_is_that_of_fisherz(searches, search, seed, capsys):
    data = linear_data(10, 1000, seed)
    theirs, ours = (searches[search](data, test) for test in ("fisherz", "causalattn"))
    assert np.array_equal(theirs, ours) and ours.any()


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_p_values_are_those_of_fisherz(searches, k):
    data = linear_data(10, 400, 7)
    theirs, ours = (searches["CIT"](data, test) for test in ("fisherz", "causalattn"))
    rng = np.random.default_rng(k)
    for _ in range(50):
        x, y, *S = rng.permutation(10)[: k + 2].tolist()
        # fisherz takes p from 1 − Φ, whose rounding is of 1
        assert abs(ours(x, y, S) - theirs(x, y, S)) < 1e-12
    assert ours.singular == 0 and 0 < ours.tests <= 50


def test_correlations_of_attention_in_place_of_data(searches):
    R = correlation(attention(8, S=40, spread=2.0))
    data = surrogate_data(tensor(R).cpu(), 50).numpy()
    direct = searches["pc"](data, "causalattn", corr=R, n=768)
    assert np.array_equal(direct, searches["pc"](data, "causalattn", corr=torch.from_numpy(R), n=768))
    # as many samples with these correlations
    assert np.array_equal(direct, searches["pc"](surrogate_data(tensor(R).cpu(), 768).numpy(), "fisherz"))


def test_what_cannot_be_decided_is_dependent_and_counted(searches):
    R = np.ones((3, 3))
    test = searches["CIT"](np.random.default_rng(0).normal(size=(20, 3)), "causalattn", corr=R, n=100)
    assert test(0, 1) == 0 and test.singular == 0
    assert test(0, 1, [2]) == 0 and test.singular == 1
    # from its cache
    assert test(1, 0, [2]) == 0 and test.tests == 2


def test_bad_input(searches):
    data = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(ValueError, match=r"corr must have shape \[3, 3\], got \[2, 2\]"):
        searches["CIT"](data, "causalattn", corr=np.eye(2))
    with pytest.raises(ValueError, match=r"n must be greater than \|S\| \+ 3 = 4, got 4"):
        searches["CIT"](data, "causalattn", n=4)(0, 1, [2])
    with pytest.raises(ValueError, match="R must have 1 on its diagonal"):
        searches["CIT"](data, "causalattn", corr=2 * np.eye(3))


def test_registers_once_and_says_what_is_missing(searches, monkeypatch):
    from causallearn.utils import cit

    assert causal_learn.register() is causal_learn.register() is cit._custom_ci_tests["causalattn"]
    assert causal_learn.register("attention") is not causal_learn.register()
    cit._custom_ci_tests.pop("attention")
    for taken in ("fisherz", "theirs"):
        cit._custom_ci_tests["theirs"] = cit.FisherZ
        with pytest.raises(ValueError, match=f"name must be free, got '{taken}', which causal-learn has a test of"):
            causal_learn.register(taken)
    cit._custom_ci_tests.pop("theirs")
    monkeypatch.setitem(sys.modules, "causallearn", None)
    monkeypatch.setitem(sys.modules, "causallearn.utils", None)
    with pytest.raises(ImportError, match="causal-learn is not installed: pip install causal-learn"):
        causal_learn.register()

"""The study of models that are not linear, Gaussian or faithful: each violation against a closed form."""

import hard_models as study
import numpy as np
import pytest
from scores import truth_of
from study import markdown
from systems import System, random_system

from causalattn.discovery import compare

PAIR = System(np.array([[0, 1.5], [0, 0]]), [0, 1])


@pytest.fixture(scope="module")
def cases():
    return study.cases(3)


def correlation(name, strength, n=10**5):
    x = study.sample(PAIR, name, strength, np.random.default_rng(0), n)
    return np.corrcoef(x.T)[0, 1]


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        # E[z f(z)] / √E[f(z)²] of a standard normal z
        ("square", 0),
        ("sign", np.sqrt(2 / np.pi)),
        ("saturating, tanh 2x", None),
    ],
)
def test_an_effect_has_its_size_and_the_correlation_of_its_shape(shape, share):
    if share is None:
        z, weight = np.polynomial.hermite_e.hermegauss(80)
        f = np.tanh(2 * z)
        share = (weight * z * f).sum() / np.sqrt((weight * f * f).sum() * weight.sum())
    linear = 1.5 / np.sqrt(1.5**2 + 1)
    assert correlation(shape, 1) == pytest.approx(linear * share, abs=1e-2)
    assert correlation(shape, 0) == pytest.approx(linear, abs=1e-2)
    # half of it is linear
    part = (1 + share) / np.sqrt(2 + 2 * share)
    assert correlation(shape, 0.5) == pytest.approx(linear * part, abs=1e-2)


def test_without_violation_a_sample_is_that_of_the_linear_system(cases):
    system = cases[0].system
    for name in study.STRENGTHS:
        x = study.sample(system, name, 0, np.random.default_rng(5), 50)
        u = study.standard(np.random.default_rng(5).standard_normal((50, len(system.weights))))
        want = u @ np.linalg.inv(np.eye(len(system.weights)) - system.weights)
        np.testing.assert_allclose(x, want[:, system.observed], atol=1e-10)


def test_causes_add_what_their_weights_say():
    for seed in range(5):
        drawn = random_system(np.random.default_rng(seed), study.T)
        unit = study.unit(drawn)
        deviation = np.sqrt(study.covariance(unit.weights).diagonal())
        np.testing.assert_allclose(unit.weights * deviation[:, None], drawn.weights, rtol=1e-12)


def test_effects_cancel_as_told(cases):
    hit = 0
    for case in cases:
        for strength in (0.5, 1):
            system, chosen = study.cancelled(case.system, strength)
            moments = study.covariance(system.weights)[np.ix_(system.observed, system.observed)]
            without = system.weights.copy()
            for a, b in chosen:
                # what other paths carry, from the system without this edge
                without[:] = system.weights
                without[system.observed[a], system.observed[b]] = 0
                rest = study.covariance(without)[system.observed[a], system.observed[b]]
                assert moments[a, b] == pytest.approx(-(1 - strength) * rest, abs=1e-10) and abs(rest) > 1e-9
            assert len({b for _, b in chosen}) == len(chosen)
            assert truth_of(system).pag == case.truth.pag
            hit += len(chosen)
    assert hit > 0


def test_exact_correlations_fail_only_where_effects_cancel_out(cases):
    for case in cases:
        for name, n in ((study.CANCELLED, study.EXACT), (study.WEAK, study.FINE)):
            assert study.edges_of(study.correlations(case, name, 0.95, n), n) == case.truth.pag
        _, chosen = study.cancelled(case.system, 1)
        found = study.edges_of(study.correlations(case, study.CANCELLED, 1, study.EXACT), study.EXACT)
        assert not any(found.skeleton[pair] for pair in chosen)
        assert compare(found, case.truth.pag).recall < 1 or not chosen


def test_noise_is_standard_and_as_odd_as_told():
    rng = np.random.default_rng(0)
    for name, strengths in study.STRENGTHS.items():
        for strength in strengths:
            u = study.noise(name, strength, rng, (2000, 2))
            np.testing.assert_allclose([u.mean(0), u.std(0)], [[0, 0], [1, 1]], atol=1e-9)
    # the skewness of a log-normal, and the fourth moment of t, 3 + 6 / (df − 4)
    u = study.noise(study.SKEWED, 0.5, rng, (10**6,))
    assert (u**3).mean() == pytest.approx((np.exp(0.25) + 2) * np.sqrt(np.exp(0.25) - 1), rel=0.05)
    assert (study.noise(study.HEAVY, 0.1, rng, (10**6,)) ** 4).mean() == pytest.approx(4, rel=0.05)


def test_rows_begin_at_one_baseline_and_make_tables_and_a_figure(monkeypatch):
    monkeypatch.setattr(study, "T", 7)
    monkeypatch.setattr(study, "SAMPLES", (1000,))
    monkeypatch.setattr(study, "STRENGTHS", {name: (0, values[-1]) for name, values in study.STRENGTHS.items()})
    monkeypatch.setattr(study, "cases", lambda systems, cases=study.cases: cases(2))
    told = []
    rows = study.measure(True, lambda *x: told.append(x))
    assert told[-1] == (2, 2) and len(rows) == 2 * (7 * 2 + 3 * 2)
    for seed in range(2):
        start = [row for row in study.pick(rows, strength=0, n=1000, seed=seed) if row["violation"] != study.CANCELLED]
        assert len(start) == 6 and len({(row["f1"], row["edges"], row["null"]) for row in start}) == 1
    tables = study.tables(rows)
    assert len(tables) == 7 and tables[0].rows[0]["strength"] == "0" and "correlated at all" in markdown(tables[0])
    assert study.draw(rows).png().startswith(b"\x89PNG")

"""The study of linear models: its scores counted another way, and what every search must find with exact tests."""

import numpy as np
import pytest
from graphs import graph

pytest.importorskip("causallearn")

import linear_models as study
from causallearn.search.ConstraintBased.FCI import fci
from causallearn.search.ConstraintBased.PC import pc
from scores import blame, score, truth_of
from study import markdown
from systems import System

from causalattn.discovery import PAG, Mark
from causalattn.integrations import causal_learn


@pytest.fixture(scope="module")
def cases():
    return study.cases(2)


def chain(*weights):
    return System(np.diag(weights, 1), [*range(len(weights) + 1)])


def test_the_truth_is_that_of_the_correlations(cases):
    for case in cases:
        R, truth = case.system.correlations(), case.truth
        for (a, b), given in truth.sets.items():
            inverse = np.linalg.inv(R[np.ix_([a, b, *given], [a, b, *given])])
            assert abs(inverse[0, 1]) < 1e-9 and not truth.pag.skeleton[a, b]
        settled = truth.pag.marks != Mark.CIRCLE
        assert np.array_equal(truth.pag.marks[settled], truth.mag.marks[settled])
        below = case.system.weights[np.ix_(case.system.observed, case.system.observed)] != 0
        assert (truth.places[:, None] < truth.places)[below].all()


def test_marks_are_counted_by_hand():
    truth = truth_of(chain(1.0, 1.0))
    assert list(truth.pag.edges()) == [(0, 1, "o-o"), (1, 2, "o-o")]
    got = score(PAG(graph("0 --> 1, 2 --> 1", 3)), truth)
    # of 0 → 1 ← 2 both marks of the first edge are those of 0 → 1 → 2, none of the second
    assert got["marks"] == got["arrow_precision"] == got["tail_precision"] == got["arrows"] == 1 / 2
    assert np.isnan(got["arrow_recall"]) and got["distance"] == 4 and got["f1"] == 1
    assert got["chance"] == pytest.approx(2 / 3)


def test_blame_is_put_where_it_lies():
    system = chain(1.0, 0.01)
    R, truth = system.correlations(), truth_of(system)
    full, empty = PAG(1 - np.eye(3, dtype=int)), PAG(np.zeros((3, 3), int))
    assert blame(full, truth, R, 1000, 0.01) == {"missed": 0, "uncorrelated": 0, "extra": 1, "untried": 1}
    assert blame(empty, truth, R, 1000, 0.01) == {"missed": 2, "uncorrelated": 1, "extra": 0, "untried": 0}
    # a correlation that no model of this graph has
    wrong = np.array([[1, 0.1, 0.9], [0.1, 1, 0.1], [0.9, 0.1, 1]])
    assert blame(full, truth, wrong, 1000, 0.01)["untried"] == 0


def test_exact_correlations_give_the_true_graph(cases):
    for case in cases:
        R, places = study.correlations(case, study.EXACT), case.truth.places
        pags = {name: search(R, study.EXACT, places)[0] for name, search in study.SEARCHES.items()}
        assert pags["discover"] == case.truth.pag
        assert all(np.array_equal(pags[name].skeleton, case.truth.pag.skeleton) for name in [*pags][:4])
        ordered = score(pags["discover, order known"], case.truth)
        assert ordered["marks"] == 1 == ordered["arrow_recall"]
        assert pags["correlated at all"].skeleton.sum() > case.truth.pag.skeleton.sum()


def test_their_searches_are_those_of_the_data(cases, capsys):
    case = cases[0]
    data = case.system.sample(np.random.default_rng(0), 300)
    R = np.corrcoef(data.T)
    options = {"show_progress": False, "node_names": study.names(len(R))}
    direct = causal_learn.from_causal_learn(fci(data, "fisherz", study.ALPHA, **options)[0])
    found, tests = study.theirs(study.fci_of, R, 300)
    assert np.array_equal(found.marks, direct.marks) and tests > 0
    cpdag = pc(data, study.ALPHA, "fisherz", **options).G.graph
    found, _ = study.theirs(study.pc_of, R, 300)
    assert np.array_equal(found.skeleton, cpdag != 0)
    assert np.array_equal(found.marks == Mark.ARROW, cpdag.T == 1)


def test_the_cpdag_is_open_where_it_has_no_direction():
    collider = System(np.array([[0, 0, 1.0], [0, 0, 1], [0, 0, 0]]), [0, 1, 2])
    for system, edges in ((chain(1.0, 1.0), "0 o-o 1, 1 o-o 2"), (collider, "0 --> 2, 1 --> 2")):
        found, _ = study.theirs(study.pc_of, system.correlations(), study.EXACT)
        assert found == PAG(graph(edges, 3))


def test_draws_are_repeatable_and_the_null_is_independent(cases):
    case = cases[0]
    assert np.array_equal(study.correlations(case, 100), study.correlations(case, 100))
    assert not np.array_equal(study.correlations(case, 100), study.correlations(cases[1], 100))
    far = study.independent(case, 10000) - np.eye(len(case.system.observed))
    assert 0 < abs(far).max() < 0.06
    n = 10**5
    sampled = np.corrcoef(case.system.sample(np.random.default_rng(1), n).T)
    assert abs(sampled - case.system.correlations()).max() < 6 / np.sqrt(n)


def test_rows_make_tables_and_a_figure(monkeypatch):
    monkeypatch.setattr(study, "T", 7)
    monkeypatch.setattr(study, "SAMPLES", (100, study.EXACT))
    monkeypatch.setattr(study, "cases", lambda systems, cases=study.cases: cases(2))
    told = []
    rows = study.measure(True, lambda *x: told.append(x))
    assert told[-1] == (6, 6) and len(rows) == 5 * (6 * 2 + 2)
    assert {row["f1"] for row in study.pick(rows, search="discover", n=study.EXACT)} == {1.0}
    f1, *_ = study.tables(rows)
    assert f1.rows[0]["exact"] == "1.00 ± 0.00" and "discover" in markdown(f1)
    assert study.draw(rows).png().startswith(b"\x89PNG")

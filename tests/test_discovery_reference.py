"""The specification of causal discovery against definitions written another way, and against itself."""

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from graphs import SHAPES, dag_of, draws, graph, queries, random_dag

from causalattn.reference.discovery import (
    ARROW,
    RULES,
    TAIL,
    ancestors,
    d_separated,
    m_separated,
    mag,
    oracle,
    orient,
    pag_by_enumeration,
    separating_set,
    set_marks,
    true_pag,
)
from causalattn.reference.discovery.truth import is_ancestral


@pytest.fixture(params=SHAPES, ids=str)
def examples(request):
    return draws(request)


def paths(marks, x, y, path=()):
    path = (*path, x)
    if x == y:
        yield path
    for v in marks[x].nonzero()[0].tolist():
        if x != y and v not in path:
            yield from paths(marks, v, y, path)


def test_d_separation_is_networkxs(examples):
    for dag, observed, selected in examples(5, 2):
        nodes = nx.DiGraph(list(zip(*dag.nonzero(), strict=True)))
        nodes.add_nodes_from(range(len(dag)))
        for x, y, given in queries(len(observed)):
            expected = nx.is_d_separator(nodes, x, y, {*given, *selected})
            assert d_separated(dag, x, y, [*given, *selected]) == expected


def test_m_separation_is_that_of_paths(examples):
    for example in examples(5, 2):
        marks = mag(*example)
        above = ancestors((marks == ARROW) & (marks.T == TAIL))
        for x, y, given in queries(len(marks)):
            passing = [
                all(
                    above[v, list(given)].any() if marks[u, v] == ARROW == marks[w, v] else v not in given
                    for u, v, w in zip(path, path[1:], path[2:], strict=False)
                )
                for path in paths(marks, x, y)
            ]
            assert m_separated(marks, x, y, given) == (not any(passing))


def test_a_mag_separates_what_its_dag_separates(examples):
    for dag, observed, selected in examples(5, 3):
        order = np.random.default_rng(len(dag)).permutation(observed).tolist()
        marks = mag(dag, order, selected)
        assert is_ancestral(marks) and np.array_equal(marks > 0, marks.T > 0)
        independent = oracle(dag, order, selected)
        for x, y in combinations(range(len(order)), 2):
            sets = [given for a, b, given in queries(len(order)) if (a, b) == (x, y)]
            separating = [given for given in sets if independent(x, y, given)]
            assert separating == [given for given in sets if m_separated(marks, x, y, given)]
            assert (marks[x, y] == 0) == bool(separating)
            assert (separating_set(dag, order, selected, x, y) is None) == (not separating)


@pytest.mark.parametrize(
    ("edges", "observed", "selected", "expected"),
    [
        ("0>1", [0, 1], [], "0 --> 1"),
        ("0>1", [1, 0], [], "1 --> 0"),
        ("2>0 2>1", [0, 1], [], "0 <-> 1"),
        ("0>2 1>2", [0, 1], [2], "0 --- 1"),
        ("0>2 2>1", [0, 1], [], "0 --> 1"),
        # given 1 the way from 0 to 2 is open through the latent 3
        ("0>1 1>2 3>1 3>2", [0, 1, 2], [], "0 --> 1, 1 --> 2, 0 --> 2"),
        # selecting on a child of 1 makes it an ancestor of the selection
        ("0>1 1>2", [0, 1], [2], "0 --- 1"),
    ],
)
def test_mags_known_by_heart(edges, observed, selected, expected):
    assert np.array_equal(mag(dag_of(edges), observed, selected), graph(expected))


def test_rules_find_the_pag_that_enumeration_finds(examples):
    for T, count in ((4, 12), (5, 8)):
        for example in examples(T, count):
            assert np.array_equal(true_pag(*example), pag_by_enumeration(mag(*example)))


@pytest.mark.full
def test_rules_find_the_pag_that_enumeration_finds_in_six_nodes():
    checked = 0
    for seed in range(4000):
        example = random_dag(seed, 6, degree=0.8 + 0.4 * (seed % 4), latents=0.2 * (seed % 3), selected=0.2)
        pag = true_pag(*example)
        # what R5 to R10 made
        if (pag == TAIL).sum() > 2:
            checked += 1
            assert np.array_equal(pag, pag_by_enumeration(mag(*example)))
    assert checked > 100


@pytest.mark.parametrize(
    ("edges", "T", "expected"),
    [
        ("0>1", 2, "0 o-o 1"),
        ("0>1 1>2", 3, "0 o-o 1, 1 o-o 2"),
        ("0>1 2>1", 3, "0 o-> 1, 2 o-> 1"),
        ("0>1 2>1 1>3", 4, "0 o-> 1, 2 o-> 1, 1 --> 3"),
        # 4 and 5 are latent
        ("4>0 4>1 5>1 5>2 3>2 3>0", 4, "0 <-> 1, 1 <-> 2, 3 o-> 2, 3 o-> 0"),
    ],
)
def test_pags_known_by_heart(edges, T, expected):
    assert np.array_equal(true_pag(dag_of(edges), range(T)), graph(expected))


ALONE = [
    (0, "0 o-o 1, 1 o-o 2", {(0, 2): ()}, "0 o-> 1, 1 <-o 2"),
    (1, "0 o-> 1, 1 o-o 2", {(0, 2): (1,)}, "0 o-> 1, 1 --> 2"),
    (2, "0 --> 1, 1 o-> 2, 0 o-o 2", {}, "0 --> 1, 1 o-> 2, 0 o-> 2"),
    (2, "0 o-> 1, 1 --> 2, 0 o-o 2", {}, "0 o-> 1, 1 --> 2, 0 o-> 2"),
    (
        3,
        "0 o-> 1, 2 o-> 1, 0 o-o 3, 2 o-o 3, 3 o-o 1",
        {(0, 2): (3,)},
        "0 o-> 1, 2 o-> 1, 0 o-o 3, 2 o-o 3, 3 o-> 1",
    ),
    (
        4,
        "0 o-> 1, 1 <-o 2, 1 --> 3, 2 o-> 3",
        {(0, 2): (), (0, 3): (1, 2)},
        "0 o-> 1, 1 <-o 2, 1 --> 3, 2 --> 3",
    ),
    (4, "0 o-> 1, 1 <-o 2, 1 --> 3, 2 o-> 3", {(0, 2): (), (0, 3): (1,)}, "0 o-> 1, 1 <-> 2, 1 --> 3, 2 <-> 3"),
    (
        4,
        "0 o-> 1, 1 <-> 2, 2 <-o 3, 1 --> 4, 2 --> 4, 3 o-> 4",
        {(0, 2): (), (0, 3): (), (1, 3): (), (0, 4): (1, 2)},
        "0 o-> 1, 1 <-> 2, 2 <-> 3, 1 --> 4, 2 --> 4, 3 <-> 4",
    ),
    (
        5,
        "0 o-o 1, 1 o-o 2, 2 o-o 3, 3 o-o 0",
        {(0, 2): (1, 3), (1, 3): (0, 2)},
        "0 --- 1, 1 --- 2, 2 --- 3, 3 --- 0",
    ),
    (6, "0 --- 1, 1 o-o 2", {(0, 2): (1,)}, "0 --- 1, 1 --o 2"),
    (6, "0 --- 1, 1 o-> 2, 0 --> 2", {}, "0 --- 1, 1 --> 2, 0 --> 2"),
    (7, "0 --o 1, 1 o-o 2", {(0, 2): (1,)}, "0 --o 1, 1 --o 2"),
    (8, "0 --> 1, 1 --> 2, 0 o-> 2", {}, "0 --> 1, 1 --> 2, 0 --> 2"),
    (8, "0 --o 1, 1 --> 2, 0 o-> 2", {}, "0 --o 1, 1 --> 2, 0 --> 2"),
    (
        9,
        "0 o-> 3, 0 o-o 1, 1 --> 2, 2 --> 3",
        {(0, 2): (1,), (1, 3): (0, 2)},
        "0 --> 3, 0 o-o 1, 1 --> 2, 2 --> 3",
    ),
    (
        10,
        "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 1, 0 o-o 2",
        {(1, 2): (0,)},
        "0 --> 3, 1 --> 3, 2 --> 3, 0 o-o 1, 0 o-o 2",
    ),
    # 0 to 1 by way of 4, which is adjacent to 3 but not to 2
    (
        10,
        "0 o-> 3, 1 --> 3, 2 --> 3, 4 <-> 3, 0 o-> 4, 4 --> 1, 0 o-o 2",
        {(1, 2): (0,), (0, 1): (4,), (2, 4): (0,)},
        "0 --> 3, 1 --> 3, 2 --> 3, 4 <-> 3, 0 o-> 4, 4 --> 1, 0 o-o 2",
    ),
]


@pytest.mark.parametrize(("number", "before", "sepsets", "after"), ALONE)
def test_each_rule_alone(number, before, sepsets, after):
    T = max(int(c) for c in before if c.isdigit()) + 1
    before, after = graph(before, T), graph(after, T)
    assert np.array_equal(set_marks(before, RULES[number](before, sepsets)), after)
    for k, rule in enumerate(RULES):
        if k != number:
            assert np.array_equal(set_marks(before, rule(before, sepsets)), before), k
    for selection_bias in (True, False):
        oriented = orient(before, sepsets, selection_bias=selection_bias)
        assert np.array_equal(oriented, before if number in (5, 6, 7) and not selection_bias else after)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        # 0 and 2 adjacent
        (1, "0 o-> 1, 1 o-o 2, 0 o-o 2"),
        (7, "0 --o 1, 1 o-o 2, 0 o-o 2"),
        (3, "0 o-> 1, 2 o-> 1, 0 o-o 3, 2 o-o 3, 3 o-o 1, 0 o-o 2"),
        # 0 is no neighbour of 3's, but 1 no parent of it
        (4, "0 o-> 1, 1 <-o 2, 1 o-> 3, 2 o-> 3"),
        # a chord covers the cycle
        (5, "0 o-o 1, 1 o-o 2, 2 o-o 3, 3 o-o 0, 0 o-o 2"),
        # a path that an arrow bars, and one that a tail bars
        (9, "0 o-> 3, 0 <-o 1, 1 --> 2, 2 --> 3"),
        (9, "0 o-> 3, 0 o-o 1, 1 o-- 2, 2 --> 3"),
        # the same of R10's first edges, and a path that is covered
        (10, "0 o-> 3, 1 --> 3, 2 --> 3, 0 <-o 1, 0 o-o 2"),
        (10, "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-- 1, 0 o-o 2"),
        (10, "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 1, 0 o-o 2, 1 o-o 2"),
    ],
)
def test_what_a_rule_must_leave(number, text):
    marks = graph(text)
    sepsets = {(i, j): () for i, j in combinations(range(len(marks)), 2) if not marks[i, j]}
    assert RULES[number](marks, sepsets) == []


def test_where_tests_contradict_arrows_win():
    chain, apart = graph("0 o-o 1, 1 o-o 2, 2 o-o 3"), {(0, 2): (), (1, 3): (), (0, 3): ()}
    assert np.array_equal(orient(chain, apart), graph("0 o-> 1, 1 <-> 2, 2 <-o 3"))
    # R1 from both sides of 1–2
    chain, apart = graph("0 o-> 1, 1 o-o 2, 2 <-o 3"), {(0, 2): (1,), (1, 3): (2,), (0, 3): ()}
    assert np.array_equal(orient(chain, apart), graph("0 o-> 1, 1 <-> 2, 2 <-o 3"))

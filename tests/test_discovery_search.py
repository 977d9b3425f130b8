"""The searches of the specification: ICD with exact and with other tests, its trees, its candidates, CLEANN's."""

import zlib
from itertools import combinations

import numpy as np
import pytest
from graphs import SHAPES, causal_order, draws, graph, permuted, queries, random_dag, subsets

from causalattn.reference.discovery import (
    ARROW,
    CIRCLE,
    TAIL,
    ancestors,
    candidates,
    explanation_sets,
    icd,
    mag,
    oracle,
    ord_icd,
    pds_distances,
    possible_ancestors,
    true_pag,
)


@pytest.fixture(params=SHAPES, ids=str)
def examples(request):
    return draws(request)


def test_icd_finds_the_true_pag(examples):
    for T, count in ((6, 6), (10, 8)):
        for dag, observed, selected in examples(T, count):
            independent = oracle(dag, observed, selected)
            found = icd(T, independent)
            assert np.array_equal(found.marks, true_pag(dag, observed, selected))
            assert found.sepsets.keys() == {(i, j) for i, j in combinations(range(T), 2) if not found.marks[i, j]}
            assert all(independent(i, j, given) for (i, j), given in found.sepsets.items())
            if not selected:
                assert np.array_equal(icd(T, independent, selection_bias=False).marks, found.marks)


def test_icd_may_stop_at_any_level(examples):
    for dag, observed, selected in examples(7, 2):
        T, independent = len(observed), oracle(dag, observed, selected)
        above = ancestors(dag)
        apart = {
            (x, y): len(given)
            for x, y, given in sorted(queries(T), key=lambda q: -len(q[2]))
            if independent(x, y, given)
        }
        for order in range(T - 1):
            found = icd(T, independent, max_order=order)
            assert len(found.tests) <= order + 1
            assert found.sepsets.keys() == {pair for pair, size in apart.items() if size <= order}
            assert all(len(found.sepsets[pair]) == apart[pair] for pair in found.sepsets)
            for a, b in np.argwhere(found.marks > CIRCLE).tolist():
                is_ancestor = above[observed[b], [observed[a], *selected]].any()
                assert is_ancestor == (found.marks[a, b] == TAIL)


def test_an_ordered_search_finds_the_same_edges_and_only_true_marks(examples):
    for T, count in ((6, 4), (10, 3)):
        for dag, observed, _ in examples(T, count):
            # what others select is latent here
            independent, order = oracle(dag, observed), causal_order(dag, observed)
            found, truth, pag = ord_icd(order, independent), mag(dag, observed), true_pag(dag, observed)
            assert np.array_equal(found.marks > 0, pag > 0)
            assert (found.marks == truth)[found.marks > CIRCLE].all()
            assert (found.marks == pag)[pag > CIRCLE].all()
            for t, later in enumerate(order):
                assert (found.marks[:, later][order[:t]] != CIRCLE).all()
            for (i, j), given in found.sepsets.items():
                assert {*given} <= {*order[: max(order.index(i), order.index(j))]}


def contradictory(names, cut):
    """A test of its own mind, the same under any order of the nodes."""

    def independent(i, j, given):
        key = [sorted(names[z] for z in given), sorted((names[i], names[j]))]
        size = zlib.crc32(repr(key).encode()) / 2**32
        return size < cut, size

    return independent


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.3, 0.6])
def test_the_order_of_the_nodes_is_nowhere_felt(cut):
    rng = np.random.default_rng(0)
    for T in (5, 8):
        for trial in range(5):
            names = [f"{trial} {node}" for node in range(T)]
            order, time = rng.permutation(T).tolist(), rng.permutation(T).tolist()
            renamed = contradictory([names[node] for node in order], cut)
            searches = [
                (icd(T, contradictory(names, cut)), icd(T, renamed)),
                (ord_icd(time, contradictory(names, cut)), ord_icd([order.index(node) for node in time], renamed)),
            ]
            for found, again in searches:
                assert np.array_equal(permuted(found.marks, order), again.marks)
                assert found.tests == again.tests
                sets = {
                    tuple(sorted((order[i], order[j]))): {order[z] for z in S} for (i, j), S in again.sepsets.items()
                }
                assert sets == {pair: {*S} for pair, S in found.sepsets.items()}


def test_of_several_sets_that_of_least_r_is_kept():
    sizes = {(): 0.9, (2,): 0.3, (3,): 0.2, (4,): 0.2}

    def independent(i, j, given):
        return (i, j) == (0, 1) and given != (), sizes.get(given, 0.5)

    assert icd(5, independent).sepsets == {(0, 1): (3,)}
    assert icd(5, lambda i, j, given: independent(i, j, given)[0]).sepsets == {(0, 1): (2,)}


@pytest.mark.parametrize("T", [0, 1, 2, 6])
def test_all_independent_and_all_dependent(T):
    nothing = icd(T, lambda i, j, given: True)
    assert not nothing.marks.any() and nothing.tests == ([T * (T - 1) // 2] if T > 1 else [])
    everything = icd(T, lambda i, j, given: False)
    assert ((everything.marks == CIRCLE) == ~np.eye(T, dtype=bool)).all() and everything.sepsets == {}
    assert everything.tests == [T * (T - 1) // 2 * len([*combinations(range(T - 2), r)]) for r in range(T - 1)]
    assert len(ord_icd(range(T), lambda i, j, given: False).tests) == max(T - 1, 0)


def test_a_level_asks_what_the_graph_before_it_allows():
    dag, observed, selected = random_dag(3, 9, degree=2.0, latents=0.3, selected=0.2)
    independent, asked = oracle(dag, observed, selected), []

    def listening(i, j, given):
        asked.append((i, j, given))
        return independent(i, j, given)

    found, expected = icd(9, listening), []
    for order in range(len(found.tests)):
        # tails change no candidates, so the graph handed back after a level serves
        before = icd(9, independent, max_order=order - 1).marks if order else np.full((9, 9), CIRCLE)
        pairs = [(i, j) for i, j in combinations(range(9), 2) if before[i, j]]
        expected += [(i, j, given) for i, j in pairs for given in candidates(before, i, j, order)]
    assert asked == expected and len(asked) == sum(found.tests) and len({*asked}) == len(asked)


def test_a_timed_level_asks_about_sets_of_the_later_ones_tree():
    dag, observed, _ = random_dag(5, 9, degree=2.0, latents=0.3)
    independent, time, asked = oracle(dag, observed), causal_order(dag, observed), []

    def listening(i, j, given):
        asked.append((i, j, given))
        return independent(i, j, given)

    found, expected = ord_icd(time, listening), []
    for order in range(1, len(found.tests)):
        before = ord_icd(time, independent, max_order=order - 1).marks
        for i, j in [(i, j) for i, j in combinations(range(9), 2) if before[i, j]]:
            later = max(i, j, key=time.index)
            sets = candidates(before, i, j, order, roots=[later], among=time[: time.index(later)])
            expected += [(i, j, given) for given in sets]
    assert asked == [(i, j, ()) for i, j in combinations(range(9), 2)] + expected
    assert len(found.tests) > 3


def test_marks_start_anew_on_every_level():
    apart = {(0, 2): (), (1, 2): (0,)}
    found = icd(4, lambda i, j, given: apart.get((i, j)) == given, max_order=1)
    # level 0 made 1 a collider between 0 and 2
    assert np.array_equal(found.marks, graph("0 o-o 1, 0 o-> 3, 1 o-> 3, 2 o-> 3"))


DIAMOND = "0 <-> 1, 1 <-> 3, 3 <-> 4, 0 <-> 2, 2 <-> 3"


def test_branches_of_a_pds_tree_do_not_use_up_edges():
    marks = graph(DIAMOND)
    assert pds_distances(marks, 0, range(1, 5)) == {1: 1, 2: 1, 3: 2, 4: 3}
    assert pds_distances(marks, 0, (2, 3, 4)) == {2: 1, 3: 2, 4: 3}
    assert pds_distances(marks, 0, (2, 3, 4), 2) == {2: 1, 3: 2}
    assert pds_distances(marks, 0, (3, 4)) == {}
    # 6 is reached by way of 2 and 1 only, long after 3 and 1 led to 2
    marks = graph("0 <-> 3, 3 <-o 1, 3 o-o 2, 1 <-> 2, 5 <-> 2, 4 <-> 5, 0 <-> 4, 6 o-> 1")
    assert pds_distances(marks, 0, range(1, 7)) == {3: 1, 4: 1, 1: 2, 5: 2, 2: 3, 6: 5}
    # 5 makes possible ancestors of all
    marks = graph(DIAMOND + ", 0 o-o 5, 1 --> 5, 2 --> 5, 3 --> 5, 4 --> 5")
    assert candidates(marks, 0, 5, 3, roots=[0]) == [(1, 2, 3), (1, 3, 4), (2, 3, 4)]
    assert candidates(marks, 0, 5, 3) == [*combinations(range(1, 5), 3)]
    assert candidates(marks, 0, 5, 3, among=(1, 2, 3)) == [(1, 2, 3)]


def test_candidates_of_each_level():
    # 1 is no collider, so no path goes on through it but over the triangle 1, 2, 3
    marks = graph("0 o-o 1, 1 o-o 2, 2 o-o 3, 1 o-o 3, 0 o-o 4")
    assert candidates(marks, 0, 4, 0) == [()]
    assert candidates(marks, 0, 4, 1) == [(1,)] and candidates(marks, 1, 2, 1) == [(0,), (3,)]
    assert candidates(marks, 0, 1, 1) == [(2,), (3,), (4,)]
    assert candidates(marks, 0, 1, 2) == [(2, 3)] and candidates(marks, 0, 4, 2) == []
    # an arrow at 0 and at 2 leaves neither a possible ancestor of 1 or 3; a tail beside an arrow does
    marks = graph("0 <-> 1, 1 <-> 2, 1 o-o 3, 2 <-o 3, 0 <-> 3")
    assert candidates(marks, 1, 3, 1) == [(0,), (2,)] and candidates(marks, 1, 3, 2) == []
    marks = graph("0 --> 1, 1 <-- 2, 1 o-o 3, 2 <-o 3, 0 <-> 3")
    assert candidates(marks, 1, 3, 2) == [(0, 2)]


def test_possible_ancestors():
    above = possible_ancestors(graph("0 o-> 1, 1 o-o 2, 2 --> 3, 4 <-> 3, 0 --- 5"))
    expected = {(0, 1), (0, 2), (0, 3), (0, 5), (1, 2), (1, 3), (2, 1), (2, 3), (5, 0), (5, 1), (5, 2), (5, 3)}
    assert {(a, b) for a, b in np.argwhere(above).tolist() if a != b} == expected


def simple_pds(marks, path, inside, depth):
    """Every path of distinct nodes that the definition allows."""
    yield path
    for w in marks[path[-1]].nonzero()[0].tolist() if len(path) <= depth else ():
        goes = len(path) < 2 or marks[path[-2], w] or marks[path[-2], path[-1]] == ARROW == marks[w, path[-1]]
        if w in inside and w not in path and goes:
            yield from simple_pds(marks, [*path, w], inside, depth)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_pds_trees_hold_the_paths_of_the_definition(share):
    rng = np.random.default_rng(0)
    for _ in range(60):
        edges = [edge for edge in combinations(range(6), 2) if rng.random() < share]
        kinds = [rng.choice(["o-o", "o->", "<-o", "<->", "-->", "<--"]) for _ in edges]
        marks = graph(", ".join(f"{a} {kind} {b}" for (a, b), kind in zip(edges, kinds, strict=True)), 6)
        for inside in subsets(range(1, 6)):
            found = [pds_distances(marks, 0, inside, depth) for depth in range(6)]
            paths = [*simple_pds(marks, [0], inside, 5)]
            for z in inside:
                far = min((len(path) - 1 for path in paths if path[-1] == z), default=6)
                assert [reached.get(z) for reached in found[:5]] == [
                    far if far <= depth else None for depth in range(5)
                ]
                assert found[5].get(z, 6) <= far


def test_explanations_are_the_connected_sets_of_the_tree(examples):
    for number, example in enumerate(examples(6, 3)):
        marks, target = true_pag(*example), number % 6
        others = [z for z in range(6) if z != target]
        for max_size, max_range in ((None, 4), (4, None), (3, 2)):
            depth = max_range or 5
            far = {}
            for path in simple_pds(marks, [target], others, depth):
                far[path[-1]] = min(len(path) - 1, far.get(path[-1], 9))
            del far[target]
            expected = []
            for S in subsets(sorted(far)):
                reached = {path[-1] for path in simple_pds(marks, [target], S, depth)} - {target}
                if S and len(S) <= (max_size or 5) and reached == {*S}:
                    expected.append((S, sum(far[z] for z in S)))
            expected.sort(key=lambda item: (len(item[0]), item[1], item[0]))
            assert explanation_sets(marks, target, max_size, max_range) == expected


def test_explanations_of_a_chain():
    bidirected, plain = graph("0 <-> 1, 1 <-> 2, 2 <-> 3"), graph("0 o-o 1, 1 o-o 2, 2 o-o 3")
    assert explanation_sets(bidirected, 0) == [((1,), 1), ((1, 2), 3), ((1, 2, 3), 6)]
    assert explanation_sets(bidirected, 0, max_range=2) == [((1,), 1), ((1, 2), 3)]
    assert explanation_sets(bidirected, 0, max_size=1) == [((1,), 1)]
    assert explanation_sets(bidirected, 1) == [((0,), 1), ((2,), 1), ((0, 2), 2), ((2, 3), 3), ((0, 2, 3), 4)]
    assert explanation_sets(plain, 0) == [((1,), 1)] and explanation_sets(graph("0 o-o 1", 3), 2) == []

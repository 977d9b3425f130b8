"""The search on bit sets against the specification, which walks paths one by one; with exact tests and with others."""

import itertools
import math

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor
from exact_search import exact, found_by
from graphs import causal_order, permuted, random_dag
from helpers import SEEDS
from hypothesis import given
from hypothesis import strategies as st

import causalattn as ca
from causalattn.discovery import Background, discover
from causalattn.discovery.marks import Marks, tokens_of
from causalattn.discovery.rules import orient_heads, orient_tails
from causalattn.discovery.trees import Tree, members_of, possible_ancestors
from causalattn.reference import discovery as reference
from causalattn.reference import partial_corr

CUT = 0.2


@pytest.mark.parametrize("selected", [0.0, 0.2])
@given(seed=st.integers(0, 10**6), T=st.sampled_from([5, 8, 10]))
def test_exact_tests_give_the_true_graph(selected, seed, T):
    dag, observed, chosen = random_dag(seed, T, selected=selected)
    found = found_by(exact(dag, observed, chosen), T)
    assert found.done
    assert np.array_equal(found.marks, reference.true_pag(dag, observed, chosen))


@pytest.mark.full
@pytest.mark.parametrize("selected", [0.0, 0.15])
def test_exact_tests_give_the_true_graph_of_ten_to_fifteen(selected):
    for seed in range(250):
        T = 10 + seed % 6
        dag, observed, chosen = random_dag(seed, T, degree=2.0, selected=selected)
        found = found_by(exact(dag, observed, chosen), T)
        assert np.array_equal(found.marks, reference.true_pag(dag, observed, chosen)), (seed, T)


@given(seed=st.integers(0, 10**6), T=st.sampled_from([5, 8]), max_order=st.sampled_from([0, 1, 2, None]))
def test_every_level_is_that_of_the_specification(seed, T, max_order):
    R = correlation(attention(T, S=2 * T, seed=seed))

    def independent(i, j, S):
        r, status = partial_corr.partial_correlation(R, i, j, S)
        return status == partial_corr.OK and abs(r) < CUT, abs(r)

    expected = reference.icd(T, independent, max_order=max_order)
    ours = discover(tensor(R).cpu(), cut=CUT, max_order=max_order)
    assert np.array_equal(ours.pag.marks, expected.marks) and ours.sepsets == expected.sepsets
    ordered = discover(tensor(R).cpu(), cut=CUT, order="time", max_order=max_order)
    expected = reference.ord_icd(range(T), independent, max_order=max_order)
    assert np.array_equal(ordered.pag.marks, expected.marks) and ordered.sepsets == expected.sepsets


@given(seed=st.integers(0, 10**6), T=st.sampled_from([5, 9]))
def test_a_known_order_only_adds_arrows(seed, T):
    dag, observed, _ = random_dag(seed, T)
    order = causal_order(dag, observed)
    places = np.argsort(order)
    plain, ordered = (found_by(exact(dag, observed, []), T, order=x).marks for x in (None, places))
    assert np.array_equal(plain != 0, ordered != 0)
    known = plain > 1
    assert np.array_equal(ordered[known], plain[known])
    later = places[:, None] < places
    assert (ordered[later & (ordered != 0)] == 2).all()


@given(seed=SEEDS, T=st.sampled_from([6, 12]), order=st.booleans())
def test_renaming_the_tokens_renames_the_graph(seed, T, order):
    R = tensor(correlation(attention(T, S=2 * T, seed=seed))).cpu()
    names = torch.randperm(T, generator=torch.Generator().manual_seed(seed)).numpy()
    options = {"cut": CUT, "max_order": 3}
    plain = discover(R, **options, order=list(range(T)) if order else None).pag.marks
    other = discover(R[names][:, names], **options, order=names.tolist() if order else None).pag.marks
    assert np.array_equal(other, permuted(plain, names))


@given(seed=st.integers(0, 10**6), T=st.sampled_from([4, 6, 7]), bias=st.booleans())
def test_rules_turn_what_the_specification_turns(seed, T, bias):
    # any circles and arrows with any sets, consistent or not, but for arrows, which R0 … R4 would find first
    rng = np.random.default_rng(seed)
    marks = np.triu(rng.random((T, T)) < 0.6, 1).astype(np.int8)
    marks |= marks.T
    apart = [(a, b) for a, b in itertools.combinations(range(T), 2) if not marks[a, b]]
    sepsets = {(a, b): tuple(t for t in range(T) if t not in (a, b) and rng.random() < 0.5) for a, b in apart}
    graph = Marks(marks)
    orient_heads(graph, {pair: sum(1 << t for t in S) for pair, S in sepsets.items()})
    expected = reference.orient_arrowheads(marks, sepsets)
    assert np.array_equal(graph.matrix(), expected)
    orient_tails(graph, selection_bias=bias)
    assert np.array_equal(graph.matrix(), reference.orient_tails(expected, sepsets, selection_bias=bias))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 4))
def test_trees_are_those_of_the_specification(seed, size):
    rng = np.random.default_rng(seed)
    marks = np.triu(rng.random((7, 7)) < 0.5, 1) * rng.integers(1, 3, (7, 7))
    marks = (marks + ((marks > 0) * rng.integers(1, 3, (7, 7))).T).astype(np.int8)
    graph = Marks(marks)
    assert np.array_equal(graph.matrix(), marks)
    assert np.array_equal(possible_ancestors(graph), reference.possible_ancestors(marks))
    sets = sorted(tuple(tokens_of(x)) for x in Tree(graph, 0, (1 << 7) - 1).sets(size))
    expected = [
        S for S in itertools.combinations(range(1, 7), size) if len(reference.pds_distances(marks, 0, S, size)) == size
    ]
    assert sets == expected
    rows = members_of([sum(1 << t for t in S) for S in sets], size, 7)
    assert [tuple(row) for row in rows.tolist()] == sets


def test_a_second_way_to_a_token_keeps_its_descendants():
    # 0 ↔ 1 ↔ 3 ↔ 4 and 0 ↔ 2 ↔ 3: {2, 3, 4} is legal though 1 leads to 3 as well
    marks = np.zeros((5, 5), np.int8)
    for a, b in ((0, 1), (1, 3), (3, 4), (0, 2), (2, 3)):
        marks[a, b] = marks[b, a] = 2
    sets = {tuple(tokens_of(x)) for x in Tree(Marks(marks), 0, 31).sets(3)}
    assert sets == {(1, 2, 3), (1, 3, 4), (2, 3, 4)}


def test_what_has_no_edges():
    assert not discover(torch.eye(6, dtype=torch.float64), cut=0.1).pag.skeleton.any()
    blocks = torch.block_diag(*[tensor(correlation(attention(4, seed=s))).cpu() for s in range(2)])
    skeleton = discover(blocks, cut=0.01).pag.skeleton
    assert not skeleton[:4, 4:].any() and skeleton.any()


def test_any_time():
    R = tensor(correlation(attention(10, S=14))).cpu()
    seen = []
    whole = discover(R, cut=CUT, on_level=seen.append)
    assert whole.complete and [len(x.levels) for x in seen] == [*range(1, len(whole.levels) + 1)]
    for level, so_far in enumerate(seen):
        alone = discover(R, cut=CUT, max_order=level)
        assert alone.pag == so_far.pag and (so_far.complete or level < len(seen) - 1)
        # no level adds an edge
        assert (so_far.pag.skeleton >= whole.pag.skeleton).all()
    # of an edge that fell the least |r| is below the cut, of one that stands above it
    apart = ~whole.pag.skeleton & ~np.eye(10, dtype=bool)
    assert (whole.strength[apart] < 1).all() and (whole.strength[whole.pag.skeleton] >= 1).all()
    stopped = discover(R, cut=CUT, max_tests=0)
    assert not stopped.complete and len(stopped.levels) == 2


def test_cuts_are_told():
    R = tensor(correlation(attention(8, S=14))).cpu()
    found = discover(R, n=60, alpha=0.05)
    assert found.cuts == tuple(ca.critical_correlation(60, 0.05, level.order) for level in found.levels)
    assert discover(R, cut=0.3).cuts[0] == 0.3


def test_sets_that_n_is_too_small_for_are_not_tested():
    R = tensor(correlation(attention(10, S=14))).cpu()
    found = discover(R, n=4.5, alpha=0.9999)
    assert len(found.levels) == 2 and not found.complete
    assert found.cuts == (ca.critical_correlation(4.5, 0.9999, 0), ca.critical_correlation(4.5, 0.9999, 1))
    assert len(discover(R, n=5, alpha=0.9999).levels) == 2


def test_background_knowledge():
    R = tensor(correlation(attention(6, S=12))).cpu()
    known = Background(required=[(0, 1)], forbidden=[(2, 3)], tiers=[0, 0, 0, 1, 1, 1])
    found = discover(R, cut=0.9, background=known).pag
    # a cut that takes everything else leaves what is required
    assert list(found.edges()) == [(0, 1, "-->")]
    found = discover(R, cut=1e-6, background=known)
    assert not found.pag.skeleton[2, 3] and (2, 3) not in found.sepsets
    earlier, later = found.pag.marks[:3, 3:], found.pag.marks[3:, :3]
    assert (earlier[earlier != 0] == 2).all() and later.any()


EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("R", "options", "message"),
    [
        (EYE[:1, :1], {}, r"R must be one matrix \[T, T\] of at least 2 tokens, got \[1, 1\]"),
        (EYE.expand(2, 3, 3), {}, r"R must be one matrix \[T, T\] of at least 2 tokens, got \[2, 3, 3\]"),
        (torch.ones(3, 3), {}, r"R must tell tokens apart, got \|r\| = 1 for every pair"),
        (2 * EYE, {}, "R must have 1 on its diagonal"),
        (EYE, {"cut": 1.5}, "cut must lie between 0 and 1, got 1.5"),
        (EYE, {"n": 10, "alpha": 0.1}, "give cut, or n and alpha"),
        (EYE, {"max_order": -1}, "max_order must be an integer of at least 0, got -1"),
        (EYE, {"max_order": True}, "max_order must be an integer of at least 0, got True"),
        (EYE, {"max_tests": 1.5}, "max_tests must be an integer of at least 0, got 1.5"),
        (EYE, {"cut": None, "n": 3, "alpha": 0.1}, r"n must be greater than order \+ 3 = 3, got 3"),
        (EYE, {"names": ["a", "b", "a"]}, "names must be distinct, got 'a' twice"),
        (EYE, {"order": "depth"}, "order must be 'time' or the place of each token, got 'depth'"),
        (EYE, {"cut": None, "n": 4.5, "alpha": 1e-60}, "n and alpha must give a cut between 0 and 1, got 1.0 of n=4.5"),
        (
            EYE,
            {"cut": None, "n": math.inf, "alpha": 0.1},
            "n and alpha must give a cut between 0 and 1, got 0.0 of n=inf",
        ),
        (EYE, {"order": 3}, r"must have a place for each of the 3 tokens, got shape \[\]"),
        (EYE, {"order": [0, math.nan, 1]}, "tiers and order must be numbers"),
        (EYE, {"order": ["a", "b", "c"]}, "tiers and order must be numbers"),
        (EYE, {"order": [0, 1]}, "must have a place for each of the 3 tokens"),
        (EYE, {"order": [0, 1, 1]}, "order must give every token a place of its own"),
        (EYE, {"names": ["a", "b"]}, "names"),
        (EYE, {"order": "time", "background": Background(tiers=[2, 1, 0])}, "got tiers against the order"),
        (EYE, {"background": Background(required=[(0, 3)])}, "required must hold pairs of two tokens in 0…2"),
        (EYE, {"background": Background(forbidden=[(1, 1)])}, "forbidden must hold pairs of two tokens in 0…2"),
        (EYE, {"background": Background([(0, 1)], [(1, 0)])}, "got 0 → 1 required and forbidden"),
        (EYE, {"background": Background([(0, 1), (1, 0)])}, "required and against an order or another one"),
        (EYE, {"background": Background([(1, 0)]), "order": "time"}, "required and against an order or another one"),
        (EYE, {"background": Background([(0, 1), (1, 2), (2, 0)])}, "required edges must form no cycle"),
        (EYE, {"background": Background(tiers=[0, 1])}, "must have a place for each of the 3 tokens"),
    ],
)
def test_bad_input(R, options, message):
    with pytest.raises(ValueError, match=message):
        discover(R, **{"cut": 0.5, **options})


def test_background_is_of_token_numbers():
    for pairs in ([(0.5, 1)], [3], [("a", "b")]):
        with pytest.raises(TypeError, match="required must hold pairs of token numbers, got"):
            discover(EYE, cut=0.5, background=Background(required=pairs))
    with pytest.raises(
        TypeError, match="required must be a collection of pairs, which can be read twice, got generator"
    ):
        discover(EYE, cut=0.5, background=Background(required=((a, a + 1) for a in range(2))))
    with pytest.raises(TypeError, match="cut must be a number, got str"):
        discover(EYE, cut="0.5")

"""Iterative causal discovery, a level of tests at a time: ICD, and OrdICD where the order of the tokens is known."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..partial_corr import Candidates, LevelTests
from .marks import NONE, Marks, bit_rows
from .rules import orient_heads, orient_tails
from .trees import Tree, members_of, possible_ancestors


class Level(NamedTuple):
    """What a level did: order |S|, tests and SINGULAR ones among them, edges removed, seconds."""

    order: int
    tests: int
    singular: int
    removed: int
    seconds: float


class State(NamedTuple):
    """The search after a level: a valid r-representing PAG whatever the level.

    marks: [T, T], marks[a, b] at b: 0 none, 1 circle, 2 arrow, 3 tail. sepsets: of each pair (a < b) that was
    separated, the set. least: [T, T], the least |r| / cut over all tests of a pair, NaN where there was none.
    done: nothing is left to test; else max_order or max_tests stopped the search.
    """

    marks: np.ndarray
    sepsets: dict[tuple[int, int], tuple[int, ...]]
    least: np.ndarray
    levels: tuple[Level, ...]
    done: bool


# what `level_tests` is with its R and cut: adjacency [T, T] bool, order, candidates → what it found
Tester = Callable[[Tensor, int, Candidates | None], LevelTests]


def icd(
    test: Tester,
    start: np.ndarray,
    *,
    cut: Callable[[int], float] = lambda order: 1.0,
    order: np.ndarray | None = None,
    required: np.ndarray | None = None,
    selection_bias: bool = True,
    max_order: int | None = None,
    max_tests: int = 10**9,
) -> Iterator[State]:
    """Search from the marks of start, yielding the state after every level.

        level 0     every pair, given nothing
        level 1     every pair that is left, given each single token next to either
        level r     every pair that is left, given the sets of r tokens that ICD admits: `Tree.sets` of either, all of
                    them possible ancestors of one of the pair

    All tests of a level are of the graph as it stood before it. A pair that some set separates loses its edge, to the
    set of least |r|; then all marks are taken back to start's and found anew, by R0 … R4 and, in what is yielded, by
    R5 … R10.

    order: of each token its place in a known order in time; then start has earlier o→ later, and a pair is tested given
    the sets of the later one's tree among the tokens before it. required: edges [T, T] bool that no test removes.

    Source: Rohekar et al. 2021 (arXiv:2111.04095); in order, Rohekar et al. 2023 (arXiv:2310.20307).
    """
    T, depth = len(start), len(start) - 2 if max_order is None else min(max_order, len(start) - 2)
    kept = np.zeros_like(start, bool) if required is None else required
    marks, sepsets, levels = start.copy(), {}, []
    least = np.full(start.shape, np.nan)
    for level in range(max(depth, 0) + 1):
        began = time.perf_counter()
        adjacency = marks != NONE
        given = level > 1 or (level == 1 and order is not None)
        candidates = _candidates(marks, level, order, max_tests) if given else None
        if given and candidates is None:
            yield _state(marks, sepsets, least, levels, selection_bias, done=False)
            return
        found = test(torch.from_numpy(adjacency), level, candidates)
        tests = int(found.tests)
        least = np.fmin(least, np.abs(found.r.numpy()) / cut(level))
        removed = found.independent.numpy() & ~kept
        for a, b in zip(*np.triu(removed).nonzero(), strict=True):
            sepsets[int(a), int(b)] = tuple(found.given[a, b].tolist())
        marks = _oriented(np.where((adjacency & ~removed), start, NONE), sepsets)
        seconds = time.perf_counter() - began
        levels.append(Level(level, tests, int(found.singular), int(removed.sum()) // 2, seconds))
        done = (level >= 1 and tests == 0) or level == T - 2 or not (marks != NONE).any()
        yield _state(marks, sepsets, least, levels, selection_bias, done)
        if done:
            return


def _oriented(marks: np.ndarray, sepsets: dict[tuple[int, int], tuple[int, ...]]) -> np.ndarray:
    graph = Marks(marks)
    orient_heads(graph, {pair: sum(1 << t for t in given) for pair, given in sepsets.items()})
    return graph.matrix()


def _state(marks, sepsets, least, levels, selection_bias: bool, done: bool) -> State:
    graph = Marks(marks)
    orient_tails(graph, selection_bias=selection_bias)
    return State(graph.matrix(), dict(sepsets), least, tuple(levels), done)


def _candidates(marks: np.ndarray, size: int, order: np.ndarray | None, max_tests: int) -> Candidates | None:
    """What to test, or None where that could take more than max_tests."""
    graph, T = Marks(marks), len(marks)
    others = marks != NONE
    if order is not None:
        others &= order[:, None] > order
    ancestors = None if size == 1 else possible_ancestors(graph)
    nodes, sets = [], []
    for node in range(T):
        if others[node].any():
            may = np.ones(T, bool) if order is None else order < order[node]
            if ancestors is not None:
                # of the node, or of another one that a set is tested against
                apart = ancestors & ~np.eye(T, dtype=bool)
                may &= ancestors[:, node] | apart[:, others[node]].any(1)
            each = int(others[node].sum())
            found = Tree(graph, node, bit_rows(may[None])[0]).sets(size, most=max_tests // each)
            max_tests -= each * len(found)
            if max_tests < 0:
                return None
            nodes += [node] * len(found)
            sets += found
    return Candidates(
        torch.tensor(nodes, dtype=torch.int64),
        torch.from_numpy(members_of(sets, size, T)),
        None if ancestors is None else torch.from_numpy(ancestors),
        torch.from_numpy(others),
    )

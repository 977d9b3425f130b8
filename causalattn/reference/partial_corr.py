"""The specification of partial correlations and level tests, in NumPy float64: a test at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist

import numpy as np

OK, CLIPPED, SINGULAR = range(3)
FLOOR = 2.0**-39


def partial_correlation(R: np.ndarray, i: int, j: int, given: Iterable[int] = (), floor: float = FLOOR):
    """r(i, j | S) and its status, from the Cholesky factor of R[S, i, j] with i and j last.

    r = L[k + 1, k] / √(L[k + 1, k]² + L[k + 1, k + 1]²), k = |S|.
    """
    tokens = [*given, i, j]
    block = R[np.ix_(tokens, tokens)].astype(np.float64)
    k = len(tokens) - 2
    L = np.zeros_like(block)
    pivot = 1.0
    for a in range(k + 2):
        for b in range(a):
            L[a, b] = (block[a, b] - L[a, :b] @ L[b, :b]) / L[b, b]
        left = block[a, a] - L[a, :a] @ L[a, :a]
        # of j, what S leaves without i: i is no part of the set
        free = left + L[a, k] ** 2 if a > k else left
        pivot = min(pivot, free)
        if not free > floor:
            return math.nan, SINGULAR
        # |r| is 1 within 16 roundings over the pivot: floor is 2¹⁴ roundings
        if a > k and left <= 2 * free * floor / 1024 / pivot:
            return math.copysign(1.0, L[a, k]), CLIPPED
        L[a, a] = math.sqrt(left)
    return L[k + 1, k] / math.hypot(L[k + 1, k], L[k + 1, k + 1]), OK


def full_partial_correlation(R: np.ndarray) -> np.ndarray:
    """Every pair given all the others."""
    T = len(R)
    r = np.eye(T)
    for i, j in itertools.combinations(range(T), 2):
        rest = [t for t in range(T) if t not in (i, j)]
        r[i, j] = r[j, i] = partial_correlation(R, i, j, rest)[0]
    return r


def level_sets(
    adjacency: np.ndarray, order: int, candidates: Iterable[tuple[int, tuple[int, ...]]] | None
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The tests (i, j, S) of a level, i < j; a set that both of a pair hand in is tested twice."""
    T = len(adjacency)
    if candidates is not None:
        for node, given in candidates:
            for j in range(T):
                if adjacency[node, j] and j not in given:
                    yield min(node, j), max(node, j), tuple(sorted(given))
        return
    for i, j in itertools.combinations(range(T), 2):
        if adjacency[i, j]:
            near = (adjacency[i] | adjacency[j]).nonzero()[0].tolist()
            sets = [()] if order == 0 else [(k,) for k in near if k not in (i, j)]
            for given in sets:
                yield i, j, given


def level_tests(
    R: np.ndarray,
    adjacency: np.ndarray,
    order: int,
    candidates: Iterable[tuple[int, tuple[int, ...]]] | None = None,
    ancestors: np.ndarray | None = None,
) -> tuple[dict[tuple[int, int], tuple[float, tuple[int, ...]]], int, int]:
    """Each pair's r of least size and its set, ties to the set first in lexical order; tests, and SINGULAR ones."""
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
    tests = singular = 0
    for i, j, given in level_sets(adjacency, order, candidates):
        if ancestors is not None and not all(ancestors[z, i] or ancestors[z, j] for z in given):
            continue
        tests += 1
        r, status = partial_correlation(R, i, j, given)
        if status == SINGULAR:
            singular += 1
        elif (i, j) not in best or (abs(r), given) < (abs(best[i, j][0]), best[i, j][1]):
            best[i, j] = r, given
    return best, tests, singular


def critical_correlation(n: float, alpha: float, order: int) -> float:
    """tanh(Φ⁻¹(1 − α/2) / √(n − |S| − 3))."""
    return math.tanh(-NormalDist().inv_cdf(alpha / 2) / math.sqrt(n - order - 3))

"""Conditional independence one test at a time, for searches written by others, and data with given correlations."""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..partial_corr import Status, critical_correlation
from ..partial_corr.arguments import check_correlation, check_cut
from ..partial_corr.factor import pivot_floor


class CorrelationTest:
    """Independence by |r(x, y | S)| < cut, as an object with `cond_indep` that causality-lab's searches take.

    The tests are those of `partial_correlation`, on the CPU, a few microseconds each; a whole level at once is
    `level_tests`. A SINGULAR test is no evidence of independence: the pair counts as dependent, and `singular`
    counts it.

    Args:
        R: correlations, [T, T], as in `partial_correlation`.
        cut: the |r| below which two tokens are independent, 0 < cut < 1; else
        n, alpha: sample size and level, from which `critical_correlation` takes a cut for each |S|.

    Attributes:
        tests, singular: how many tests were made, and how many of them were SINGULAR.
        cut: of |S| the |r| below which two tokens are independent.

    Raises:
        ValueError: both or neither of cut and (n, alpha), a cut outside (0, 1), or an R that does not fit.

    Example:
        >>> R = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.25], [0.5, 0.25, 1.0]], dtype=torch.float64)
        >>> test = CorrelationTest(R, cut=0.1)
        >>> test.cond_indep(1, 2, ()), test.cond_indep(1, 2, (0,))
        (False, True)
    """

    def __init__(
        self, R: Tensor, *, cut: float | None = None, n: float | None = None, alpha: float | None = None
    ) -> None:
        self.cut = cuts(cut, n, alpha)
        self._R, self._floor = correlation_lists(R)
        self.tests = self.singular = 0

    def cond_indep(self, x: int, y: int, zz: Collection[int]) -> bool:
        """Whether x and y are independent given zz."""
        # a NaN is not below it
        return abs(self.correlation(x, y, zz)[0]) < self.cut(len(set(zz)))

    def correlation(self, x: int, y: int, zz: Collection[int] = ()) -> tuple[float, Status]:
        """r(x, y | zz), NaN where it is SINGULAR, and its status."""
        r, status = correlate(self._R, self._floor, x, y, zz)
        self.tests += 1
        self.singular += status == Status.SINGULAR
        return r, status


def cuts(cut: float | None, n: float | None, alpha: float | None) -> Callable[[int], float]:
    """The |r| below which two tokens are independent, by |S|: cut whatever it is, or from n and alpha."""
    if (cut is None) == (n is None) or (n is None) != (alpha is None):
        raise ValueError(f"give cut, or n and alpha, got cut={cut}, n={n}, alpha={alpha}")
    if cut is None:
        # what it refuses of n and alpha is refused before the first test
        critical_correlation(n, alpha, 0)
        return lambda order: critical_correlation(n, alpha, order)
    cut = check_cut(cut)
    return lambda order: cut


def correlation_lists(R: Tensor) -> tuple[list[list[float]], float]:
    """A matrix as Python numbers, which a single test reads fastest, and the pivot at which a test is SINGULAR."""
    if isinstance(R, Tensor) and R.ndim != 2:
        raise ValueError(f"R must be one matrix [T, T], got {list(R.shape)}")
    return check_correlation(R)[0].tolist(), pivot_floor(R.dtype)


def correlate(R: list[list[float]], floor: float, x: int, y: int, zz: Collection[int]) -> tuple[float, Status]:
    """r(x, y | zz) and its status: the steps of `partial_correlation` for one test."""
    tokens = [*sorted(set(zz)), x, y]
    if x == y or x in tokens[:-2] or y in tokens[:-2]:
        raise ValueError(f"x and y must be two tokens outside the set, got {x}, {y} and {sorted(set(zz))}")
    if min(tokens) < 0 or max(tokens) >= len(R):
        raise ValueError(f"tokens must lie in 0…{len(R) - 1}, got {tokens}")
    factor: list[list[float]] = []
    size, pivot = len(tokens) - 2, 1.0
    for a, token in enumerate(tokens):
        column, left = [], 1.0
        for b in range(min(a, size)):
            w = R[token][tokens[b]]
            for u, v in zip(column, factor[b], strict=False):
                w -= u * v
            w *= factor[b][b]
            column.append(w)
            left -= w * w
        # a NaN fails this
        if not left > floor:
            return math.nan, Status.SINGULAR
        factor.append([*column, left**-0.5])
        pivot = min(pivot, left)
    covariance = R[x][y] - sum(u * v for u, v in zip(factor[-2][:size], factor[-1], strict=False))
    r = covariance * factor[-2][-1] * factor[-1][-1]
    return (r, Status.OK) if abs(r) < 1 - floor / 1024 / pivot else (math.copysign(1.0, r), Status.CLIPPED)


def surrogate_data(R: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Make n samples of T variables whose sample correlations are R, for any library that wants data.

        X = √(n − 1)·Q R^½,  Q [n, T] random with orthonormal columns that sum to 0

    `numpy.corrcoef(X.T)` is R but for rounding; nothing else of X means anything.

    Args:
        R: correlations, [T, T], as in `partial_correlation`.
        n: samples, more than T.
        generator: makes Q repeatable.

    Returns:
        X [n, T], float64, on the CPU.

    Raises:
        ValueError: n ≤ T, R has an eigenvalue below −64 roundings, or R does not fit.

    Example:
        >>> R = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> torch.corrcoef(surrogate_data(R, 10).T).round(decimals=6)
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    correlation_lists(R)
    T = R.shape[0]
    if n <= T:
        raise ValueError(f"n must be greater than T = {T}, got {n}")
    values, vectors = torch.linalg.eigh(R.detach().cpu().double())
    slack = 64 * torch.finfo(R.dtype).eps * T
    if T and values[0] < -slack:
        raise ValueError(f"R must be positive semidefinite, got an eigenvalue of {float(values[0]):.3g}")
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    x = torch.randn(n, T, dtype=torch.float64, generator=generator)
    Q, _ = torch.linalg.qr(x - x.mean(0))
    return math.sqrt(n - 1) * Q @ root

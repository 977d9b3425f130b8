"""Partial correlations and tests of conditional independence: many at once, each with a status."""

from typing import NamedTuple

from torch import Tensor

from .._backend import Backend
from .arguments import Indices, check_correlation, check_given, check_rows, check_tests
from .batch import test_batch
from .factor import Status
from .fisher import FisherZ, critical_correlation, fisher_z
from .level_tests import Candidates, LevelTests, level_tests
from .shared import partial_correlations_given, precision_correlations

__all__ = [
    "Candidates", "FisherZ", "LevelTests", "PartialCorrelation", "Status", "critical_correlation", "fisher_z",
    "full_partial_correlation", "level_tests", "partial_correlation", "partial_correlation_given",
]  # fmt: skip


class PartialCorrelation(NamedTuple):
    """r, in R's dtype, and status, int8, a `Status` each: NaN where SINGULAR, ±1 where CLIPPED."""

    r: Tensor
    status: Tensor


def partial_correlation(
    R: Tensor,
    i: Indices,
    j: Indices,
    given: Indices | None = None,
    *,
    rows: Tensor | None = None,
    backend: Backend = "auto",
) -> PartialCorrelation:
    """Correlate i and j given the tokens of S, N pairs and sets at once.

        r(i, j | S) = h_ij / √(h_ii h_jj),  h_ab = R_ab − R_aS R_SS⁻¹ R_Sb

    by a Cholesky factor of R_SS, in the same bits for (i, j) and (j, i). Nothing is inverted, regularised or made
    positive: where a pivot of R_SS, h_ii or h_jj is not above 2¹⁴ roundings of R (1.8e-12 in float64, 9.8e-4 in
    float32) the test is SINGULAR, its r NaN, and no evidence of independence. Above, r is wrong by about ten roundings
    over the smallest pivot; where |r| is 1 within 16 of them it is CLIPPED to ±1: i and j determine one another.

    Args:
        R: correlations, [..., T, T], float32 or float64; read as (R + Rᵀ) / 2.
        i, j: the pairs, [N] for every leading axis of R or [..., N] with those; a number is one pair.
        given: S of each test, [N, m] or [..., N, m] ([m] for one pair), −1 where a set has fewer than m ≤ 16 tokens;
            None: no set.
        rows: the rows of A that R was formed of, [..., T, S], S keys. A test that is SINGULAR in R is formed again from
            them in float64: what a float32 R needs under an attention sink.
        backend: "auto" takes Triton for CUDA tensors, of float64 too, and torch otherwise.

    Returns:
        PartialCorrelation of shape [..., N], without gradient.

    Raises:
        ValueError: R is not square or, on the CPU, holds NaN, is not symmetric, has another diagonal than 1 or entries
            beyond ±1; i = j, i or j in S, a token twice in S, a token out of range, more than 16 columns (on a GPU,
            where values are not read, such a test is SINGULAR or meaningless); shapes that do not fit.
        TypeError: R is not float32 or float64, or indices are no integers.
        NotImplementedError: backend="triton" without the triton package.

    Source: Cholesky factor of R with i and j last, as in Golub and Van Loan 2013, §4.2; cuPC (Zarebavani et al. 2020,
        arXiv:1812.08491) tests in batches too, by a pseudo-inverse.

    Example:
        >>> R = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.25], [0.5, 0.25, 1.0]], dtype=torch.float64)
        >>> partial_correlation(R, [0, 1], [1, 2], [[-1], [0]]).r
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    flat = check_correlation(R)
    members, shape = check_tests(R, i, j, given)
    r, status = test_batch(flat, members, check_rows(rows, R), backend)
    return PartialCorrelation(r.reshape(shape), status.reshape(shape))


def partial_correlation_given(R: Tensor, given: Indices) -> PartialCorrelation:
    """Correlate every pair given one set, M sets at once: a factor of R_SS serves all pairs, 2|S| flops a test.

        H = R − Wᵀ W,  W = L⁻¹ R_S·,  L Lᵀ = R_SS,  r_ij = H_ij / √(H_ii H_jj)

    Args:
        R: as in `partial_correlation`.
        given: the sets, [M, m] or, with R's leading axes, [..., M, m], −1 pads; [m] is one set.

    Returns:
        PartialCorrelation [..., M, T, T] (one set: [..., T, T]), by torch on any device. A pair with a token of S is
        SINGULAR, as is every pair where R_SS is; the diagonal is 1 elsewhere.

    Raises:
        ValueError, TypeError: as in `partial_correlation`.

    Source: as `partial_correlation`; one set for all pairs of a node as in cuPC-S.

    Example:
        >>> R = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.25], [0.5, 0.25, 1.0]], dtype=torch.float64)
        >>> partial_correlation_given(R, [0]).r[1, 2]
        tensor(0., dtype=torch.float64)
    """
    flat = check_correlation(R)
    sets, shape = check_given(R, given)
    r, status = partial_correlations_given(flat, sets)
    return PartialCorrelation(*(x.reshape(*shape, *R.shape[-2:]) for x in (r, status)))


def full_partial_correlation(R: Tensor) -> PartialCorrelation:
    """Correlate every pair given all the other tokens, from the precision matrix K = R⁻¹.

        r_ij = −K_ij / √(K_ii K_jj),  1 / K_ii = the variance that the others leave of i

    Args:
        R: as in `partial_correlation`. The R of a causal head is often singular to working precision.

    Returns:
        PartialCorrelation [..., T, T], its diagonal 1, by torch on any device. A whole matrix is SINGULAR where a pivot
        or some 1 / K_ii is not above `partial_correlation`'s bound.

    Raises:
        ValueError, TypeError: as in `partial_correlation`.

    Source: Lauritzen 1996, "Graphical Models", §5.1.

    Example:
        >>> R = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.25], [0.5, 0.25, 1.0]], dtype=torch.float64)
        >>> full_partial_correlation(R).r[1, 2].abs() < 1e-15
        tensor(True)
    """
    r, status = precision_correlations(check_correlation(R))
    return PartialCorrelation(r.reshape(R.shape), status.reshape(R.shape))

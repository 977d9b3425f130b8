"""Cholesky factors of small correlation matrices in registers: unrolled, an entry a tensor.

A matrix is the tuple of its strictly lower triangle by rows, its diagonal being 1; a factor is the tuple of its lower
triangle by rows, the diagonal inverted. A tensor holds that entry of many matrices, one a lane, or of one.
"""

import triton
import triton.language as tl

OK, CLIPPED, SINGULAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def solve(factor, column, FIRST: tl.constexpr, M: tl.constexpr):
    """L⁻¹ x, x being the M entries of column from FIRST on."""
    solved = ()
    for a in tl.static_range(M):
        x = column[FIRST + a]
        for b in tl.static_range(a):
            x -= factor[a * (a + 1) // 2 + b] * solved[b]
        solved = solved + (x * factor[a * (a + 1) // 2 + a],)
    return solved


@triton.jit
def unexplained(solved, M: tl.constexpr, one):
    """1 − ‖L⁻¹ x‖²: the variance that the set leaves; one is 1 in its shape and dtype."""
    for m in tl.static_range(M):
        one -= solved[m] * solved[m]
    return one


@triton.jit
def factorize(entries, M: tl.constexpr, one):
    """The factor of the first M rows, and its smallest pivot."""
    factor, pivot = (), one
    for a in tl.static_range(M):
        row = solve(factor, entries, a * (a - 1) // 2, a)
        left = unexplained(row, a, one)
        pivot = tl.minimum(pivot, left)
        factor = factor + row + (tl.rsqrt(left),)
    return factor, pivot


@triton.jit
def decide(covariance, left_i, left_j, pivot, floor):
    """r and its status from what the set leaves of the covariance and of the two variances."""
    size = tl.sqrt(left_i * left_j)
    pivot = tl.minimum(pivot, tl.minimum(left_i, left_j))
    # a NaN fails every one of these
    good = (pivot > floor) & (size > 0) & (covariance == covariance)
    # r is known to 16 roundings over the pivot, and floor is 1024 times that
    inside = tl.abs(covariance) < size * (1 - floor / 1024 / pivot)
    r = tl.where(inside, covariance / size, tl.where(covariance > 0, 1.0, -1.0))
    return tl.where(good, r, float("nan")), tl.where(good, tl.where(inside, OK, CLIPPED), SINGULAR)

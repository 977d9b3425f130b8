"""Cholesky factors of many small correlation matrices at once, unrolled: the kernels' steps in torch."""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Status(IntEnum):
    """What became of a test: r is right, r was cut to ±1, or the set leaves nothing that r could be formed of."""

    OK = 0
    CLIPPED = 1
    SINGULAR = 2


class Factor(NamedTuple):
    """rows: a factor's strictly lower triangle; inverse: its diagonal, inverted; pivot: the least squared one."""

    rows: list[list[Tensor]]
    inverse: list[Tensor]
    pivot: Tensor


def pivot_floor(dtype: torch.dtype) -> float:
    """The pivot at and below which a test is SINGULAR: 2¹⁴ roundings of R, 1.8e-12 in float64 and 2⁻¹⁰ in float32."""
    return 2.0**14 * torch.finfo(dtype).eps / 2


def solve(factor: Factor, column: list[Tensor]) -> list[Tensor]:
    """L⁻¹ x of a column, which is overwritten."""
    for a, x in enumerate(column):
        for b in range(a):
            x.addcmul_(column[b], factor.rows[a][b], value=-1)
        x.mul_(factor.inverse[a])
    return column


def unexplained(solved: list[Tensor], like: Tensor) -> Tensor:
    """1 − ‖L⁻¹ x‖², in the shape of like."""
    left = torch.ones_like(like)
    for w in solved:
        left.addcmul_(w, w, value=-1)
    return left


def factorize(entry: Callable[[int, int], Tensor], M: int, like: Tensor) -> Factor:
    """The factor of the matrices with entry(a, b) in row a and column b < a and 1 on the diagonal."""
    factor = Factor([], [], torch.ones_like(like))
    for a in range(M):
        row = solve(factor, [entry(a, b) for b in range(a)])
        left = unexplained(row, like)
        torch.minimum(factor.pivot, left, out=factor.pivot)
        factor.rows.append(row)
        factor.inverse.append(left.rsqrt_())
    return factor


def decide(covariance: Tensor, left_i: Tensor, left_j: Tensor, pivot: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """r, and its status as int8, from what the set leaves of the covariance and of the two variances."""
    size = (left_i * left_j).sqrt_()
    pivot = torch.minimum(torch.minimum(left_i, left_j), pivot)
    # a NaN fails every one of these
    good = (pivot > floor) & (size > 0) & (covariance == covariance)
    # r is known to 16 roundings over the pivot, and floor is 1024 times that
    outside = covariance.abs() >= size - size * (floor / 1024) / pivot
    r = torch.where(outside, covariance.sign(), covariance / size).masked_fill_(~good, torch.nan)
    return r, outside.to(torch.int8).masked_fill_(~good, Status.SINGULAR)

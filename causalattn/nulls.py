"""Exact permutation nulls: what a statistic of the attention map would be if each row's weights were shuffled."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._backend import Backend
from ._checks import check_qk, resolve_mask
from .masks import Intervals, Mask
from .statistics import AttentionStats, attention_stats

Statistic = Literal["dag_score", "distance", "column"]
# a spread of fewer roundings than this is none: mass² and sum_sq have three, and the sums that made them the rest
NOISE = 8
SOURCE = {"dag_score": "below", "distance": "distance", "column": "columns"}


class Null(NamedTuple):
    """A statistic beside its permutation null, each [B, H].

    value: the statistic; mean, std: of the null; lift: value − mean; z: lift / std, 0 where no permutation changes
    the value.
    """

    value: Tensor
    mean: Tensor
    std: Tensor
    lift: Tensor
    z: Tensor


class _Weights(NamedTuple):
    """A row's weights w_ij over its allowed keys: their number, mean and Σ (w − w̄)², each [B or 1, 1, T] float64."""

    count: Tensor
    mean: Tensor
    spread: Tensor


def permutation_null(
    q: Tensor,
    k: Tensor,
    *,
    statistic: Statistic = "dag_score",
    column: int | str = "sink",
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> Null:
    """Compare a statistic of the attention map with its exact null under permutations of each row's weights.

    A permutation shuffles A_ij over the n_i keys J_i that row i may attend, so it keeps every row's entropy. The
    statistic is Σ_ij w_ij A_ij / N, linear in A, so with w̄_i the mean of w_ij over J_i and r_i = Σ_j A_ij

        mean = Σ_i r_i w̄_i / N
        variance = Σ_i [Σ_j (w_ij − w̄_i)²]·[Σ_j A_ij² − r_i² / n_i] / (n_i − 1) / N²

        "dag_score"  w_ij = 1 where j < p_i                N = Σ_ij A_ij
        "distance"   w_ij = |p_i − j|                      N = the number of rows that may attend something
        "column"     w_ij = 1 where j is the column        N = the same

    in one pass over the rows and O(T) memory; a row with n_i < 2 adds no variance.

    Args:
        q, k, causal, mask, bias, alibi_slopes, scale, softcap, sink, backend: as in `attention`. A bias of −∞ does not
            shrink J_i.
        statistic: "dag_score", "distance" (mean attention distance) or "column" (mean of A_ij at one key).
        column: the key of "column": a position, negative from the end, or "sink", the first real key of the row's own
            sequence or segment.

    Returns:
        Null, computed in float64 from the row statistics. Rows whose weights are equal to within rounding add no
        variance; where none is left no permutation changes the value, std is 0 and so is z.

    Raises:
        ValueError: an unknown statistic or column; else as in `attention`.
        TypeError: as in `attention`.

    Source: moments of a linear rank statistic, Hoeffding 1951 (Ann. Math. Statist. 22, 558).

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> permutation_null(q, k, causal=True).mean
        tensor([[0.4792]])
    """
    check_statistic(statistic)
    check_qk(q, k)
    intervals = resolve_mask(q, k, mask, causal)
    stats = attention_stats(
        q,
        k,
        want=("mass", "sum_sq", SOURCE[statistic]),
        columns=(column,),
        mask=intervals,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scale,
        softcap=softcap,
        sink=sink,
        backend=backend,
    )
    return null_from_stats(stats, intervals, k.shape[2], statistic, column=column)


def null_from_stats(
    stats: AttentionStats,
    intervals: Intervals,
    S: int,
    statistic: Statistic,
    column_index: int = 0,
    *,
    column: int | str = "sink",
) -> Null:
    """The null of `permutation_null` from statistics that a pass has already given.

    Args:
        stats: holds mass, sum_sq and, for "dag_score", "distance" or "column", below, distance or columns.
        intervals: the mask of that pass.
        S: how many keys there are.
        statistic: as in `permutation_null`.
        column_index: which of stats.columns is meant.
        column: the key that stats.columns holds there, as in `permutation_null`.

    Returns:
        Null, in the dtype of stats.

    Raises:
        ValueError: an unknown statistic or column, or a statistic that stats does not hold.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> stats = attention_stats(q, k, causal=True)
        >>> null_from_stats(stats, Mask().resolve(4, 4), 4, "distance").mean
        tensor([[1.2500]])
    """
    check_statistic(statistic)
    source = SOURCE[statistic]
    for name in ("mass", "sum_sq", source):
        if getattr(stats, name) is None:
            raise ValueError(f"stats must hold {name} for the null of {statistic!r}, got None")
    rows = getattr(stats, source)
    if statistic == "column":
        if not -rows.shape[-1] <= column_index < rows.shape[-1]:
            raise ValueError(f"column_index must be one of stats.columns' {rows.shape[-1]}, got {column_index}")
        rows = rows[..., column_index]
    weights = _weights(intervals, S, statistic, column)
    mass = stats.mass.double()
    if statistic == "dag_score":
        total = mass.sum(-1)
    else:
        total = (weights.count > 0).double().expand_as(mass).sum(-1)
    spread = _spread(stats, weights.count)
    return _null(rows.double().sum(-1), (mass * weights.mean).sum(-1), (weights.spread * spread).sum(-1), total, rows)


def _null(value: Tensor, mean: Tensor, variance: Tensor, total: Tensor, like: Tensor) -> Null:
    unit = total.reciprocal().masked_fill(total == 0, 0)
    lift, std = value - mean, variance.sqrt()
    z = torch.where(std > 0, lift / std, 0)
    return Null(*(x.to(like.dtype) for x in (value * unit, mean * unit, std * unit, lift * unit, z)))


def _spread(stats: AttentionStats, count: Tensor) -> Tensor:
    """Variance of each row's weights about their mean, [Σ A² − r² / n] / (n − 1), 0 where rounding is all there is."""
    sum_sq = stats.sum_sq.double()
    spread = sum_sq - stats.mass.double().square() / count.clamp(min=1)
    noise = NOISE * torch.finfo(stats.sum_sq.dtype).eps * sum_sq
    return torch.where(spread > noise, spread, 0) / (count - 1).clamp(min=1)


def _weights(intervals: Intervals, S: int, statistic: Statistic, column: int | str) -> _Weights:
    start, stop, first = (bound[:, None].double() for bound in intervals[:3])  # [B or 1, 1, T]
    count = (stop - start).clamp(min=0)
    zero = torch.zeros_like(count)
    if statistic == "column":
        if column != "sink" and not (isinstance(column, int) and -S <= column < S):
            raise ValueError(f"column must be 'sink' or a position from {-S} to {S - 1}, got {column!r}")
        key = first if column == "sink" else column % S
        chosen = ((start <= key) & (key < stop)).double()
        return _joined(_Weights(chosen, zero + 1, zero), _Weights(count - chosen, zero, zero))
    position = torch.arange(start.shape[2], dtype=start.dtype, device=start.device) + intervals.offset
    edge = torch.minimum(torch.maximum(position, start), stop)
    if statistic == "dag_score":
        return _joined(_Weights(edge - start, zero + 1, zero), _Weights(stop - edge, zero, zero))
    left = _run(position - edge + 1, position - start)
    return _joined(left, _run(edge - position, stop - 1 - position))


def _run(low: Tensor, high: Tensor) -> _Weights:
    """The integers from low to high."""
    count = high - low + 1
    return _Weights(count, (low + high) / 2, count * (count.square() - 1) / 12)


def _joined(left: _Weights, right: _Weights) -> _Weights:
    """Two groups of weights as one; the spread within and between them, so that nothing cancels."""
    count = left.count + right.count
    some = count.clamp(min=1)
    between = left.count * right.count / some * (left.mean - right.mean).square()
    mean = (left.count * left.mean + right.count * right.mean) / some
    return _Weights(count, mean, left.spread + right.spread + between)


def check_statistic(statistic: str) -> None:
    if statistic not in SOURCE:
        raise ValueError(f"statistic must be one of {', '.join(SOURCE)}, got {statistic!r}")

"""The same numbers from an attention matrix at hand, each of its elements read once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import check_square, resolve_mask
from ..covariance import check_dtype
from ..covariance.operators import covariance_of_rows
from ..masks import Intervals, Mask
from ..nulls import SOURCE, Null, Statistic, check_statistic, null_from_stats
from ..statistics import DEFAULT
from ..statistics.results import (
    Asymmetry,
    AttentionStats,
    asymmetry_of,
    chosen_keys,
    column_statistics,
    diagonal,
    share,
    wanted,
)
from .arguments import heads_of
from .interventions import do_cut, do_hard, do_patch, do_soft
from .offsets import offset_means
from .pairs import PAIRS, dense_pairs
from .rows import ROWS, dense_rows

__all__ = [
    "asymmetry", "asymmetry_matrix", "attention_stats", "correlation", "covariance", "dag_score", "do_cut", "do_hard",
    "do_patch", "do_soft", "offset_null", "permutation_null",
]  # fmt: skip


def attention_stats(
    A: Tensor,
    *,
    want: str | Iterable[str] = DEFAULT,
    columns: Sequence[int | str] = ("sink",),
    mask: Mask | Intervals | None = None,
    backend: Backend = "auto",
) -> AttentionStats:
    """Measure an attention map at hand: `causalattn.attention_stats` from A instead of q and k.

    The formulas are the same, with entropy −Σ_j A_ij log A_ij (0 log 0 = 0) and query i at p_i = i + S − T. A is read
    once by rows, and once by tiles and their mirrors for asymmetry, or for dag_score and net_flow where nothing of a
    row is wanted and T = S.

    Args:
        A: probabilities, [T, S], [H, T, S] or [B, H, T, S], any float dtype, any strides. They must not be negative,
            which is not checked: max would be 0 and the entropy is undefined.
        want, columns: as in `causalattn.attention_stats`.
        mask: who may attend whom, for the sink and for received_mean; None is everyone. Entries it forbids count as
            they stand: they should be 0.
        backend: "auto" (Triton for CUDA tensors but float64), "triton" or "torch".

    Returns:
        AttentionStats in float32 (float64 for float64 A), with the leading axes of A. lse is None always: A does not
        hold it. Every statistic is differentiable; ties share the gradient of a maximum, an entry of 0 has none of the
        entropy, and the gradient of A is as large as A.

    Raises:
        ValueError: A has another rank; an unknown want or column; a mask that does not fit; net_flow or asymmetry with
            T ≠ S.
        TypeError: A is not a floating point tensor, or is float64 with backend="triton".

    Example:
        >>> attention_stats(torch.eye(4)).diag
        tensor([1., 1., 1., 1.])
    """
    heads = heads_of(A)
    want = wanted(want) - {"lse"}
    if want & {"net_flow", "asymmetry"}:
        check_square("net_flow and asymmetry", heads, heads.mT)
    intervals = resolve_mask(heads, heads.mT, mask, False)
    chosen = chosen_keys(columns, intervals, heads.shape[3])
    stats = _statistics(heads, intervals, want, chosen, backend)
    return AttentionStats(**{name: _like(A, stats[name]) for name in stats if name in want})


def dag_score(A: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Share of the attention mass that lies strictly below the diagonal: Σ_{j < p_i} A_ij / Σ_ij A_ij.

    Args:
        A, backend: as in `attention_stats`.

    Returns:
        [], [H] or [B, H]; 0 where A sums to 0. See `permutation_null` for what a causal mask makes of it.

    Raises:
        ValueError, TypeError: as in `attention_stats`.

    Source: the mass of tril(A, −1) over the mass of A.

    Example:
        >>> dag_score(torch.full((4, 4), 0.25))
        tensor(0.3750)
    """
    return attention_stats(A, want=("dag_score",), backend=backend).dag_score


def asymmetry(A: Tensor, *, backend: Backend = "auto") -> Asymmetry:
    """Distance of A from its transpose, summed from the differences themselves: see `causalattn.asymmetry`.

    Args:
        A, backend: as in `attention_stats`, with T = S.

    Returns:
        Asymmetry: a number a head each, net_flow a number a token.

    Raises:
        ValueError: T ≠ S; else as in `attention_stats`.

    Example:
        >>> asymmetry(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).l1
        tensor(1.)
    """
    return attention_stats(A, want=("asymmetry",), backend=backend).asymmetry


def asymmetry_matrix(A: Tensor) -> Tensor:
    """A − Aᵀ: positive where i attends j more than j attends i.

    Args:
        A: as in `attention_stats`, with T = S.

    Returns:
        A's shape and dtype.

    Raises:
        ValueError: T ≠ S; else as in `attention_stats`.

    Example:
        >>> asymmetry_matrix(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([[ 0.0000, -0.5000],
                [ 0.5000,  0.0000]])
    """
    heads = heads_of(A)
    check_square("asymmetry_matrix", heads, heads.mT)
    return A - A.mT


def covariance(
    A: Tensor, *, center: bool = False, dtype: torch.dtype = torch.float64, backend: Backend = "auto"
) -> Tensor:
    """C = A Aᵀ, of which only the tiles on and above the diagonal are multiplied: see `attention_covariance`.

    Args:
        A, backend: as in `attention_stats`; entries may have any sign.
        center: subtract from each row its mean over the S keys, so that C is (S − 1)·numpy.cov(A).
        dtype: float64, or float32 where A is no float64.

    Returns:
        [T, T], [H, T, T] or [B, H, T, T] in dtype, symmetric to the last bit, without gradient.

    Raises:
        ValueError: A has another rank.
        TypeError: A is not a floating point tensor, or is float64 with backend="triton"; another dtype.
        NotImplementedError: A requires grad where gradients are recorded.

    Example:
        >>> covariance(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), dtype=torch.float32)
        tensor([[1.0000, 0.5000],
                [0.5000, 0.5000]])
    """
    return _products(A, center, False, dtype, backend)


def correlation(
    A: Tensor, *, center: bool = False, dtype: torch.dtype = torch.float64, backend: Backend = "auto"
) -> Tensor:
    """R_ij = C_ij / √(C_ii C_jj) of `covariance`: see `attention_correlation`. With center it is numpy.corrcoef(A).

    Args:
        A, center, dtype, backend: as in `covariance`.

    Returns:
        As `covariance`; the diagonal is exactly 1, and a row of zeros has 0 throughout.

    Raises:
        ValueError, TypeError, NotImplementedError: as `covariance`.

    Example:
        >>> correlation(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), dtype=torch.float32)
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])
    """
    return _products(A, center, True, dtype, backend)


def permutation_null(
    A: Tensor,
    *,
    statistic: Statistic = "dag_score",
    column: int | str = "sink",
    mask: Mask | Intervals | None = None,
    backend: Backend = "auto",
) -> Null:
    """Compare a statistic of A with its exact null under permutations of each row: see `causalattn.permutation_null`.

    Args:
        A, backend: as in `attention_stats`.
        statistic, column: as in `causalattn.permutation_null`.
        mask: who may attend whom: the keys each row's weights are shuffled over. Pass `causal()` for a causal map.

    Returns:
        Null: a number a head each.

    Raises:
        ValueError: an unknown statistic or column; else as in `attention_stats`.

    Example:
        >>> permutation_null(torch.full((4, 4), 0.25)).mean
        tensor(0.3750)
    """
    check_statistic(statistic)
    heads = heads_of(A)
    intervals = resolve_mask(heads, heads.mT, mask, False)
    want = ("mass", "sum_sq", SOURCE[statistic])
    stats = attention_stats(heads, want=want, columns=(column,), mask=intervals, backend=backend)
    null = null_from_stats(stats, intervals, A.shape[-1], statistic, column=column)
    return Null(*(_like(A, value) for value in null))


def offset_null(A: Tensor, *, mask: Mask | Intervals | None = None) -> Tensor:
    """What A_ij would be if it depended on the distance alone: its mean over the allowed entries with the same p_i − j.

    A less it is an edge's lift over its offset. Σ_ij, dag_score and distance of it are those of A, so it is a null for
    edges and columns only.

    Args:
        A: as in `attention_stats`.
        mask: who may attend whom; entries it forbids are no part of a mean. None is everyone.

    Returns:
        A's shape, float32 (float64 for float64 A); 0 where the mask forbids. It is T×S by nature.

    Raises:
        ValueError, TypeError: as in `attention_stats`.

    Example:
        >>> offset_null(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([[0.7500, 0.0000],
                [0.5000, 0.7500]])
    """
    heads = heads_of(A)
    return offset_means(heads, resolve_mask(heads, heads.mT, mask, False)).reshape(A.shape)


def _products(A: Tensor, center: bool, scaled: bool, dtype: torch.dtype, backend: Backend) -> Tensor:
    heads = heads_of(A)
    check_dtype(dtype, A)
    if torch.is_grad_enabled() and A.requires_grad:
        raise NotImplementedError(f"{'correlation' if scaled else 'covariance'} has no gradient: pass A.detach()")
    C = covariance_of_rows(heads, center, False, scaled, dtype, backend)
    return C.reshape(*A.shape[:-1], A.shape[-2])


def _like(A: Tensor, value: Tensor | Asymmetry) -> Tensor | Asymmetry:
    """value [B, H, ...] with the leading axes and in the precision of A."""
    if isinstance(value, Asymmetry):
        return Asymmetry(*(_like(A, part) for part in value))
    return value.reshape(A.shape[:-2] + value.shape[2:]).to(accumulator(A))


def _passes(want: set[str], square: bool) -> tuple[set[str], set[str]]:
    """What the pass over rows and the pass over pairs have to give; square: T = S and query i sits at key i."""
    rows = want & set(ROWS)
    pairs = {"sum_sq", "difference_sq", "l1", "max", "net_flow"} if "asymmetry" in want else set()
    if "received_mean" in want:
        rows |= {"received"}
    # a statistic that either pass can give comes from the one that runs anyway
    if "net_flow" in want and rows and not pairs:
        rows |= {"received"}
    elif "net_flow" in want:
        pairs |= {"net_flow"}
    if "dag_score" in want:
        (pairs if square and not rows else rows).update(("mass", "below"))
    if "received" in rows:
        rows |= {"mass"}
    return rows, pairs


def _statistics(
    heads: Tensor, intervals: Intervals, want: set[str], chosen: Tensor, backend: Backend
) -> dict[str, Tensor | Asymmetry]:
    """What want names and what was needed for it, in float64; chosen: the keys of columns."""
    rows, pairs = _passes(want, heads.shape[2] == heads.shape[3] and intervals.offset == 0)
    stats, whole = {}, {}
    if rows:
        names = [name for name in ROWS if name in rows]
        packed, received = dense_rows(heads, intervals.offset, " ".join(names), backend)
        stats = dict(zip(names, packed.unbind(), strict=False))
        if "received" in rows:
            stats |= column_statistics(received, stats["mass"], intervals)
    if pairs:
        names = [name for name in PAIRS if name in pairs]
        packed, flow = dense_pairs(heads, " ".join(names), backend)
        whole = dict(zip(names, packed.unbind(), strict=False))
        if "net_flow" in pairs:
            stats["net_flow"] = flow
    if "dag_score" in want:
        below, mass = ((whole[x][..., None] if "below" in whole else stats[x]) for x in ("below", "mass"))
        stats["dag_score"] = share(below, mass)
    if "asymmetry" in want:
        differences = (whole[name] for name in ("difference_sq", "l1", "max"))
        stats["asymmetry"] = asymmetry_of(*differences, whole["sum_sq"][..., None], stats["net_flow"])
    if "diag" in want:
        stats["diag"] = _picked(heads, diagonal(intervals)).squeeze(-1)
    if "columns" in want:
        stats["columns"] = _picked(heads, chosen)
    return stats


def _picked(heads: Tensor, keys: Tensor) -> Tensor:
    """heads at keys [B or 1, T, n], 0 where there is no such key: [B, H, T, n]."""
    B, H, T, S = heads.shape
    keys = keys[:, None].expand(B, H, T, -1).long()
    if S == 0:
        return heads.new_zeros(keys.shape)
    inside = (keys >= 0) & (keys < S)
    return torch.where(inside, heads.gather(3, keys.masked_fill(~inside, 0)), 0)

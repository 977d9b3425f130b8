"""Interventions on a row of an attention matrix at hand."""

import math
from numbers import Integral

import torch
from torch import Tensor

from .._backend import accumulator
from .arguments import heads_of


def do_hard(A: Tensor, row: int, col: int) -> Tensor:
    """Make a row attend one key alone: hard do(i ← j), A'_ij = 1 and 0 elsewhere in row i.

    Args:
        A: probabilities, [T, S], [H, T, S] or [B, H, T, S], any float dtype.
        row, col: i and j; negative ones count from the end.

    Returns:
        A's shape and dtype, a copy; differentiable.

    Raises:
        ValueError: row or col out of range.
        TypeError: row or col no integer.

    Source: the hard do on an attention matrix; Pearl 2009, Causality.

    Example:
        >>> do_hard(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 1, 0)
        tensor([[1., 0.],
                [1., 0.]])
    """
    row, col = _place(A, row, col)
    return _with_row(A, row, torch.zeros_like(A[..., row, :]).index_fill(-1, torch.tensor([col], device=A.device), 1))


def do_soft(A: Tensor, row: int, col: int, strength: float) -> Tensor:
    """Raise one score of a row: softmax(log A_i + strength at j), the row's sum kept.

        A'_ij = c·A_ij e^strength, A'_ik = c·A_ik, with c that keeps Σ_k A_ik

    Args:
        A, row, col: as in `do_hard`.
        strength: in natural units, finite; `do_cut` is −∞ and `do_hard` is ∞.

    Returns:
        As `do_hard`.

    Raises:
        ValueError: row or col out of range, or a strength that is not finite.
        TypeError: row or col no integer.

    Source: the soft do on an attention matrix.

    Example:
        >>> do_soft(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 1, 0, 1.0)
        tensor([[1.0000, 0.0000],
                [0.7311, 0.2689]])
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite (do_cut is −∞ and do_hard is ∞), got {strength}")
    return _tilted(A, row, col, float(strength))


def do_cut(A: Tensor, row: int, col: int) -> Tensor:
    """Take one key from a row: A'_ij = 0, the rest of the row rescaled to keep its sum; 0 where nothing is left.

    Args, Returns, Raises:
        As `do_hard`.

    Example:
        >>> do_cut(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 1, 0)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _tilted(A, row, col, -math.inf)


def do_patch(A: Tensor, row: int, col: int, probability: float | Tensor) -> Tensor:
    """Give one edge another probability, the rest of the row rescaled to keep its sum: a patch from another map.

        A'_ij = c, A'_ik = A_ik (r − c)/(r − A_ij) with r = Σ_k A_ik; c is r where nothing else is left

    Args:
        A, row, col: as in `do_hard`.
        probability: c, from 0 to r: a number, or a tensor that broadcasts to A's batch and heads, such as B[..., i, j].

    Returns, Raises:
        As `do_hard`; ValueError for a probability out of range, which of a tensor on a GPU is not looked at.

    Example:
        >>> do_patch(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 1, 0, 0.2)
        tensor([[1.0000, 0.0000],
                [0.2000, 0.8000]])
    """
    row, col = _place(A, row, col)
    x = A[..., row, :].to(accumulator(A))
    c = torch.as_tensor(probability, dtype=x.dtype, device=A.device).broadcast_to(x.shape[:-1])[..., None]
    key = torch.arange(x.shape[-1], device=A.device) == col
    others, total = x.masked_fill(key, 0), x.sum(-1, keepdim=True)
    if not A.is_cuda and not ((c >= 0) & (c <= total + 0.01)).all():
        raise ValueError(f"probability must be from 0 to the row's sum, got {c.min():.4g} to {c.max():.4g}")
    kept = others.sum(-1, keepdim=True)
    alone = kept == 0
    c = torch.where(alone, total, torch.minimum(c, total))
    return _with_row(A, row, torch.where(key, c, others * ((total - c) / kept.masked_fill(alone, 1))))


def _tilted(A: Tensor, row: int, col: int, strength: float) -> Tensor:
    row, col = _place(A, row, col)
    x = A[..., row, :].to(accumulator(A))
    # e^{−strength} on the others in place of an e^strength that overflows
    factors = torch.full_like(x, math.exp(-max(strength, 0.0)))
    factors[..., col] = math.exp(min(strength, 0.0))
    weights = x * factors
    kept = weights.sum(-1, keepdim=True)
    empty = kept == 0
    tilted = weights / kept.masked_fill(empty, 1) * x.sum(-1, keepdim=True)
    # a finite strength empties no row: where all underflows, it had nothing to act against
    return _with_row(A, row, tilted if strength == -math.inf else torch.where(empty, x, tilted))


def _place(A: Tensor, row: int, col: int) -> tuple[int, int]:
    heads_of(A)
    for name, i, count in (("row", row, A.shape[-2]), ("col", col, A.shape[-1])):
        if not isinstance(i, Integral) or isinstance(i, bool):
            raise TypeError(f"{name} must be an integer, got {type(i).__name__}")
        if not -count <= i < count:
            raise ValueError(f"{name} must be from {-count} to {count - 1}, got {i}")
    return int(row) % A.shape[-2], int(col) % A.shape[-1]


def _with_row(A: Tensor, row: int, values: Tensor) -> Tensor:
    return A.slice_scatter(values[..., None, :].to(A.dtype), -2, row, row + 1)

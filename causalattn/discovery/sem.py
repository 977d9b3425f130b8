"""Causal attention read as a linear structural equation model: total effects, direct ones, and interventions on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_qk, check_square
from ..attention import attention_rows

# ten of a float64's sixteen digits
BOUND = 1e10


class SEM(NamedTuple):
    """x = G x + Λ u over the tokens of each head, A = (I − G)⁻¹ Λ, Λ = diag(A); all float64.

    total: [B, H, T, T], A_ij / A_jj = the total effect of token j on token i, its diagonal 1. weights: [B, H, T, T], G,
    the direct effects, NaN where they are refused. condition: [B, H], ‖A‖·‖A⁻¹‖ of the largest row sums: G has about
    16 − log10(condition) digits.
    """

    total: Tensor
    weights: Tensor
    condition: Tensor

    def do(self, token: int) -> Tensor:
        """The total effects [B, H, T, T] where this token is set from outside and listens to no other.

            total_ik − total_it (total_tk − [t = k]),  t = token

        Raises:
            ValueError: token out of range.
        """
        T = self.total.shape[-1]
        if not -T <= token < T:
            raise ValueError(f"token must lie in {-T}…{T - 1}, got {token}")
        heard = self.total[..., token, :].clone()
        heard[..., token] -= 1
        return self.total - self.total[..., :, token, None] * heard[..., None, :]


def sem(q: Tensor, k: Tensor, *, bound: float = BOUND, **options) -> SEM:
    """Read a causal attention map as a linear model without hidden causes.

        total = A·diag(A)⁻¹,  G = I − diag(A)·A⁻¹

    A random causal map is exponentially ill-conditioned, 10¹³ and more at 32 tokens, and its G then is rounding: it is
    refused where ‖A‖·‖A⁻¹‖ is above bound. Total effects are always right.

    Args:
        q, k: as in `attention`, T = S.
        bound: on the condition.
        options: of `attention_rows`, such as causal, mask, bias, scale; no token may attend a later one.

    Returns:
        SEM, T×T by nature. A head with a token that does not attend itself (padding among them) has condition ∞ and
        total effects of that token NaN.

    Raises:
        ValueError: T ≠ S, bound below 1, an A with weight above its diagonal, or what `attention_rows` refuses.
        TypeError: a dtype that does not fit.

    Source: Rohekar et al. 2024 (arXiv:2412.07446) for A as (I − G)⁻¹ Λ.

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> sem(q, k, causal=True).weights[0, 0, 1].round(decimals=4)
        tensor([0.3302, 0.0000], dtype=torch.float64)
    """
    check_qk(q, k)
    check_square("sem", q, k)
    if not bound >= 1:
        raise ValueError(f"bound must be at least 1, got {bound}")
    T = q.shape[2]
    A = attention_rows(q.detach().double(), k.detach().double(), range(T), **options)
    if not A.is_cuda and A.triu(1).any():
        raise ValueError("sem needs attention without weight above its diagonal, got some: pass causal=True")
    own = A.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(T, dtype=A.dtype, device=A.device)
    listens = own > 0
    inverse = torch.linalg.solve_triangular(
        torch.where(listens.all(-1)[..., None, None], A, identity), identity, upper=False
    )
    condition = A.sum(-1).amax(-1) * inverse.abs().sum(-1).amax(-1) if T else own.sum(-1)
    condition = condition.masked_fill(~listens.all(-1), torch.inf)
    weights = (identity - own[..., None] * inverse).masked_fill(~(condition <= bound)[..., None, None], torch.nan)
    total = (A / own[..., None, :]).masked_fill(~listens[..., None, :], torch.nan)
    return SEM(total, weights, condition)

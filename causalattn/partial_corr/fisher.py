"""Fisher's z: from a sample size and a level of significance to a cut of |r|, and from r to p."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import SLACK, readable


class FisherZ(NamedTuple):
    """z, the statistic √(n − |S| − 3)·artanh r; p, two-sided; log_p, its natural logarithm, finite where p is 0."""

    z: Tensor
    p: Tensor
    log_p: Tensor


def critical_correlation(n: float, alpha: float, order: int) -> float:
    """Return the |r| below which Fisher's z calls two variables independent given a set of `order` others.

        cut = tanh(Φ⁻¹(1 − α/2) / √(n − |S| − 3))

    Of an attention matrix n is a knob, not a sample size: AAᵀ is deterministic.

    Args:
        n: sample size, above order + 3.
        alpha: level of significance, two-sided, between 0 and 1.
        order: |S|.

    Raises:
        ValueError: n ≤ order + 3, alpha outside (0, 1), or order < 0.

    Source: Fisher 1924, "The distribution of the partial correlation coefficient".

    Example:
        >>> round(critical_correlation(768, 0.01, 0), 4)
        0.0929
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if order < 0:
        raise ValueError(f"order must be at least 0, got {order}")
    if not n > order + 3:
        raise ValueError(f"n must be greater than order + 3 = {order + 3}, got {n}")
    # from the lower tail: 1 − α/2 is 1 for a small α
    quantile = -torch.special.ndtri(torch.tensor(alpha / 2, dtype=torch.float64)).item()
    return math.tanh(quantile / math.sqrt(n - order - 3))


def fisher_z(r: Tensor, n: float, order: int | Tensor = 0) -> FisherZ:
    """Test r = 0 by Fisher's z.

        z = √(n − |S| − 3)·artanh r,  p = erfc(|z| / √2)

    p < α exactly where |r| > `critical_correlation(n, alpha, order)`, but for a rounding.

    Args:
        r: (partial) correlations, any shape, float32 or float64.
        n: sample size, above every order + 3.
        order: |S|, one or as many as r has.

    Returns:
        FisherZ in float64, of r's shape; NaN where r is, and z = ±∞, p = 0, log_p = −∞ where |r| is 1 (or a
        rounding more).

    Raises:
        ValueError: on the CPU, n ≤ order + 3, order < 0 or |r| > 1.
        TypeError: r is not float32 or float64.

    Source: Fisher 1924, as `critical_correlation`.

    Example:
        >>> fisher_z(torch.tensor([0.0, 0.5]), 103).p.round(decimals=8)
        tensor([1.0000e+00, 4.0000e-08], dtype=torch.float64)
    """
    if not isinstance(r, Tensor) or r.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"r must be float32 or float64, got {r.dtype if isinstance(r, Tensor) else type(r).__name__}")
    order = torch.as_tensor(order, device=r.device)
    left = (n - 3 - order).double()
    if readable(order) and not (left > 0).all():
        raise ValueError(f"n must be greater than order + 3, got n = {n} and order up to {int(order.max())}")
    if readable(order) and (order < 0).any():
        raise ValueError(f"order must be at least 0, got {int(order.min())}")
    if readable(r) and (r.abs() > 1 + SLACK * torch.finfo(r.dtype).eps).any():
        raise ValueError(f"r must lie in −1…1, got {float(r.abs().nan_to_num(0).max())} in size")
    z = left.sqrt() * r.double().clamp(-1, 1).atanh()
    size = z.abs()
    return FisherZ(z, torch.special.erfc(size / math.sqrt(2)), torch.special.log_ndtr(-size) + math.log(2))

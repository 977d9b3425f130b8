"""What λ more on the score of one edge does to its row: w = p·(e^λ − 1) of the row's sum, in closed form."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._tiles import LN2, LOG2E

# from here on p·e^λ is formed in one exponential, in which it cannot overflow
LARGE = 20.0
# 1 + 2^HIGHEST is 2^HIGHEST, and its square is no infinity in float64 sums of it
HIGHEST = 120.0


class Edit(NamedTuple):
    """w = gain·y with y = 2^shift·p; p' = lift·y / (1 + w) is the edge's new probability."""

    gain: float
    shift: float
    lift: float
    tilt: float  # λ·lift − gain
    rest: float  # p = rest·y


def edit_of(strength: float) -> Edit:
    """Of a finite λ, or of −∞, the cut; +∞, the hard do, has w = ∞ and is its own case."""
    if strength > LARGE:
        gain = -math.expm1(-strength)
        return Edit(gain, min(strength, 1e9) * LOG2E, 1.0, strength - gain, math.exp(-strength))
    if strength == -math.inf:
        return Edit(-1.0, 0.0, 0.0, 1.0, 1.0)
    gain, lift = math.expm1(strength), math.exp(strength)
    tilt = strength * lift - gain
    if abs(strength) < 1e-3:
        # both are λ, and their difference is λ²
        tilt = strength**2 * (1 / 2 + strength * (1 / 3 + strength * (1 / 8 + strength / 30)))
    return Edit(gain, 0.0, lift, tilt, 1.0)


def scaled(t: Tensor, edit: Edit) -> Tensor:
    """y, up to the row's factor, from t, p's logarithm in base 2 up to that factor; t is overwritten."""
    return (t.add_(edit.shift).clamp_(max=HIGHEST) if edit.shift else t).exp2_()


def moved_share(y: Tensor, edit: Edit) -> Tensor:
    """w / (1 + w): by how much of v_j − o the output moves; y is overwritten."""
    w = y.mul_(edit.gain)
    return w.div_(w + 1)


def divergence(y: Tensor, log2_p: Tensor | None, edit: Edit) -> Tensor:
    """KL of the new row from the old, λp' − log(1 + w); without log2_p w must be at most 1."""
    w = edit.gain * y
    total = w + 1
    # log(1 + w) = w − (w − 2·atanh u): what is left of λp' − w is of second order, and so is the series
    small = y * (edit.tilt - edit.gain * w) / total + _beyond_first_order(w)
    if log2_p is None:
        return small
    new = edit.lift * (y / total)
    large = new * (torch.log(new) - log2_p * LN2) - (1 - edit.rest * y) / total * torch.log(total)
    return torch.where(w <= 1, small, large)


def _beyond_first_order(w: Tensor) -> Tensor:
    """w − log(1 + w) for −0.6 < w ≤ 1."""
    u = w / (w + 2)
    z = u * u
    terms = 24 if w.dtype == torch.float64 else 9
    series = torch.full_like(w, 1 / (2 * terms + 1))
    for i in range(2 * terms - 1, 1, -2):
        series.mul_(z).add_(1 / i)
    return u * (w - 2 * z * series)

"""Feature maps φ of linear attention: q·k becomes φ(q)·φ(k)."""

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FeatureMap = Literal["elu", "relu", "exp", "identity", "taylor2", "favor"] | Callable[[Tensor], Tensor]
FAVOR_FEATURES = 256


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 where x > 0, else eˣ, which no rounding of a sum brings to 0.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236).

    Example:
        >>> elu(torch.tensor([-1.0, 2.0]))
        tensor([0.3679, 3.0000])
    """
    return x.clamp(max=0).exp() + torch.relu(x)


def elementwise(name: str, x: Tensor) -> Tensor:
    """φ of a map that takes every entry by itself: "elu", "relu", "exp" or "identity"."""
    return ELEMENTWISE[name][0](x)


def elementwise_gradient(name: str, phi: Tensor) -> Tensor | None:
    """φ'(x) from φ(x); None for 1."""
    return ELEMENTWISE[name][1](phi)


ELEMENTWISE = {
    "elu": (elu, lambda phi: phi.clamp(max=1)),
    "relu": (torch.relu, lambda phi: (phi > 0).to(phi.dtype)),
    "exp": (torch.exp, lambda phi: phi),
    "identity": (lambda x: x, lambda phi: None),
}


def taylor2(x: Tensor) -> Tensor:
    """The second-order Taylor expansion of exp(q·k/√D): φ(q)·φ(k) = 1 + s + s²/2 > 0, s = q·k/√D.

    φ holds 1, xᵢ and every xᵢxⱼ, i ≤ j, of x/D^¼ once: F = 1 + D + D(D + 1)/2.

    Args:
        x: [..., D].

    Returns:
        [..., F].

    Source: Arora et al. 2024 (arXiv:2402.18668).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> taylor2(x) @ taylor2(x).T
        tensor([[1.9571, 1.0000],
                [1.0000, 7.8284]])
    """
    D = x.shape[-1]
    x = x * D**-0.25
    i, j = torch.triu_indices(D, D, device=x.device)
    weights = 1 - (i == j).to(x.dtype) * (1 - 0.5**0.5)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weights], -1)


def favor(features: int = FAVOR_FEATURES, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Build positive orthogonal random features of exp(q·k/√D), as Performers use: φ > 0 and φ(q)·φ(k) is unbiased.

        φ(x)_m = exp(w_m·x' − |x'|²/2) / √F,  x' = x/D^¼

    The w_m are normal vectors, orthogonal in blocks of D, the same for the same seed on every device. The name "favor"
    is `favor(256)`.

    Args:
        features: F; the error falls as F^−½.
        seed: of the w_m.

    Returns:
        A map from [..., D] to [..., F].

    Raises:
        ValueError: fewer than one feature.

    Source: Choromanski et al. 2021 (arXiv:2009.14794).

    Example:
        >>> x = torch.full((2, 16), 0.25)
        >>> bool((favor(512)(x) @ favor(512)(x).T - torch.exp(x @ x.T / 4)).abs().max() < 0.1)
        True
    """
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")

    def positive_features(x: Tensor) -> Tensor:
        D = x.shape[-1]
        x = x * D**-0.25
        w = _directions(features, D, seed).to(x)
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) * features**-0.5

    return positive_features


@torch.compiler.assume_constant_result
def _directions(features: int, D: int, seed: int) -> Tensor:
    return _rotations(features, D, seed)


@functools.lru_cache(maxsize=32)
def _rotations(features: int, D: int, seed: int) -> Tensor:
    """[features, D] float64: rows of random rotations, each as long as a normal vector of its own."""
    generator = np.random.default_rng(seed)
    q, r = np.linalg.qr(generator.normal(size=(-(-features // D), D, D)))
    # every rotation as likely as any other, only with the signs of r's diagonal undone
    rotations = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = np.linalg.norm(generator.normal(size=(features, D)), axis=1)
    return torch.from_numpy(rotations.reshape(-1, D)[:features] * lengths[:, None])


FEATURE_MAPS = {name: phi for name, (phi, _) in ELEMENTWISE.items()} | {"taylor2": taylor2, "favor": favor()}

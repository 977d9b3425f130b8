"""Other projects' conventions of linear attention, to ours and back.

All of them are `linear_attention(q, k, v, decay=decay, feature_map="identity", normalize=False, scale=scale)` with the
scale that the project's own function takes by default: 1 for Mamba-2, D^−½ for RetNet, GLA and fla.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_attention.arguments import readable


class LinearInputs(NamedTuple):
    """q [B, H, T, D], k [B, H_kv, T, D], v [B, H_kv, T, V] and decay, as `linear_attention` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None


class Mamba2Inputs(NamedTuple):
    """x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N]."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def from_mamba2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> LinearInputs:
    """Turn Mamba-2's h_t = e^{dt_t A} h_{t−1} + dt_t B_t x_tᵀ, y_t = C_t·h_t into q = C, k = B, v = dt·x, g = dt·A.

    Args:
        x: [B, T, H, P].
        dt: step sizes after their bias and softplus, [B, T, H].
        A: the negative rates, [H].
        B, C: [B, T, G, N]; G divides H, and each group serves H / G heads in turn.

    Returns:
        LinearInputs with H heads each, views of B and C where G is 1 or H. What Mamba-2 adds, D·x, and the gate are
        left to the caller.

    Raises:
        ValueError: shapes that do not fit.

    Source: Dao & Gu 2024 (arXiv:2405.21060).

    Example:
        >>> x, dt, rates = torch.ones(1, 2, 1, 1), torch.full((1, 2, 1), 0.5), torch.tensor([-2.0])
        >>> from_mamba2(x, dt, rates, x, x).decay
        tensor([[[-1., -1.]]])
    """
    batch, T, H, _ = _shape("x", x, 4)
    if dt.shape != (batch, T, H) or A.shape != (H,):
        raise ValueError(
            f"dt and A must have shapes [{batch}, {T}, {H}] and [{H}], got {list(dt.shape)} and {list(A.shape)}"
        )
    G = _shape("B", B, 4)[2]
    if B.shape[:2] != (batch, T) or B.shape != C.shape or G == 0 or H % G:
        raise ValueError(
            f"B and C must have shape [{batch}, {T}, G, N] with G dividing {H}, got {list(B.shape)} and {list(C.shape)}"
        )
    q, k = (y.transpose(1, 2)[:, :, None].expand(-1, -1, H // G, -1, -1).flatten(1, 2) for y in (C, B))
    return LinearInputs(q, k, (x * dt[..., None]).transpose(1, 2), (dt * A).transpose(1, 2))


def to_mamba2(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Mamba2Inputs:
    """Turn ours into Mamba-2's, with A = −1: dt = −g, x = v / dt, and as many groups as heads.

    Args:
        q: [B, H, T, D].
        k: [B, H, T, D].
        v: [B, H, T, V].
        decay: [B, H, T], below 0: a step of size 0 would write nothing. Checked on the CPU.

    Raises:
        ValueError: shapes that do not fit, or a decay of 0.

    Source: Dao & Gu 2024 (arXiv:2405.21060).

    Example:
        >>> q = k = v = torch.ones(1, 1, 2, 1)
        >>> to_mamba2(q, k, v, torch.full((1, 1, 2), -0.5)).x.flatten()
        tensor([2., 2.])
    """
    if q.shape[:3] != k.shape[:3] or q.shape[:3] != v.shape[:3] or decay.shape != q.shape[:3]:
        raise ValueError(
            f"k, v and decay must have q's [B, H, T] = {list(q.shape[:3])}, "
            f"got {list(k.shape)}, {list(v.shape)} and {list(decay.shape)}"
        )
    if readable(decay) and (decay >= 0).any():
        raise ValueError(f"decay must be below 0 for a step of Mamba-2, got {decay.max().item():.3g}")
    dt = -decay.transpose(1, 2)
    x = v.transpose(1, 2) / dt[..., None]
    return Mamba2Inputs(x, dt, dt.new_full((q.shape[1],), -1.0), k.transpose(1, 2), q.transpose(1, 2))


def from_retnet(gamma: Tensor) -> Tensor:
    """Turn RetNet's γ of S_t = γ S_{t−1} + k_t v_tᵀ, [H], into a decay, log γ.

    γ must lie in (0, 1], which is checked on the CPU: ValueError. The paper's are 1 − 2^{−5−h}.

    Source: Sun et al. 2023 (arXiv:2307.08621).

    Example:
        >>> from_retnet(1 - 2.0 ** -torch.arange(5, 7))
        tensor([-0.0317, -0.0157])
    """
    _check_kept("gamma", gamma)
    return gamma.log()


def to_retnet(decay: Tensor) -> Tensor:
    """Turn a decay a head, [H], into RetNet's γ = e^g.

    Source: Sun et al. 2023 (arXiv:2307.08621).

    Example:
        >>> to_retnet(torch.tensor([0.0]))
        tensor([1.])
    """
    return decay.exp()


def from_gla(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> LinearInputs:
    """Turn GLA's S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, out_t = q_t·S_t into ours, with decay log α.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        gates: α, [B, T, H, K], in (0, 1], which is checked on the CPU.

    Raises:
        ValueError: q, k, v or gates without four axes, or gates out of (0, 1].

    Source: Yang et al. 2024 (arXiv:2312.06635).

    Example:
        >>> q = k = v = torch.ones(1, 2, 1, 1)
        >>> from_gla(q, k, v, q).decay
        tensor([[[[0.],
                  [0.]]]])
    """
    _shape("gates", gates, 4)
    _check_kept("gates", gates)
    return from_fla(q, k, v, gates.log())


def to_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn ours into GLA's q, k, v and gates α = e^g, all [B, T, H, …].

    decay is [B, H, T, D]; ValueError for other axes.

    Source: Yang et al. 2024 (arXiv:2312.06635).

    Example:
        >>> q = k = v = torch.ones(1, 1, 2, 1)
        >>> to_gla(q, k, v, torch.zeros_like(q))[3].shape
        torch.Size([1, 2, 1, 1])
    """
    _shape("decay", decay, 4)
    *tensors, g = to_fla(q, k, v, decay)
    return *tensors, g.exp()


def from_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> LinearInputs:
    """Turn the layout [B, T, H, D] of flash-linear-attention, g [B, T, H] or [B, T, H, D] in log space, into ours.

    A decay a head, [H], is left as it is, and so is a state [B, H, D, V]. All are views. ValueError for q, k or v
    without four axes.

    Source: Yang & Zhang 2024 (github.com/fla-org/flash-linear-attention).

    Example:
        >>> from_fla(*torch.ones(3, 1, 5, 2, 4)).q.shape
        torch.Size([1, 2, 5, 4])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _shape(name, x, 4)
    return LinearInputs(*(x.transpose(1, 2) for x in (q, k, v)), g if g is None or g.ndim == 1 else g.transpose(1, 2))


def to_fla(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Turn ours into the layout of flash-linear-attention: q, k, v, g, as `from_fla` takes them.

    Source: Yang & Zhang 2024 (github.com/fla-org/flash-linear-attention).

    Example:
        >>> to_fla(*torch.ones(3, 1, 2, 5, 4))[0].shape
        torch.Size([1, 5, 2, 4])
    """
    # the swap of two axes is its own inverse
    return tuple(from_fla(q, k, v, decay))


def _shape(name: str, x: Tensor, axes: int) -> torch.Size:
    if x.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got {list(x.shape)}")
    return x.shape


def _check_kept(name: str, x: Tensor) -> None:
    if readable(x) and not ((x > 0) & (x <= 1)).all():
        raise ValueError(f"{name} must lie in (0, 1], got {x.min().item():.3g}…{x.max().item():.3g}")

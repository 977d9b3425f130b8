"""The arguments that the forms of linear attention share, checked and resolved."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import check_qk, check_square, check_v
from ..feature_maps import ELEMENTWISE, FEATURE_MAPS, FeatureMap, elementwise


class LinearState(NamedTuple):
    """s = Σ φ(k) vᵀ [B, H, F, V] and z = Σ φ(k) [B, H, F], decayed, float32 (float64 for float64 inputs).

    With cu_seqlens their first axis is the segments.
    """

    s: Tensor
    z: Tensor


class LinearAttentionOutput(NamedTuple):
    """out [B, H, T, V] in q's dtype; state is what a call on the tokens that follow begins from."""

    out: Tensor
    state: LinearState


def check_tokens(q: Tensor, k: Tensor, v: Tensor | None, name: str) -> None:
    check_qk(q, k)
    check_square(name, q, k)
    if v is not None:
        check_v(v, k)


def check_scale(normalize: bool, scale: float) -> float:
    if normalize and scale != 1:
        raise ValueError(f"scale must be 1 with normalize=True, which divides it out, got {scale}")
    return float(scale)


def check_feature_map(feature_map: FeatureMap, normalize: bool) -> None:
    if isinstance(feature_map, str) and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)} or a callable, got {feature_map!r}")
    if not isinstance(feature_map, str) and not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a callable, got {type(feature_map).__name__}")
    if normalize and feature_map == "identity":
        raise ValueError("feature_map must be at least 0 with normalize=True, got 'identity': pass normalize=False")


def mapped(feature_map: FeatureMap, q: Tensor, k: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k) in the accumulation dtype."""
    q, k = (x.to(accumulator(x)) for x in (q, k))
    if isinstance(feature_map, str) and feature_map in ELEMENTWISE:
        return elementwise(feature_map, q), elementwise(feature_map, k)
    phi = FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    features = phi(q), phi(k)
    for x, y in zip(features, (q, k), strict=True):
        if not isinstance(x, Tensor) or x.shape[:-1] != y.shape[:-1]:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"feature_map must return shape [{', '.join(map(str, y.shape[:-1]))}, F], got {got}")
        # what the maps known by name may hold below 0 never brings a product there
        if normalize and not isinstance(feature_map, str) and readable(x) and (x < 0).any():
            raise ValueError(f"feature_map must be at least 0 with normalize=True, got {x.min().item():.3g}")
    return features[0].to(q.dtype), features[1].to(q.dtype)


def readable(x: Tensor) -> bool:
    """Whether values may be looked at without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def resolve_decay(decay: Tensor | None, q: Tensor) -> Tensor | None:
    """decay as [B, H, T] or [B, H, T, F]; q is φ's."""
    if decay is None:
        return None
    B, H, T, F = q.shape
    if not isinstance(decay, Tensor):
        raise TypeError(f"decay must be a torch.Tensor, got {type(decay).__name__}")
    if not decay.is_floating_point():
        raise TypeError(f"decay must be floating point, got {str(decay.dtype).removeprefix('torch.')}")
    if decay.device != q.device:
        raise ValueError(f"decay must be on q's device {q.device}, got {decay.device}")
    if decay.shape not in ((H,), (B, H, T), (B, H, T, F)):
        raise ValueError(
            f"decay must have shape [{H}], [{B}, {H}, {T}] or [{B}, {H}, {T}, {F}], got {list(decay.shape)}"
        )
    if readable(decay) and not ((decay <= 0) & decay.isfinite()).all():
        wrong = decay[~((decay <= 0) & decay.isfinite())][0].item()
        raise ValueError(f"decay must be a finite logarithm of at most 0, got {wrong:.3g}")
    # wide before it is expanded: its gradient is a sum over tokens
    return decay.to(accumulator(decay))[:, None].expand(B, H, T) if decay.ndim == 1 else decay


def resolve_cu_seqlens(cu_seqlens: Tensor | Sequence[int] | None, q: Tensor) -> Tensor | None:
    """cu_seqlens as [segments + 1] int32 on q's device."""
    if cu_seqlens is None:
        return None
    B, T = q.shape[0], q.shape[2]
    bounds = torch.as_tensor(cu_seqlens)
    if bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must hold integers, got {str(bounds.dtype).removeprefix('torch.')}")
    if bounds.ndim != 1 or bounds.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [segments + 1], got {list(bounds.shape)}")
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1, got {B}")
    if readable(bounds) and (bounds[0] != 0 or (bounds.diff() < 0).any() or bounds[-1] > T):
        raise ValueError(f"cu_seqlens must start at 0, never decrease and end at {T} or before, got {bounds.tolist()}")
    return bounds.to(q.device, torch.int32)


def check_state(state: LinearState | None, name: str, N: int, q: Tensor, V: int) -> None:
    """state against φ's q [B, H, T, F], N sequences and V values."""
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{name} must be a LinearState, got {type(state).__name__}")
    H, F = q.shape[1], q.shape[3]
    wide = accumulator(q)
    for field, x, shape in (("s", state[0], (N, H, F, V)), ("z", state[1], (N, H, F))):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}.{field} must be a torch.Tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{name}.{field} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != wide:
            names = (str(dtype).removeprefix("torch.") for dtype in (wide, x.dtype))
            raise TypeError("{}.{} must be {}, got {}".format(name, field, *names))
        if x.device != q.device:
            raise ValueError(f"{name}.{field} must be on q's device {q.device}, got {x.device}")

"""One token at a time."""

import torch
from torch import Tensor

from .._backend import accumulator
from ..feature_maps import FeatureMap
from .arguments import (
    LinearAttentionOutput,
    LinearState,
    check_feature_map,
    check_scale,
    check_state,
    check_tokens,
    mapped,
    resolve_decay,
)
from .sequences import inverse


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | None,
    *,
    feature_map: FeatureMap = "elu",
    decay: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> LinearAttentionOutput:
    """Take one token more in time and memory that do not depend on how many went before.

    S = e^g S' + φ(k) vᵀ, z = e^g z' + φ(k), out = φ(q)·S / φ(q)·z with normalize, else scale·φ(q)·S.

    Args:
        q: the query, [B, H, 1, D]; float16, bfloat16, float32 or float64.
        k: the key, [B, H_kv, 1, D]; H_kv divides H.
        v: the value, [B, H_kv, 1, V].
        state: S' and z', as `linear_attention` or this returned them; None for zeros.
        feature_map, normalize, scale: as in `linear_attention`.
        decay: g ≤ 0: None for 0, [H], [B, H, 1] or [B, H, 1, F].

    Returns:
        LinearAttentionOutput with a new state; the old one is as it was. Differentiable as plain torch is.

    Raises:
        ValueError: a shape, device, decay, scale or state that does not fit, or a negative φ to normalise.
        TypeError: a dtype that does not fit.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236).

    Example:
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> first = linear_attention_step(q[:, :, :1], k[:, :, :1], v[:, :, :1], None)
        >>> linear_attention_step(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], first.state).out
        tensor([[[[0.4444, 0.5556]]]])
    """
    check_tokens(q, k, v, "linear_attention_step")
    if q.shape[2] != 1:
        raise ValueError(f"q must hold one token, [B, H, 1, D], got {list(q.shape)}")
    check_feature_map(feature_map, normalize)
    scale = check_scale(normalize, scale)
    dtype, wide = q.dtype, accumulator(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k = mapped(feature_map, q, k, normalize)
    group, V = q.shape[1] // k.shape[1], v.shape[3]
    check_state(state, "state", q.shape[0], q, V)
    decay = resolve_decay(decay, q)
    with torch.autocast(q.device.type, enabled=False):
        # one key head beside the query heads it serves
        grouped = q[:, :, 0].unflatten(1, (-1, group))[..., None]  # [B, H_kv, group, F, 1]
        column = k[:, :, 0, None, :, None]
        s, z = column * v[:, :, 0, None, None].to(wide), column
        if state is not None:
            kept = 1 if decay is None else decay.to(wide).exp().reshape(*q.shape[:2], -1, 1).unflatten(1, (-1, group))
            s = s + kept * state[0].unflatten(1, (-1, group))
            z = z + kept * state[1][..., None].unflatten(1, (-1, group))
        num = (grouped * s).sum(3)
        out = num * inverse((grouped * z).sum(3)) if normalize else num * scale
        shape = (*q.shape[:2], q.shape[3])
        s = s.expand(*grouped.shape[:4], V).reshape(*shape, V)
        z = z.expand(*grouped.shape[:4], 1).reshape(shape)
    return LinearAttentionOutput(out.reshape(*q.shape[:2], 1, V).to(dtype), LinearState(s, z))

"""Causal linear attention, with decay or without: out, the normaliser and the end state.

    S_t = e^{g_t} S_{t−1} + φk_t v_tᵀ,  z_t = e^{g_t} z_{t−1} + φk_t
    out_t = φq_tᵀ S_t / den_t or scale · φq_tᵀ S_t,  den_t = φq_t·z_t

Shapes: q [B, H, T, D], k [B, H_kv, T, D], v [B, H_kv, T, V], decay [B, H, T] or [B, H, T, D] or None, s0 and s
[sequences, H, D, V], z0 and z [sequences, H, D], den [B, H, T] float32; out [B, H, T, V] in q's dtype.
Backward saves q, k, v, decay, the initial and the end state, out and den: nothing a chunk.
Up to `group_tokens` tokens a sequence is one group and one launch; beyond, groups start from states.py's.
Precision and cost: product.py without decay or with one a token, channel.py with one a channel.
"""

import torch

from ._groups import Factor, plan, rows
from .channel import channel_product
from .product import cumulated, product
from .states import group_states


def linear_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature: str,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """out, den (empty unless normalize), s and z; rows beyond the last segment are 0."""
    B, H, T, D = q.shape
    V = v.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    if decay is not None and decay.dim() == 4:
        decay = rows(decay)
    groups = plan(q, cu_seqlens)
    new = {"dtype": torch.float32, "device": q.device}
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    out = allocate(B, H, T, V, dtype=q.dtype, device=q.device)
    den = allocate((B, H, T) if normalize else 0, **new)
    s, z = torch.empty(groups.sequences, H, D, V, **new), torch.empty(groups.sequences, H, D, **new)
    share = H // k.shape[1] if H else 1
    fq, fk, fv = Factor(q, 1, feature), Factor(k, share, feature), Factor(v, share)
    states = group_states(fk, fv, decay, None, None, 1.0, groups, H, s0, z0, z=True)
    end = {"vector": "inner", "den": den if normalize else None, "end": s, "end_vector": z}
    if decay is not None and decay.dim() == 4:
        channel_product(fq, fk, fv, decay, None, None, scale, groups, states, out, **end)
    else:
        product(fq, fk, fv, cumulated(decay, q, V, groups), None, None, scale, groups, states, out, **end)
    return out, den, s, z

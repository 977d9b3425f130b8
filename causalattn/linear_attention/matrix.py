"""The attention matrix that linear attention never forms, for looking at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..feature_maps import FeatureMap
from .arguments import check_feature_map, check_scale, check_tokens, mapped, resolve_cu_seqlens, resolve_decay
from .sequences import inverse

# entries of one block of rows, times features where each decays by itself
BLOCK_ENTRIES = 2**22


def linear_attention_matrix(
    q: Tensor,
    k: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    decay: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Form A with out = A·v of `linear_attention` without an initial state: O(T²) memory by nature.

        W_ts = Σ_d φ(q)_td φ(k)_sd e^{G_td − G_sd} for s ≤ t in one segment, G the cumulated decay; else 0
        A = W divided by its row sums with normalize, else scale·W

    Args:
        q: queries, [B, H, T, D]; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, T, D]; H_kv divides H.
        feature_map, decay, causal, normalize, scale, cu_seqlens: as in `linear_attention`.

    Returns:
        A, [B, H, T, T], in q's dtype; a row of sum 0 is 0. Differentiable as plain torch is.

    Raises:
        ValueError: a shape, device, decay, scale or cu_seqlens that does not fit, or a negative φ to normalise.
        TypeError: a dtype that does not fit.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236); decayed as in Dao & Gu 2024 (arXiv:2405.21060).

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> linear_attention_matrix(q, k)
        tensor([[[[1.0000, 0.0000],
                  [0.4444, 0.5556]]]])
    """
    check_tokens(q, k, None, "linear_attention_matrix")
    check_feature_map(feature_map, normalize)
    scale, dtype = check_scale(normalize, scale), q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k = mapped(feature_map, q, k, normalize)
    cu_seqlens = resolve_cu_seqlens(cu_seqlens, q)
    decay = resolve_decay(decay, q)
    if not causal and (decay is not None or cu_seqlens is not None):
        raise ValueError("causal=False takes no decay and no cu_seqlens, got one")
    T = q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if cu_seqlens is not None:
        segment = torch.bucketize(torch.arange(T, device=q.device), cu_seqlens, right=True)
        seen &= (segment[:, None] == segment) & (segment < cu_seqlens.shape[0])
    G = None if decay is None else (decay if decay.ndim == 4 else decay[..., None]).double().cumsum(2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    width = 1 if G is None else G.shape[3]
    rows = max(1, BLOCK_ENTRIES // max(1, q.shape[0] * q.shape[1] * T * width))
    with torch.autocast(q.device.type, enabled=False):
        blocks = [_rows(q, k, G, seen, slice(t, t + rows)) for t in range(0, T, rows)]
        W = torch.cat(blocks, 2) if blocks else q.new_zeros(*q.shape[:2], T, T)
        A = W * (inverse(W.sum(-1, keepdim=True)) if normalize else scale)
    return A.to(dtype)


def _rows(q: Tensor, k: Tensor, G: Tensor | None, seen: Tensor, rows: slice) -> Tensor:
    """W of some rows, [B, H, rows, T]."""
    q, seen = q[:, :, rows], seen[rows]
    if G is None:
        return (q @ k.mT).masked_fill(~seen, 0)
    kept = (G[:, :, rows, None] - G[:, :, None]).to(q.dtype).masked_fill(~seen[..., None], -torch.inf).exp()
    if G.shape[3] == 1:
        return (q @ k.mT) * kept[..., 0]
    return torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, kept)

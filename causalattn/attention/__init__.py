"""Softmax attention: output, log-sum-exp and, on request, the probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import Backend
from .._checks import check_probs_dtype, check_qk, check_v, resolve_logits, resolve_mask
from ..interventions import Plan
from ..interventions.edges import surgeries_of, touched_rows
from ..masks import Intervals, Mask
from .forward import attend
from .intervene import Inputs, operate
from .intervened_rows import edited_rows
from .map import AttentionMap, attention_map
from .rows import attention_rows
from .topk import TopK, attention_topk

__all__ = [
    "AttentionMap", "AttentionOutput", "TopK",
    "attention", "attention_map", "attention_rows", "attention_topk",
]  # fmt: skip


class AttentionOutput(NamedTuple):
    """out [B, H, T, V] in q's dtype; lse [B, H, T], natural log, float32; probs [B, H, T, S] or None."""

    out: Tensor
    lse: Tensor
    probs: Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    do: Plan | None = None,
    return_probs: bool = False,
    probs_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> AttentionOutput:
    """Attend: out_i = Σ_j A_ij v_j with A_ij = exp(S_ij − lse_i), in O(T) memory.

        S_ij = scale·q_i·k_j, then softcap·tanh(S / softcap), then + bias_ij − slope_h·|p_i − j|, p_i = i + S − T
        lse_i = log(Σ_{start_i ≤ j < stop_i} exp(S_ij) + exp(sink))

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H, and each key head serves H / H_kv query heads in turn.
        v: values, [B, H_kv, S, V].
        causal: intersect the mask with `masks.causal()`.
        mask: who may attend whom; None is everyone.
        bias: added to the scores, broadcastable to [B, H, T, S]; −inf forbids. It is dense: O(T·S) if you make it so.
        alibi_slopes: slope_h, [H] or [B, H], of a bias linear in the distance that is never made dense; no gradient.
        scale: multiplies q·k; D^−½ by default.
        softcap: bound of the scores in natural units; None for none.
        sink: a learned logit a head, [H], that takes probability and gives no value.
        do: interventions, of `Do`, on the rows they name (p_i) and the keys: closed forms, so that each edge costs
            O(D), and a row that loses most of its probability O(S·D). After a hard do a row's lse is the score of its
            one key; a row that keeps no key has out 0 and lse −∞.
        return_probs: also return A, [B, H, T, S]: O(T·S) memory.
        probs_dtype: A's dtype, q's (the default) or float32 (float64 for float64 q).
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        AttentionOutput. A row that may attend nothing has out 0 and lse −∞. A NaN or inf in q or k reaches only the
        rows that may attend it; in v it may reach the rows of a tile where some row may attend it.

    Raises:
        ValueError: a shape, device, mask or softcap that does not fit; an intervention out of range, on an edge that
            mask or bias (−∞, or its dtype's least) forbids, or in conflict with another.
        TypeError: a dtype that does not fit, float64 with backend="triton", or a do that is no Plan.
        NotImplementedError: backend="triton" without the triton package.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); computed online as in Dao et al. 2022 (arXiv:2205.14135).

    Example:
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> attention(q, k, v, causal=True).lse
        tensor([[[0.7071, 1.1079]]])
        >>> from causalattn import Do
        >>> attention(q, k, v, causal=True, do=Do.cut(1, 0)).out[0, 0, 1]
        tensor([0., 1.])
    """
    check_qk(q, k)
    check_v(v, k)
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    dtype = check_probs_dtype(probs_dtype, q) if return_probs else None
    out, lse, _, _, probs = attend(q, k, v, *logits, dtype, backend)
    if do is not None:
        surgeries = surgeries_of(do, q, k, logits)
        out, lse, _ = operate(surgeries, Inputs(q, k, v, logits, backend), out, lse)
        if return_probs:
            rows = touched_rows(surgeries, q.device)
            probs = probs.index_copy(2, rows, edited_rows(surgeries, q, k, logits, rows, dtype, backend)[0])
    return AttentionOutput(out, lse, probs if return_probs else None)

"""Softmax attention: output, log-sum-exp and, on request, the probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import Backend, accumulator, use_triton
from ._checks import Logits, check_qk, check_v, resolve_logits, resolve_mask
from ._tiles import BLOCK, FLOOR, LN2, Head, heads, padded
from .masks import Intervals, Mask


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
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_probs: bool = False,
    backend: Backend = "auto",
) -> AttentionOutput:
    """Attend: out_i = Σ_j A_ij v_j with A_ij = exp(S_ij − lse_i), in O(T) memory.

        S_ij = scale·q_i·k_j, then softcap·tanh(S / softcap), then + bias_ij
        lse_i = log(Σ_{start_i ≤ j < stop_i} exp(S_ij) + exp(sink))

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H, and each key head serves H / H_kv query heads in turn.
        v: values, [B, H_kv, S, V].
        causal: intersect the mask with `masks.causal()`.
        mask: who may attend whom; None is everyone.
        bias: added to the scores, broadcastable to [B, H, T, S]; −inf forbids. It is dense: O(T·S) if you make it so.
        scale: multiplies q·k; D^−½ by default.
        softcap: bound of the scores in natural units; None for none.
        sink: a learned logit a head, [H], that takes probability and gives no value.
        return_probs: also return A, [B, H, T, S] in q's dtype: O(T·S) memory.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        AttentionOutput. A row that may attend nothing has out 0 and lse −∞. A NaN or inf in q or k reaches only the
        rows that may attend it; in v it may reach the rows of a tile where some row may attend it.

    Raises:
        ValueError: a shape, device, mask or softcap that does not fit.
        TypeError: a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); computed online as in Dao et al. 2022 (arXiv:2205.14135).

    Example:
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> attention(q, k, v, causal=True).lse
        tensor([[[0.7071, 1.1079]]])
    """
    check_qk(q, k)
    check_v(v, k)
    intervals = resolve_mask(q, k, mask, causal)
    logits = resolve_logits(q, k, intervals, bias=bias, scale=scale, softcap=softcap, sink=sink)
    out, lse, probs = _attention(q, k, v, *logits, return_probs, backend)
    return AttentionOutput(out, lse, probs if return_probs else None)


@torch.library.custom_op("causalattn::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    offset: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    return_probs: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = Logits(start, stop, offset, bias, scale, softcap, sink)
    if use_triton(backend, q):
        from .kernels.attention import attention_fwd

        return attention_fwd(q, k, v, *logits, return_probs)
    return _attention_torch(q, k, v, logits, return_probs)


@_attention.register_fake
def _(q, k, v, start, stop, offset, bias, scale, softcap, sink, return_probs, backend):
    return _empty_results(q, k, v, return_probs)


def _empty_results(q: Tensor, k: Tensor, v: Tensor, return_probs: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = q.shape
    return (
        q.new_empty(B, H, T, v.shape[3]),
        q.new_empty(B, H, T, dtype=accumulator(q)),
        q.new_empty((B, H, T, k.shape[2]) if return_probs else 0),
    )


def _attention_torch(
    q: Tensor, k: Tensor, v: Tensor, logits: Logits, return_probs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, probs = _empty_results(q, k, v, return_probs)
    for head in heads(q, k, logits):
        b, h = head.b, head.h
        values = padded(v[b, h // (q.shape[1] // v.shape[1])].to(head.dtype), BLOCK)
        for m in head.row_blocks():
            rows = slice(m, min(m + BLOCK, head.T))
            count = rows.stop - m
            out_m, lse_m, pivot, unit = _attend(head, values, m)
            out[b, h, rows], lse[b, h, rows] = out_m[:count], lse_m[:count] * LN2
            if return_probs:
                probs[b, h, rows] = 0
                for n in head.key_blocks(m):
                    p = head.exponents(head.scores(m, n), pivot).exp2_().mul_(unit)
                    probs[b, h, rows, n : n + BLOCK] = p[:count, : head.S - n]
    return out, lse, probs


def _attend(head: Head, values: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Online softmax over the keys of one block of rows: out, lse, and with them A = exp2(x − pivot)·unit; base 2."""
    m_i = values.new_full((BLOCK, 1), FLOOR)
    l_i = torch.zeros(BLOCK, 1, dtype=torch.float64, device=values.device)
    acc = values.new_zeros(BLOCK, values.shape[1])
    for n in head.key_blocks(m):
        x = head.scores(m, n)
        m_new = torch.maximum(m_i, x.amax(1, keepdim=True).mul_(head.unit))
        p = head.exponents(x, m_new).exp2_()
        alpha = torch.exp2(m_i - m_new)
        l_i.mul_(alpha).add_(p.sum(1, keepdim=True))
        acc.mul_(alpha).addmm_(p, _reached(values[n : n + BLOCK], head.seen(m, n)))
        m_i = m_new
    lse, unit = head.normalizer(m_i, l_i)
    return acc.mul_(unit), lse[:, 0], m_i, unit.to(acc.dtype)


def _reached(values: Tensor, seen: Tensor | None) -> Tensor:
    """values with the rows that no query of the tile may attend set to 0: 0 · NaN must not leak from padding."""
    return values if seen is None else values.masked_fill(~seen.any(0)[:, None], 0)

"""One pass over the keys of each row: out and lse, and what later passes and the gradient need."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, FLOOR, LN2, Head, heads, padded, reached_values
from .backward import attend_backward


@torch.library.custom_op("causalattn::attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start: Tensor,
    stop: Tensor,
    offset: int,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    probs_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (empty without v), lse, the row maxima pivot (of the score, base 2) and largest (of A), probs (or empty).

    out has v's dtype, which may be wider than q's.
    """
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    if use_triton(backend, q):
        from ..kernels.attention.forward import attention_fwd

        return attention_fwd(q, k, v, *logits, probs_dtype)
    return attend_torch(q, k, v, logits, probs_dtype)


@attend.register_fake
def _(q, k, v, start, stop, offset, bias, slopes, scale, softcap, sink, probs_dtype, backend):
    return _empty_results(q, k, v, probs_dtype)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.softcap, sink, _, ctx.backend = inputs
    q, k, v, start, stop, ctx.offset, bias, slopes = tensors
    out, _, pivot, largest, _ = output
    ctx.save_for_backward(q, k, v, start, stop, bias, slopes, sink, pivot, largest, out)
    ctx.mark_non_differentiable(pivot, largest)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _pivot, _largest, dprobs):
    q, k, v, start, stop, bias, slopes, sink, pivot, largest, out = ctx.saved_tensors
    if v is not None and dout is None:
        dout = torch.zeros_like(out)
    if dlse is None:
        dlse = torch.zeros_like(pivot)
    dq, dk, dv, dbias, dsink = attend_backward(
        q, k, v, start, stop, ctx.offset, bias, slopes, ctx.scale, ctx.softcap, sink,
        pivot, largest, out, dout if v is not None else None, dlse, dprobs, ctx.needs_input_grad[6], ctx.backend,
    )  # fmt: skip
    dv = None if v is None else dv
    dbias = dbias.to(bias.dtype) if ctx.needs_input_grad[6] else None
    dsink = None if sink is None else dsink
    return dq, dk, dv, None, None, None, dbias, None, None, None, dsink, None, None


attend.register_autograd(_backward, setup_context=_setup_context)


def _empty_results(q: Tensor, k: Tensor, v: Tensor | None, probs_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    B, H, T, _ = q.shape
    return (
        q.new_empty(0) if v is None else v.new_empty(B, H, T, v.shape[3]),
        *(q.new_empty(B, H, T, dtype=accumulator(q)) for _ in range(3)),
        q.new_empty(0 if probs_dtype is None else (B, H, T, k.shape[2]), dtype=probs_dtype),
    )


def attend_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logits: Logits,
    probs_dtype: torch.dtype | None = None,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `attend`; with ceiling [B, H, T] without the scores above it, and 0 for the blocks of rows that have none."""
    results = _empty_results(q, k, v, probs_dtype)
    if ceiling is not None:
        results = tuple(x.zero_() for x in results)
    out, lse, pivot, largest, probs = results
    for head in heads(q, k, logits):
        b, h = head.b, head.h
        if ceiling is not None:
            head.leave_out(ceiling[b, h])
        values = None if v is None else padded(v[b, h // (q.shape[1] // k.shape[1])].to(head.dtype), BLOCK)
        for m in head.row_blocks():
            rows = slice(m, min(m + BLOCK, head.T))
            count = rows.stop - m
            if ceiling is not None and not q.is_cuda and ceiling[b, h, rows].isposinf().all():
                continue
            acc, m_i, l_i = _online_softmax(head, values, m)
            lse_m, unit = head.normalizer(m_i, l_i)
            lse[b, h, rows], pivot[b, h, rows], largest[b, h, rows] = (x[:count, 0] for x in (lse_m * LN2, m_i, unit))
            unit = unit.to(head.dtype)
            if values is not None:
                out[b, h, rows] = acc.mul_(unit)[:count]
            if probs_dtype is not None:
                probs[b, h, rows] = 0
                for n in head.key_blocks(m):
                    probs[b, h, rows, n : n + BLOCK] = head.probs(m, n, m_i, unit)[:count, : head.S - n]
    return results


def _online_softmax(head: Head, values: Tensor | None, m: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of one block of rows: Σ_j exp2(x − m_i)·v_j (None without values), m_i = max_j x in base 2, Σ_j exp2(x − m_i)."""
    m_i = head.q.new_full((BLOCK, 1), FLOOR)
    l_i = torch.zeros(BLOCK, 1, dtype=torch.float64, device=m_i.device)
    acc = None if values is None else head.q.new_zeros(BLOCK, values.shape[1])
    for n in head.key_blocks(m):
        x = head.scores(m, n)
        m_new = torch.maximum(m_i, x.amax(1, keepdim=True).mul_(head.unit))
        p = head.exponents(x, m_new).exp2_()
        alpha = torch.exp2(m_i - m_new)
        l_i.mul_(alpha).add_(p.sum(1, keepdim=True))
        if values is not None:
            acc.mul_(alpha).addmm_(p, reached_values(values[n : n + BLOCK], head.seen(m, n)))
        m_i = m_new
    return acc, m_i, l_i

"""The gradient of `forward.attend`, A formed again tile by tile."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._seen import zero_where_zero_
from .._tiles import BLOCK, Head, ScoreGradients, heads, padded, reached_values, row_factors, sink_gradient


@torch.library.custom_op("causalattn::attention_backward", mutates_args=())
def attend_backward(
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
    pivot: Tensor,
    largest: Tensor,
    out: Tensor,
    dout: Tensor | None,
    dlse: Tensor,
    dprobs: Tensor | None,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and sink, empty where there is none; dout is given where v is."""
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    triton = use_triton(backend, q)
    if triton:
        from ..kernels.attention.backward import attention_bwd

        upstream = (pivot, largest, out, dout, dlse, dprobs)
        *gradients, delta = attention_bwd(q, k, v, *logits[:-1], *upstream, bias_grad)
    else:
        *gradients, delta = _attend_backward_torch(q, k, v, logits, pivot, largest, out, dout, dlse, dprobs, bias_grad)
    dsink = q.new_empty(0) if sink is None else sink_gradient(sink, pivot, largest, delta, not triton)
    return *gradients, dsink


@attend_backward.register_fake
def _(q, k, v, start, stop, offset, bias, slopes, scale, softcap, sink,
      pivot, largest, out, dout, dlse, dprobs, bias_grad, backend):  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        k.new_empty(0 if v is None else v.shape),
        q.new_empty(bias.shape if bias_grad else 0, dtype=accumulator(q)),
        q.new_empty(0) if sink is None else sink.new_empty(sink.shape),
    )


def _attend_backward_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logits: Logits,
    pivot: Tensor,
    largest: Tensor,
    out: Tensor,
    dout: Tensor | None,
    dlse: Tensor,
    dprobs: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    grads = ScoreGradients(q, k, logits, bias_grad)
    dv = k.new_zeros(0 if v is None else v.shape, dtype=accumulator(q))
    delta = -dlse
    for head in heads(q, k, logits):
        b, h, group = head.b, head.h, head.h // (q.shape[1] // k.shape[1])
        upstream = _Upstream(head, None if v is None else v[b, group], dout, dprobs)
        factors = row_factors(head, pivot, largest)
        if v is not None:
            delta[b, h] += torch.linalg.vecdot(dout[b, h].to(head.dtype), out[b, h].to(head.dtype))
        if dprobs is not None:
            delta[b, h] += _probs_delta(head, upstream, factors)
        less = padded(delta[b, h, :, None], BLOCK)
        for m in head.row_blocks():
            rows = slice(m, m + BLOCK)
            for n in head.key_blocks(m):
                p = head.probs(m, n, factors[0][rows], factors[1][rows])
                if v is not None:
                    keys = slice(n, min(n + BLOCK, head.S))
                    # a whole tile's product: a ragged one would round otherwise
                    dv[b, group, keys] += (p.T @ upstream.dout[rows])[: keys.stop - n]
                # whatever the gradients of padding are
                grads.add(head, m, n, zero_where_zero_(upstream.tile(m, n).sub_(less[rows]).mul_(p), p))
    dbias = q.new_empty(0, dtype=accumulator(q)) if grads.bias is None else grads.bias
    return grads.q.to(q.dtype), grads.k.to(k.dtype), dv.to(k.dtype), dbias, delta


class _Upstream:
    """∂L/∂A_ij = dout_i·v_j + dprobs_ij of one head, tile by tile."""

    def __init__(self, head: Head, v: Tensor | None, dout: Tensor | None, dprobs: Tensor | None):
        b, h = head.b, head.h
        self.head = head
        self.dprobs = None if dprobs is None else dprobs[b, h]
        self.values = self.dout = None
        if v is not None:
            self.values = padded(v.to(head.dtype), BLOCK)
            # a row that may attend nothing: 0 · NaN must not leak from padding
            self.dout = padded(dout[b, h].to(head.dtype), BLOCK).masked_fill(head.start >= head.stop, 0)

    def tile(self, m: int, n: int) -> Tensor:
        """Of rows m… and keys n…, [BLOCK, BLOCK]."""
        if self.values is None:
            tile = self.head.q.new_zeros(BLOCK, BLOCK)
        else:
            tile = self.dout[m : m + BLOCK] @ reached_values(self.values[n : n + BLOCK], self.head.seen(m, n)).T
        if self.dprobs is not None:
            direct = self.dprobs[m : m + BLOCK, n : n + BLOCK]
            tile[: direct.shape[0], : direct.shape[1]] += direct
        return tile


def _probs_delta(head: Head, upstream: _Upstream, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Σ_j A_ij dprobs_ij of each row."""
    delta = torch.zeros(head.T, dtype=torch.float64, device=head.q.device)
    for m in head.row_blocks():
        rows = slice(m, min(m + BLOCK, head.T))
        for n in head.key_blocks(m):
            direct = upstream.dprobs[rows, n : n + BLOCK].to(head.dtype)
            p = head.probs(m, n, *(x[m : m + BLOCK] for x in factors))[: direct.shape[0], : direct.shape[1]]
            delta[rows] += torch.linalg.vecdot(p, direct.masked_fill(p == 0, 0))
    return delta

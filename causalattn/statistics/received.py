"""One pass over the rows of each key, with each row's maximum known: the probability every key receives."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, heads, row_factors
from .backward import input_gradients, save


@torch.library.custom_op("causalattn::received", mutates_args=())
def received(
    q: Tensor,
    k: Tensor,
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
    backend: str,
) -> Tensor:
    """c_j = Σ_i A_ij: [B, H, S]; pivot and largest [B, H, T] are the rows' maximum score in base 2 and probability."""
    if use_triton(backend, q):
        from ..kernels.statistics.received import received_fwd

        return received_fwd(q, k, start, stop, offset, bias, slopes, scale, softcap, pivot, largest)
    return _received_torch(q, k, Logits(start, stop, offset, bias, slopes, scale, softcap, sink), pivot, largest)


@received.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, pivot, largest, backend):
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    save(ctx, inputs, *inputs[10:12])


def _backward(ctx, grad):
    return *input_gradients(ctx, received=grad), None, None, None


received.register_autograd(_backward, setup_context=_setup_context)


def _received_torch(q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, largest: Tensor) -> Tensor:
    result = q.new_empty(*q.shape[:2], k.shape[2], dtype=accumulator(q))
    for head in heads(q, k, logits):
        rows, weights = row_factors(head, pivot, largest)
        total = torch.zeros(head.k.shape[0], dtype=torch.float64, device=q.device)
        for m in head.row_blocks():
            for n in head.key_blocks(m):
                total[n : n + BLOCK] += head.probs(m, n, rows[m : m + BLOCK], weights[m : m + BLOCK]).sum(0)
        result[head.b, head.h] = total[: head.S]
    return result

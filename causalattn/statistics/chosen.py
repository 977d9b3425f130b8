"""A_ij at one chosen key a row: the diagonal, the sink, any column."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import LOG2E
from .backward import input_gradients, save

ROWS_AT_ONCE = 4096


@torch.library.custom_op("causalattn::chosen_probs", mutates_args=())
def chosen_probs(
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
    chosen: Tensor,
    backend: str,
) -> Tensor:
    """A_ij = exp2(x_ij − pivot_i)·largest_i at j = chosen [B or 1, T, n] int32, 0 where forbidden: [B, H, T, n]."""
    if use_triton(backend, q):
        from ..kernels.statistics.chosen import chosen_probs_fwd

        return chosen_probs_fwd(q, k, start, stop, offset, bias, slopes, scale, softcap, pivot, largest, chosen)
    return _chosen_probs_torch(
        q, k, Logits(start, stop, offset, bias, slopes, scale, softcap, sink), pivot, largest, chosen
    )


@chosen_probs.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, pivot, largest, chosen, backend):
    return q.new_empty(*q.shape[:3], chosen.shape[2], dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    save(ctx, inputs, *inputs[10:13])


def _backward(ctx, grad):
    return *input_gradients(ctx, picked=grad), None, None, None, None


chosen_probs.register_autograd(_backward, setup_context=_setup_context)


def _chosen_probs_torch(q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, largest: Tensor, chosen: Tensor) -> Tensor:
    B, H, T, _ = q.shape
    dtype = accumulator(q)
    result = q.new_zeros(B, H, T, chosen.shape[2], dtype=dtype)
    if k.shape[2] == 0:
        return result
    start, stop, chosen = (x.expand(B, *x.shape[1:]) for x in (logits.start, logits.stop, chosen))
    positions = torch.arange(T, device=q.device)[:, None] + logits.offset
    bias = None if logits.bias is None else logits.bias.expand(B, H, T, k.shape[2])
    slopes = None if logits.slopes is None else logits.slopes.double().expand(B, H)
    for b in range(B):
        for h in range(H):
            keys = k[b, h // (H // k.shape[1])]
            for m in range(0, T, ROWS_AT_ONCE):
                rows = slice(m, m + ROWS_AT_ONCE)
                j = chosen[b, rows].long()
                seen = (j >= start[b, rows, None]) & (j < stop[b, rows, None])
                j = j.masked_fill(~seen, 0)
                # in float64: a second rounding of a large score would not be the one its row's maximum had
                x = torch.linalg.vecdot(q[b, h, rows, None].double(), keys[j].double()) * logits.scale
                if logits.softcap > 0:
                    x = torch.tanh(x / logits.softcap) * logits.softcap
                if bias is not None:
                    x = x + bias[b, h, rows].gather(1, j)
                if slopes is not None:
                    x = x - slopes[b, h] * (positions[rows] - j).abs()
                p = torch.exp2(x * LOG2E - pivot[b, h, rows, None]) * largest[b, h, rows, None]
                result[b, h, rows] = p.masked_fill(~seen, 0)
    return result

"""A_ij at one chosen key a row: the diagonal, the sink, any column."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import LOG2E
from .backward import input_gradients, save

KEYS_AT_ONCE = 16384


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
    for (b, h, rows), j in _some_rows(q, chosen[:, None].expand(B, H, T, -1)):
        seen = (j >= start[b, rows, None]) & (j < stop[b, rows, None])
        x = _scores(q, k, logits, (b, h, rows), j.masked_fill(~seen, 0))
        p = torch.exp2(x - pivot[b, h, rows, None]) * largest[b, h, rows, None]
        result[b, h, rows] = p.masked_fill(~seen, 0)
    return result


def chosen_scores(q: Tensor, k: Tensor, logits: Logits, chosen: Tensor) -> Tensor:
    """Scores in base 2 at the keys chosen [B, H, T, n], whether a row may attend them or not: float64, −∞ at −1."""
    result = q.new_full(chosen.shape, -torch.inf, dtype=torch.float64)
    if k.shape[2] > 0:
        for place, j in _some_rows(q, chosen):
            result[place] = _scores(q, k, logits, place, j.clamp(min=0)).masked_fill(j < 0, -torch.inf)
    return result


def _some_rows(q: Tensor, chosen: Tensor) -> Iterator[tuple[tuple[int, int, slice], Tensor]]:
    """A head and some of its rows after another, with the keys chosen for them."""
    B, H, T, _ = q.shape
    at_once = max(1, KEYS_AT_ONCE // max(1, chosen.shape[3]))
    for b in range(B):
        for h in range(H):
            for m in range(0, T, at_once):
                rows = slice(m, m + at_once)
                yield (b, h, rows), chosen[b, h, rows].long()


def _scores(q: Tensor, k: Tensor, logits: Logits, place: tuple[int, int, slice], j: Tensor) -> Tensor:
    """Scores of some rows of a head on keys j [rows, n], in base 2."""
    b, h, rows = place
    B, H, T, _ = q.shape
    keys = k[b, h // (H // k.shape[1])]
    # in float64: a second rounding of a large score would not be the one its row's maximum had
    x = torch.linalg.vecdot(q[b, h, rows, None].double(), keys[j].double()) * logits.scale
    if logits.softcap > 0:
        x = torch.tanh(x / logits.softcap) * logits.softcap
    if logits.bias is not None:
        x = x + logits.bias.expand(B, H, T, k.shape[2])[b, h, rows].gather(1, j)
    if logits.slopes is not None:
        positions = torch.arange(T, device=q.device)[rows, None] + logits.offset
        x = x - logits.slopes.double().expand(B, H)[b, h] * (positions - j).abs()
    return x * LOG2E

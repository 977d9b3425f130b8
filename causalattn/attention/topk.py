"""The n largest probabilities of each row: one streaming pass, or a block of rows at a time for a large n."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import Backend, accumulator, use_triton
from .._checks import Logits, check_qk, resolve_logits, resolve_mask
from .._tiles import BLOCK, FLOOR, FORBIDDEN, Head, heads, padded
from ..masks import Intervals, Mask

KEYS_AT_ONCE = 8192
WORKSPACE = 2**28
# of a score while it is selected from: itself, two masks, the places of equal ones
SCORE_BYTES = 16


class TopK(NamedTuple):
    """values [B, H, T, n], float32 (float64 for float64 q), largest first; indices [B, H, T, n], int32, their keys."""

    values: Tensor
    indices: Tensor


def attention_topk(
    q: Tensor,
    k: Tensor,
    n: int,
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> TopK:
    """Return the n largest probabilities of each query and the keys they are at, in O(T·n) memory.

    A_ij = exp(S_ij − lse_i), with S and lse as in `attention`; the scores decide the order, equal ones by key.

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H.
        n: how many of each row, at least 1; beyond 64 it takes a workspace of 256 MiB at most.
        causal, mask, bias, alibi_slopes, scale, softcap, sink: as in `attention`.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        TopK, without gradient. Where a row may attend fewer than n keys (n > S among others) the rest has value 0
        and index −1. In a row that holds a NaN the values are NaN and the indices any.

    Raises:
        ValueError: n < 1, or a shape, device, mask or softcap that does not fit.
        TypeError: a dtype that does not fit, n that is no integer, or float64 with backend="triton".
        NotImplementedError: an input that requires grad where gradients are recorded, or backend="triton" without
            the triton package.

    Source: the running maximum and sum of Milakov and Gimelshein 2018 (arXiv:1805.02867), fused there with a top-k too.

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> attention_topk(q, k, 2, causal=True)
        TopK(values=tensor([[[[1.0000, 0.0000],
                  [0.6698, 0.3302]]]]), indices=tensor([[[[ 0, -1],
                  [ 1,  0]]]], dtype=torch.int32))
    """
    check_qk(q, k)
    if not isinstance(n, int | torch.SymInt) or isinstance(n, bool):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, bias, sink)):
        raise NotImplementedError(
            "attention_topk has no gradient: pass q.detach() and k.detach(), and gather from attention_rows"
        )
    return TopK(*select_largest(q, k, *logits, n, backend))


@torch.library.custom_op("causalattn::attention_topk", mutates_args=())
def select_largest(
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
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """values and indices, [B, H, T, n]."""
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    if use_triton(backend, q):
        from ..kernels.attention.topk import SLOTS, attention_topk_fwd

        return attention_topk_fwd(q, k, *logits, n) if n <= SLOTS else _select_from_written_scores(q, k, logits, n)
    return _select_torch(q, k, logits, n)


@select_largest.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, n, backend):
    return _empty_results(q, n)


def _empty_results(q: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], n, dtype=accumulator(q)), q.new_empty(*q.shape[:3], n, dtype=torch.int32)


def _select_from_written_scores(q: Tensor, k: Tensor, logits: Logits, n: int) -> tuple[Tensor, Tensor]:
    from ..kernels.attention.forward import attention_fwd
    from ..kernels.attention.topk import scores_fwd

    B, H, T, _ = q.shape
    S = k.shape[2]
    values, indices = (x.fill_(fill) for x, fill in zip(_empty_results(q, n), (0, -1), strict=True))
    if values.numel() == 0 or S == 0:
        return values, indices
    _, _, pivot, largest, _ = attention_fwd(q, k, None, *logits, None)
    flat_values, flat_indices, pivot, largest = (x.flatten(0, 1) for x in (values, indices, pivot, largest))
    rows_at_once = max(1, WORKSPACE // (SCORE_BYTES * S))
    heads_at_once = max(1, rows_at_once // T)
    for h in range(0, B * H, heads_at_once):
        some = range(h, min(h + heads_at_once, B * H))
        for m in range(0, T, rows_at_once):
            rows = range(m, min(m + rows_at_once, T))
            x = scores_fwd(q, k, *logits[:-1], some, rows)
            best, places = largest_of(x.flatten(0, 1), min(n, S))
            here = (slice(h, some.stop), slice(m, rows.stop), slice(min(n, S)))
            best, places = (y.view(len(some), len(rows), -1) for y in (best, places))
            # in float64: where a vector ends must not show in a bit
            p = torch.exp2(best.double() - pivot[here[:2]][..., None]).masked_fill_(best <= FLOOR, 0)
            # 0 · NaN: a row that holds a NaN says so
            flat_values[here] = (p * largest[here[:2]][..., None]).float()
            flat_indices[here] = places.masked_fill_(best <= FLOOR, -1).int()
    return values, indices


def _select_torch(q: Tensor, k: Tensor, logits: Logits, n: int) -> tuple[Tensor, Tensor]:
    values, indices = _empty_results(q, n)
    for head in heads(q, k, logits):
        space = head.q.new_empty(BLOCK, min(KEYS_AT_ONCE, head.k.shape[0]))
        for m in head.row_blocks():
            rows = slice(m, min(m + BLOCK, head.T))
            best, index, m_i, l_i = _row_block(head, m, n, space)
            _, unit = head.normalizer(m_i, l_i)
            best, index = padded(best, BLOCK), padded(index, BLOCK)
            free = best <= FLOOR
            p = head.exponents(best, m_i).exp2_().masked_fill_(free, 0).mul_(unit)
            values[head.b, head.h, rows] = p[: rows.stop - m]
            indices[head.b, head.h, rows] = index.masked_fill_(free, -1)[: rows.stop - m].int()
    return values, indices


def _row_block(head: Head, m: int, n: int, space: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one block of rows: the n largest scores and their keys, the maximum in base 2 and the sum of exponentials."""
    count = min(BLOCK, head.T - m)
    best = head.q.new_full((count, n), FORBIDDEN)
    index = torch.full((count, n), -1, device=best.device)
    m_i = head.q.new_full((BLOCK, 1), FLOOR)
    l_i = torch.zeros(BLOCK, 1, dtype=torch.float64, device=best.device)
    tiles = head.key_blocks(m)
    at_once = space.shape[1] // BLOCK
    for some in (tiles[c : c + at_once] for c in range(0, len(tiles), max(1, at_once))):
        for n0 in some:
            x = head.scores(m, n0)
            space[:, n0 - some[0] :][:, :BLOCK] = x
            m_new = torch.maximum(m_i, x.amax(1, keepdim=True).mul_(head.unit))
            l_i.mul_(torch.exp2(m_i - m_new)).add_(head.exponents(x, m_new).exp2_().sum(1, keepdim=True))
            m_i = m_new
        # what is held comes first: its keys are the smaller ones
        best, places = largest_of(torch.cat([best, space[:count, : len(some) * BLOCK]], 1), n)
        held = index.gather(1, places.clamp(max=n - 1))
        index = torch.where(places < n, held, places + (some[0] - n))
    return best, index, m_i, l_i


def largest_of(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row of x, descending, and their places, equal ones from left to right."""
    values, places = x.topk(min(n + 1, x.shape[1]))
    # topk leaves open which of equal ones it takes and in which order
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > FLOOR)
    values, places = values[:, :n], places[:, :n]
    if x.is_cuda:
        return _ordered(x, values, places)
    rows = tied.any(1).nonzero()[:, 0]
    if len(rows):
        values[rows], places[rows] = _ordered(x[rows], values[rows], places[rows])
    return values, places


def _ordered(x: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The same values, with the places of equal ones the leftmost and ascending."""
    n, width = values.shape[1], x.shape[1]
    last = values[:, -1:]
    above = (values > last).sum(1, keepdim=True)
    # of those equal to the last the leftmost, and before them all that are larger
    distance = torch.arange(width, 0, -1, device=x.device, dtype=torch.int32)
    leftmost = width - torch.where(x == last, distance, 0).topk(n).values.long()
    rank = torch.arange(n, device=x.device)
    places = torch.where(rank < above, places, leftmost.gather(1, (rank - above).clamp(min=0)))
    places = places.clamp(max=width - 1).sort(1).values
    order = x.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    return values, places.gather(1, order)

"""A few heads of one sequence at a time, as the torch path goes through them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._backend import accumulator
from ..feature_maps import elementwise
from .prefix import CHUNK, GROUP, padded


class Heads:
    """φ(q), φ(k) and [v, 1] of query heads h in whole chunks, zeros beyond the sequence, in the accumulation dtype.

    All are [heads, tokens, …]. Of a part of a sequence, begins says whether it is the first. The column of ones makes
    z the last column of S: numerator and denominator are one product.
    """

    def __init__(
        self, inputs: tuple[Tensor | None, ...], feature: str, n: int, b: int, h: slice, tokens: slice, begins: bool
    ):
        q, k, v, decay, s0, z0 = inputs
        self.begins = begins
        self.n, self.b, self.h, self.tokens = n, b, h, tokens
        share = q.shape[1] // k.shape[1]
        self.kv_heads = [i // share for i in range(h.start, h.stop)]
        self.dtype = accumulator(q)
        self.T, self.V = tokens.stop - tokens.start, v.shape[3]
        self.q = padded(elementwise(feature, q[b, h, tokens].to(self.dtype)))
        self.k = padded(elementwise(feature, k[b, self.kv_heads, tokens].to(self.dtype)))
        self.v = padded(with_ones(v[b, self.kv_heads, tokens].to(self.dtype)))
        self.decay = None
        if decay is not None:
            self.decay = padded(decay[b, h, tokens, None] if decay.ndim == 3 else decay[b, h, tokens])
        self.state = self.q.new_zeros(len(self.q), q.shape[3], self.V + 1)
        if s0 is not None:
            self.state = torch.cat([s0[n, h], z0[n, h, :, None]], 2).to(self.dtype)


def with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def sequences(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s0: Tensor | None, z0: Tensor | None,
    cu_seqlens: Tensor | None, feature: str, length: int | None = None,
) -> Iterator[Heads]:  # fmt: skip
    """Every sequence or segment: as many heads at once as make a group, of long ones `length` tokens after another.

    Autocast is off: it would round products to 16 bits.
    """
    H, T = q.shape[1:3]
    if cu_seqlens is None:
        places = [(b, b, slice(0, T)) for b in range(q.shape[0])]
    else:
        # where their values were not checked, on a GPU, they are cut to the tokens there are
        edges = cu_seqlens.clamp(0, T).tolist()
        places = [(n, 0, slice(edges[n], max(edges[n], edges[n + 1]))) for n in range(len(edges) - 1)]
    with torch.autocast(q.device.type, enabled=False):
        for n, b, tokens in places:
            chunks = max(1, -(-(tokens.stop - tokens.start) // CHUNK))
            for h in _runs(slice(0, H), max(1, GROUP // (chunks * CHUNK))):
                for part in _runs(tokens, length or max(1, T)):
                    yield Heads((q, k, v, decay, s0, z0), feature, n, b, h, part, part.start == tokens.start)


def _runs(whole: slice, length: int) -> Iterator[slice]:
    """whole in runs of `length`, one of them where it is empty."""
    for start in range(whole.start, max(whole.stop, whole.start + 1), length):
        yield slice(start, min(start + length, whole.stop))


def inverse(den: Tensor) -> Tensor:
    """1/den, 0 for 0, and a gradient of 0 there."""
    empty = den == 0
    return torch.where(empty, 0, 1 / den.masked_fill(empty, 1))

"""One pass over the rows of each key, with lse known: the probability every key receives."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, LOG2E, heads


@torch.library.custom_op("causalattn::received", mutates_args=())
def received(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    stop: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    lse: Tensor,
    backend: str,
) -> Tensor:
    """c_j = Σ_i A_ij: [B, H, S]."""
    if use_triton(backend, q):
        from ..kernels.statistics.received import received_fwd

        return received_fwd(q, k, start, stop, bias, scale, softcap, lse)
    return _received_torch(q, k, Logits(start, stop, 0, bias, scale, softcap, None), lse)


@received.register_fake
def _(q, k, start, stop, bias, scale, softcap, lse, backend):
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=accumulator(q))


def _received_torch(q: Tensor, k: Tensor, logits: Logits, lse: Tensor) -> Tensor:
    result = q.new_empty(*q.shape[:2], k.shape[2], dtype=accumulator(q))
    for head in heads(q, k, logits):
        # rows added to fill the tile, and empty rows, weigh nothing: their scores less ∞ are −∞
        pivot = lse_pivot(lse[head.b, head.h], head.q.shape[0])
        total = torch.zeros(head.k.shape[0], dtype=torch.float64, device=q.device)
        for m in head.row_blocks():
            for n in head.key_blocks(m):
                p = head.scores(m, n).sub_(pivot[m : m + BLOCK]).exp2_()
                total[n : n + BLOCK] += p.sum(0)
        result[head.b, head.h] = total[: head.S]
    return result


def lse_pivot(lse: Tensor, length: int) -> Tensor:
    """lse [T] in base 2 as a column of the given length, +∞ where a row is empty or does not exist."""
    pivot = (lse * LOG2E)[:, None].masked_fill(lse[:, None].isneginf(), torch.inf)
    return torch.cat([pivot, pivot.new_full((length - len(lse), 1), torch.inf)])

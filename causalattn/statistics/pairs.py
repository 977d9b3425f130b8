"""One pass over each pair of tiles (i, j) and (j, i), with lse known: how far A is from its transpose."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, Head, heads
from .received import lse_pivot

PAIRS = ("difference_sq", "sum_sq", "l1", "max")


@torch.library.custom_op("causalattn::pair_statistics", mutates_args=())
def pair_statistics(
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
    """Σ(A_ij − A_ji)², Σ(A_ij + A_ji)², Σ|A_ij − A_ji| and max|A_ij − A_ji|: [4, B, H]."""
    if use_triton(backend, q):
        from ..kernels.statistics.pairs import pair_statistics_fwd

        return pair_statistics_fwd(q, k, start, stop, bias, scale, softcap, lse)
    return _pair_statistics_torch(q, k, Logits(start, stop, 0, bias, scale, softcap, None), lse)


@pair_statistics.register_fake
def _(q, k, start, stop, bias, scale, softcap, lse, backend):
    return q.new_empty(len(PAIRS), *q.shape[:2], dtype=accumulator(q))


def _pair_statistics_torch(q: Tensor, k: Tensor, logits: Logits, lse: Tensor) -> Tensor:
    result = q.new_empty(len(PAIRS), *q.shape[:2], dtype=accumulator(q))
    for head in heads(q, k, logits):
        pivot = lse_pivot(lse[head.b, head.h], head.q.shape[0])
        sums = torch.zeros(3, dtype=torch.float64, device=q.device)
        largest = q.new_zeros((), dtype=result.dtype)
        for m in head.row_blocks():
            for n in range(m, head.T, BLOCK):
                parts, peak = _tile_pair(head, pivot, m, n)
                sums += parts * (1 if m == n else 2)
                largest = torch.maximum(largest, peak)
        result[:3, head.b, head.h], result[3, head.b, head.h] = sums, largest
    return result


def _tile_pair(head: Head, pivot: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Σ(a − b)², Σ(a + b)², Σ|a − b| and max|a − b| of tile a = A[m:, n:] and its mirror b = A[n:, m:]ᵀ."""
    a = head.scores(m, n).sub_(pivot[m : m + BLOCK]).exp2_().clone()
    b = a.T if m == n else head.scores(n, m).sub_(pivot[n : n + BLOCK]).exp2_().T
    difference = a - b
    parts = (
        torch.linalg.vector_norm(difference).square(),
        torch.linalg.vector_norm(a + b).square(),
        torch.linalg.vector_norm(difference, 1),
    )
    return torch.stack(parts).double(), difference.abs().max()

"""One pass over each pair of tiles (i, j) and (j, i), with lse known: how far A is from its transpose."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, Head, heads
from .received import lse_pivot

PAIRS = ("difference_sq", "l1", "max")


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
    """Σ(A_ij − A_ji)², Σ|A_ij − A_ji| and max|A_ij − A_ji|: [3, B, H]."""
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
        sums = torch.zeros(2, dtype=torch.float64, device=q.device)
        largest = torch.zeros((), dtype=result.dtype, device=q.device)
        for m in head.row_blocks():
            for n in range(m, head.T, BLOCK):
                difference = _difference(head, pivot, m, n)
                if difference is not None:
                    parts = (torch.linalg.vector_norm(difference).square(), torch.linalg.vector_norm(difference, 1))
                    sums += torch.stack(parts) * (1 if m == n else 2)
                    largest = torch.maximum(largest, torch.linalg.vector_norm(difference, torch.inf))
        result[:2, head.b, head.h], result[2, head.b, head.h] = sums, largest
    return result


def _difference(head: Head, pivot: Tensor, m: int, n: int) -> Tensor | None:
    """A[m:, n:] less its mirror A[n:, m:]ᵀ, up to sign; None where the mask forbids both."""
    if not head.reached(m, n):
        return _mirror(head, pivot, m, n) if head.reached(n, m) else None
    a = head.scores(m, n).sub_(pivot[m : m + BLOCK]).exp2_()
    return a.sub_(_mirror(head, pivot, m, n)) if head.reached(n, m) else a


def _mirror(head: Head, pivot: Tensor, m: int, n: int) -> Tensor:
    return head.scores(n, m, transposed=True).sub_(pivot[n : n + BLOCK].T).exp2_()

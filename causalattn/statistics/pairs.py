"""One pass over pairs of tiles (i, j) and (j, i), each row's maximum known: how far A is from its transpose."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, Head, heads, row_factors
from .backward import input_gradients, save

PAIRS = ("difference_sq", "l1", "max")


@torch.library.custom_op("causalattn::pair_statistics", mutates_args=())
def pair_statistics(
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
    """Σ(A_ij − A_ji)², Σ|A_ij − A_ji| and max|A_ij − A_ji|: [3, B, H]."""
    if use_triton(backend, q):
        from ..kernels.statistics.pairs import pair_statistics_fwd

        return pair_statistics_fwd(q, k, start, stop, offset, bias, slopes, scale, softcap, pivot, largest)
    return _pair_statistics_torch(q, k, Logits(start, stop, offset, bias, slopes, scale, softcap, sink), pivot, largest)


@pair_statistics.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, pivot, largest, backend):
    return q.new_empty(len(PAIRS), *q.shape[:2], dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    save(ctx, inputs, *inputs[10:12])


def _backward(ctx, grad):
    # the maximum has no gradient
    return *input_gradients(ctx, pairs=grad[:2]), None, None, None


pair_statistics.register_autograd(_backward, setup_context=_setup_context)


def _pair_statistics_torch(q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, largest: Tensor) -> Tensor:
    result = q.new_empty(len(PAIRS), *q.shape[:2], dtype=accumulator(q))
    for head in heads(q, k, logits):
        factors = row_factors(head, pivot, largest)
        sums = torch.zeros(2, dtype=torch.float64, device=q.device)
        peak = torch.zeros((), dtype=result.dtype, device=q.device)
        for m in head.row_blocks():
            for n in range(m, head.T, BLOCK):
                difference = _difference(head, factors, m, n)
                if difference is not None:
                    # a row at a time, then float64: one float32 sum of a whole tile loses four digits
                    squares = torch.linalg.vector_norm(difference, dim=1).double().square().sum()
                    absolute = torch.linalg.vector_norm(difference, 1, dim=1)
                    sums += torch.stack((squares, absolute.double().sum())) * (1 if m == n else 2)
                    peak = torch.maximum(peak, torch.linalg.vector_norm(difference, torch.inf))
        result[:2, head.b, head.h], result[2, head.b, head.h] = sums, peak
    return result


def _difference(head: Head, factors: tuple[Tensor, Tensor], m: int, n: int) -> Tensor | None:
    """A[m:, n:] less its mirror A[n:, m:]ᵀ, up to sign; None where the mask forbids both."""
    if not head.reached(m, n):
        return _mirror(head, factors, m, n) if head.reached(n, m) else None
    pivot, largest = (x[m : m + BLOCK] for x in factors)
    a = head.probs(m, n, pivot, largest)
    return a.sub_(_mirror(head, factors, m, n)) if head.reached(n, m) else a


def _mirror(head: Head, factors: tuple[Tensor, Tensor], m: int, n: int) -> Tensor:
    pivot, largest = (x[n : n + BLOCK].T for x in factors)
    return head.exponents(head.scores(n, m, transposed=True), pivot).exp2_().mul_(largest)

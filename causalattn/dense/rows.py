"""One pass over a matrix at hand: what a row holds (maximum, mass, entropy, Σ A², …) and what a key receives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulator, use_triton
from .._tiles import BLOCK
from ..statistics.rows import below_diagonal

ROWS = ("max", "mass", "entropy", "sum_sq", "below", "distance", "received")


@torch.library.custom_op("causalattn::dense_rows", mutates_args=())
def dense_rows(A: Tensor, offset: int, want: str, backend: str) -> tuple[Tensor, Tensor]:
    """The statistics of A [B, H, T, S] ≥ 0 that want names, separated by spaces and in the order of ROWS, in float64.

    Query i sits at offset + i. Returns all but received [wanted, B, H, T], and received [B, H, S], with no keys where
    it is not wanted.
    """
    if use_triton(backend, A):
        from ..kernels.dense.rows import dense_rows_fwd

        return dense_rows_fwd(A, offset, want.split())
    return _dense_rows_torch(A, offset, want.split())


@dense_rows.register_fake
def _(A, offset, want, backend):
    names = want.split()
    rows, keys = len(names) - ("received" in names), A.shape[3] if "received" in names else 0
    return (
        A.new_empty(rows, *A.shape[:3], dtype=torch.float64),
        A.new_empty(*A.shape[:2], keys, dtype=torch.float64),
    )


def _setup_context(ctx, inputs, output):
    A, ctx.offset, want, _ = inputs
    ctx.names = want.split()
    ctx.save_for_backward(A)


def _backward(ctx, grad_rows, grad_received):
    """∂L/∂A in A's dtype, from whole-matrix expressions: it is T×S by nature."""
    (A,) = ctx.saved_tensors
    T, S = A.shape[2:]
    x = A.to(accumulator(A))
    below = torch.arange(T, device=A.device)[:, None] + ctx.offset - torch.arange(S, device=A.device)
    slopes = {
        "max": lambda: tied_shares(x, -1),
        "mass": lambda: 1.0,
        # log 0 is −∞: an entry of 0, as a mask leaves it, takes no gradient
        "entropy": lambda: torch.where(x > 0, -1 - x.log(), 0),
        "sum_sq": lambda: 2 * x,
        "below": lambda: below > 0,
        "distance": lambda: below.abs(),
    }
    total = torch.zeros_like(x)
    for grad, name in zip(grad_rows, ctx.names, strict=False):
        total = total + grad.to(x.dtype)[..., None] * slopes[name]()
    if "received" in ctx.names:
        total = total + grad_received.to(x.dtype)[:, :, None]
    return total.to(A.dtype), None, None, None


dense_rows.register_autograd(_backward, setup_context=_setup_context)


def tied_shares(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """The gradient of a maximum: equal shares of it."""
    if x.numel() == 0:
        return x
    tied = x == x.amax(axes, keepdim=True)
    return tied / tied.sum(axes, keepdim=True)


def _dense_rows_torch(A: Tensor, offset: int, want: list[str]) -> tuple[Tensor, Tensor]:
    B, H, T, S = A.shape
    names = [name for name in want if name != "received"]
    rows = A.new_zeros(len(names), B, H, -(-T // BLOCK) * BLOCK, dtype=torch.float64)
    received = A.new_zeros(B, H, -(-S // BLOCK) * BLOCK if "received" in want else 0, dtype=torch.float64)
    for head, sums, keys in zip(A.flatten(0, 1), rows.flatten(1, 2).unbind(1), received.flatten(0, 1), strict=True):
        for m in range(0, T, BLOCK):
            for n in range(0, S, BLOCK):
                a = tile(head, m, n)
                _add_tile(sums[:, m : m + BLOCK], a, m + offset, n, names)
                if "received" in want:
                    keys[n : n + BLOCK] += a.sum(0)
    return rows[..., :T].contiguous(), received[..., :S].contiguous()


def tile(A: Tensor, m: int, n: int) -> Tensor:
    """[BLOCK, BLOCK] of A [T, S] from its corner (m, n), rows contiguous, zeros beyond: both set the bits of a sum."""
    a = A[m : m + BLOCK, n : n + BLOCK].to(accumulator(A))
    rows, keys = a.shape
    if rows < BLOCK or keys < BLOCK:
        a = F.pad(a, (0, BLOCK - keys, 0, BLOCK - rows))
    return a if a.stride(1) == 1 else a.contiguous()


def _add_tile(sums: Tensor, a: Tensor, position: int, n: int, names: list[str]) -> None:
    """Take a tile whose corner is (position, n) into sums [wanted, BLOCK]."""
    mass = _row_sums(a)
    for total, name in zip(sums, names, strict=True):
        if name == "max":
            torch.maximum(total, a.amax(1), out=total)
        elif name == "mass":
            total += mass
        elif name == "entropy":
            # finite, so that 0 · log 0 is 0
            total -= _row_sums(a.clamp(min=torch.finfo(a.dtype).tiny).log_().mul_(a))
        elif name == "sum_sq":
            total += _row_sums(a.square())
        elif name == "below":
            total += below_diagonal(a, mass, position, n)
        else:
            rows, keys = (torch.arange(x, x + BLOCK, device=a.device, dtype=a.dtype) for x in (position, n))
            total += _row_sums((rows[:, None] - keys).abs_().mul_(a))


def _row_sums(a: Tensor) -> Tensor:
    """Σ_j of a tile in float64, its quarters in float32."""
    return a.unflatten(1, (4, -1)).sum(2).sum(1, dtype=torch.float64)

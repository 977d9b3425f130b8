"""One pass over pairs of tiles of a square matrix at hand, (i, j) and (j, i): its mass below, its distance from Aᵀ."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._tiles import BLOCK
from .rows import tied_shares, tile

PAIRS = ("mass", "below", "sum_sq", "difference_sq", "l1", "max", "net_flow")


@torch.library.custom_op("causalattn::dense_pairs", mutates_args=())
def dense_pairs(A: Tensor, want: str, backend: str) -> tuple[Tensor, Tensor]:
    """The statistics of A [B, H, T, T] ≥ 0 that want names, separated by spaces and in the order of PAIRS, in float64.

        mass Σ A_ij;  below Σ_{j < i} A_ij;  sum_sq Σ A_ij²;  difference_sq Σ(A_ij − A_ji)²;  l1 Σ|A_ij − A_ji|;
        max |A_ij − A_ji|;  net_flow_i = Σ_j (A_ij − A_ji)

    Returns all but net_flow [wanted, B, H], and net_flow [B, H, T], with no tokens where it is not wanted.
    """
    if use_triton(backend, A):
        from ..kernels.dense.pairs import dense_pairs_fwd

        return dense_pairs_fwd(A, want.split())
    return _dense_pairs_torch(A, want.split())


@dense_pairs.register_fake
def _(A, want, backend):
    names = want.split()
    heads, tokens = len(names) - ("net_flow" in names), A.shape[2] if "net_flow" in names else 0
    return (
        A.new_empty(heads, *A.shape[:2], dtype=torch.float64),
        A.new_empty(*A.shape[:2], tokens, dtype=torch.float64),
    )


def _setup_context(ctx, inputs, output):
    A, want, _ = inputs
    ctx.names = want.split()
    ctx.save_for_backward(A)


def _backward(ctx, grad_heads, grad_flow):
    """∂L/∂A in A's dtype, from whole-matrix expressions: it is T×T by nature."""
    (A,) = ctx.saved_tensors
    x = A.to(accumulator(A))
    tokens = torch.arange(A.shape[2], device=A.device)
    d = x - x.mT
    # A_ij stands in its own difference and in its mirror's
    slopes = {
        "mass": lambda: 1.0,
        "below": lambda: tokens < tokens[:, None],
        "sum_sq": lambda: 2 * x,
        "difference_sq": lambda: 4 * d,
        "l1": lambda: 2 * d.sign(),
        "max": lambda: 2 * d.sign() * tied_shares(d.abs(), (-2, -1)),
    }
    total = torch.zeros_like(x)
    for grad, name in zip(grad_heads, ctx.names, strict=False):
        total = total + grad.to(x.dtype)[..., None, None] * slopes[name]()
    if "net_flow" in ctx.names:
        flow = grad_flow.to(x.dtype)
        total = total + (flow[..., None] - flow[..., None, :])
    return total.to(A.dtype), None, None


dense_pairs.register_autograd(_backward, setup_context=_setup_context)


def _dense_pairs_torch(A: Tensor, want: list[str]) -> tuple[Tensor, Tensor]:
    B, H, T, _ = A.shape
    names = [name for name in want if name != "net_flow"]
    heads = A.new_zeros(len(names), B, H, dtype=torch.float64)
    flow = A.new_zeros(B, H, -(-T // BLOCK) * BLOCK if "net_flow" in want else 0, dtype=torch.float64)
    d = A.new_empty(BLOCK, BLOCK, dtype=accumulator(A))
    # a pitch that is no power of two: the rows of a column that is read would share a few sets of the cache
    mirror = A.new_empty(BLOCK, BLOCK + 16, dtype=accumulator(A))[:, :BLOCK]
    for head, sums, tokens in zip(A.flatten(0, 1), heads.flatten(1, 2).unbind(1), flow.flatten(0, 1), strict=True):
        for m in range(0, T, BLOCK):
            for n in range(m, T, BLOCK):
                upper = tile(head, m, n)
                lower = upper if m == n else tile(head, n, m)
                _add_masses(sums, upper, None if m == n else lower, names)
                if set(want) & {"difference_sq", "l1", "max", "net_flow"}:
                    torch.sub(upper, mirror.copy_(lower).T, out=d)
                    if "net_flow" in want:
                        tokens[m : m + BLOCK] += d.sum(1)
                        if m != n:
                            tokens[n : n + BLOCK] -= d.sum(0)
                    _add_differences(sums, d, 1 if m == n else 2, names)
    return heads, flow[..., :T].contiguous()


def _add_masses(sums: Tensor, upper: Tensor, lower: Tensor | None, names: list[str]) -> None:
    """Take in what needs no differences; lower is None where a tile is its own mirror."""
    tiles = (upper,) if lower is None else (upper, lower)
    for total, name in zip(sums, names, strict=True):
        if name == "mass":
            for a in tiles:
                total += _total(a.sum(1))
        elif name == "below":
            total += _total((upper.tril(-1) if lower is None else lower).sum(1))
        elif name == "sum_sq":
            for a in tiles:
                total += _squares(a)


def _add_differences(sums: Tensor, d: Tensor, times: int, names: list[str]) -> None:
    """Take in a tile of differences, which is overwritten; times: how often they stand in A."""
    d.abs_()
    for total, name in zip(sums, names, strict=True):
        if name == "difference_sq":
            total += _squares(d) * times
        elif name == "l1":
            total += _total(d.sum(1)) * times
        elif name == "max":
            torch.maximum(total, d.amax(), out=total)


def _total(rows: Tensor) -> Tensor:
    """Row sums added in float64: one float32 sum of a whole tile loses four digits."""
    return rows.sum(dtype=torch.float64)


def _squares(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=1).double().square().sum()

"""One pass over the keys of each row: log-sum-exp, maximum, mass, entropy, Σp², mass below the diagonal, distance."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, FLOOR, LN2, Head, heads
from .backward import DIFFERENTIABLE, input_gradients, save

# pivot is the largest score in base 2: with max it gives A_ij = exp2(x_ij − pivot_i)·max_i in later passes
ROWS = ("lse", "max", "mass", "entropy", "sum_sq", "below", "distance", "pivot")


@torch.library.custom_op("causalattn::row_statistics", mutates_args=())
def row_statistics(
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
    want: str,
    backend: str,
) -> Tensor:
    """The statistics named in want, separated by spaces and in the order of ROWS: [wanted, B, H, T].

    The gradient, which max and pivot do not have, needs both among them.
    """
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    if use_triton(backend, q):
        from ..kernels.statistics.rows import row_statistics_fwd

        return row_statistics_fwd(q, k, *logits, want.split())
    return _row_statistics_torch(q, k, logits, want.split())


@row_statistics.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, want, backend):
    return q.new_empty(len(want.split()), *q.shape[:3], dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    ctx.want = inputs[-2].split()
    pivot, largest = (output[ctx.want.index(name)] for name in ("pivot", "max"))
    save(ctx, inputs, pivot, largest)


def _backward(ctx, grad):
    upstream = {name: x for name, x in zip(ctx.want, grad.unbind(), strict=True) if name in DIFFERENTIABLE}
    return *input_gradients(ctx, **upstream), None, None


row_statistics.register_autograd(_backward, setup_context=_setup_context)


def _row_statistics_torch(q: Tensor, k: Tensor, logits: Logits, want: list[str]) -> Tensor:
    result = q.new_empty(len(want), *q.shape[:3], dtype=accumulator(q))
    for head in heads(q, k, logits):
        for m in head.row_blocks():
            block = _row_block(head, m, want)
            for slot, name in enumerate(want):
                result[slot, head.b, head.h, m : m + BLOCK] = block[name][: head.T - m]
    return result


def _row_block(head: Head, m: int, want: list[str]) -> dict[str, Tensor]:
    """The wanted statistics of one block of rows, each [BLOCK] float64."""
    m_i = head.q.new_full((BLOCK,), FLOOR)
    zeros = torch.zeros(BLOCK, dtype=torch.float64, device=m_i.device)
    sums = {name: zeros for name in ("mass", *want) if name not in ("lse", "max", "pivot")}
    for n in head.key_blocks(m):
        x = head.scores(m, n)
        m_new = torch.maximum(m_i, x.amax(1).mul_(head.unit))
        tile = _tile_sums(head.exponents(x, m_new[:, None]), m + head.logits.offset, n, want)
        grown = (m_new - m_i).double()
        alpha = torch.exp2(-grown)
        if "entropy" in want:
            # its sum is Σ e·(maximum − x), and the maximum has just grown
            sums["entropy"] = sums["entropy"] + grown * sums["mass"]
        if "sum_sq" in want:
            sums["sum_sq"] = sums["sum_sq"] * alpha
        sums = {name: sums[name] * alpha + tile[name] for name in sums}
        m_i = m_new
    return _normalized(head, m_i, sums)


def _normalized(head: Head, m_i: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    lse, unit = head.normalizer(m_i, sums["mass"])
    rows = {name: value * unit for name, value in sums.items()}
    if "entropy" in rows:
        # Σ A (lse − S) = Σ A (lse − maximum) + Σ A (maximum − S); 0 · ∞ is an empty row
        rows["entropy"] = (rows["entropy"] + (lse - m_i).masked_fill(unit == 0, 0) * rows["mass"]) * LN2
    if "sum_sq" in rows:
        rows["sum_sq"] = rows["sum_sq"] * unit
    return rows | {"lse": lse * LN2, "max": unit, "pivot": m_i}


def _tile_sums(x: Tensor, position: int, n: int, want: list[str]) -> dict[str, Tensor]:
    """Row sums of exp2(x) over a tile of scores less the row maximum, whose corner is (position, n)."""
    p = torch.exp2(x)
    tile = {"mass": p.sum(1)}
    if "entropy" in want:
        tile["entropy"] = -torch.linalg.vecdot(p, x)
    if "sum_sq" in want:
        tile["sum_sq"] = torch.linalg.vector_norm(p, dim=1).square()
    if "below" in want:
        tile["below"] = below_diagonal(p, tile["mass"], position, n)
    if "distance" in want:
        tile["distance"] = _distance(p, tile["mass"], position, n)
    return tile


def below_diagonal(p: Tensor, mass: Tensor, position: int, n: int) -> Tensor:
    if n + BLOCK <= position:
        return mass
    if n >= position + BLOCK - 1:
        return torch.zeros_like(mass)
    return p.tril(position - 1 - n).sum(1)


def _distance(p: Tensor, mass: Tensor, position: int, n: int) -> Tensor:
    rows = torch.arange(position, position + BLOCK, device=p.device, dtype=p.dtype)
    keys = torch.arange(n, n + BLOCK, device=p.device, dtype=p.dtype)
    # off the diagonal the distance splits into two non-negative parts, so one product serves and nothing cancels
    if n + BLOCK <= position:
        return (rows - keys[-1]) * mass + p @ (keys[-1] - keys)
    if n >= position + BLOCK:
        return (keys[0] - rows) * mass + p @ (keys - keys[0])
    return torch.linalg.vecdot(p, (rows[:, None] - keys).abs_())

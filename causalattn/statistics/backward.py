"""Gradients of the statistics: from those of what a pass returned to those of q, k, bias and sink.

dS_ij = A_ij (G_ij − r_i + g_lse_i),  r_i = Σ_j A_ij G_ij,  G = ∂L/∂A at fixed lse
dq = scale·dS k,  dk = scale·dSᵀ q,  dbias = dS,  dsink = Σ_i p_sink,i (g_lse_i − r_i)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._seen import zero_where_zero_
from .._tiles import BLOCK, LN2, Head, ScoreGradients, heads, padded, row_factors, sink_gradient

# of a row, in the order of `Upstream`
DIFFERENTIABLE = ("lse", "mass", "entropy", "sum_sq", "below", "distance")


class Upstream(NamedTuple):
    """Gradients of statistics; None where a statistic has none."""

    lse: Tensor | None = None  # [B, H, T], as the five after it
    mass: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None
    below: Tensor | None = None
    distance: Tensor | None = None
    received: Tensor | None = None  # [B, H, S]
    picked: Tensor | None = None  # [B, H, T, n], of A at chosen
    chosen: Tensor | None = None  # [B or 1, T, n] int32, no gradient itself
    pairs: Tensor | None = None  # [2, B, H], of Σ(A_ij − A_ji)² and Σ|A_ij − A_ji|
    cells: Tensor | None = None  # [B, H, R, C], of the sums of A over cells
    row_cells: Tensor | None = None  # [T] int64, C times the cell of each row
    key_cells: Tensor | None = None  # [S] int64, the cell of each key


@torch.library.custom_op("causalattn::statistics_backward", mutates_args=())
def statistics_backward(
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
    lse: Tensor | None,
    mass: Tensor | None,
    entropy: Tensor | None,
    sum_sq: Tensor | None,
    below: Tensor | None,
    distance: Tensor | None,
    received: Tensor | None,
    picked: Tensor | None,
    chosen: Tensor | None,
    pairs: Tensor | None,
    cells: Tensor | None,
    row_cells: Tensor | None,
    key_cells: Tensor | None,
    bias_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k, of bias if asked for, of sink if there is one (else empty), from those of `Upstream`."""
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    rows = (lse, mass, entropy, sum_sq, below, distance)
    up = Upstream(*rows, received, picked, chosen, pairs, cells, row_cells, key_cells)
    triton = use_triton(backend, q)
    if triton:
        from ..kernels.statistics.backward import statistics_bwd

        dq, dk, dbias, delta = statistics_bwd(q, k, *logits[:-1], pivot, largest, up, bias_gradient)
    else:
        dq, dk, dbias, delta = _statistics_backward_torch(q, k, logits, pivot, largest, up, bias_gradient)
    dsink = q.new_empty(0) if sink is None else sink_gradient(sink, pivot, largest, delta, not triton)
    return dq, dk, q.new_empty(0) if dbias is None else dbias.to(bias.dtype), dsink


@statistics_backward.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, *rest):
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if rest[-2] else q.new_empty(0)
    dsink = q.new_empty(0) if sink is None else torch.empty_like(sink, memory_format=torch.contiguous_format)
    return q.new_empty(q.shape), q.new_empty(k.shape), dbias, dsink


def save(ctx, inputs: tuple, pivot: Tensor, largest: Tensor, chosen: Tensor | None = None) -> None:
    """What the gradient of a pass needs of its inputs: first q, k and `Logits`, last the backend."""
    q, k, start, stop, offset, bias, slopes, scale, softcap, sink = inputs[:10]
    ctx.save_for_backward(q, k, start, stop, bias, slopes, sink, pivot, largest, chosen)
    ctx.options = offset, scale, softcap, inputs[-1]


def input_gradients(ctx, **upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the ten arguments that every pass begins with."""
    q, k, start, stop, bias, slopes, sink, pivot, largest, chosen = ctx.saved_tensors
    offset, scale, softcap, backend = ctx.options
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    up = Upstream(chosen=chosen, **{name: x.contiguous() for name, x in upstream.items()})
    dq, dk, dbias, dsink = statistics_backward(q, k, *logits, pivot, largest, *up, ctx.needs_input_grad[5], backend)
    wanted = ctx.needs_input_grad
    return (
        *(dq if wanted[0] else None, dk if wanted[1] else None, None, None, None),
        *(dbias if wanted[5] else None, None, None, None, dsink if wanted[9] else None),
    )


def _statistics_backward_torch(
    q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, largest: Tensor, up: Upstream, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k and bias, and r − g_lse of every row."""
    sums = ScoreGradients(q, k, logits, bias_gradient)
    delta = q.new_empty(q.shape[:3], dtype=accumulator(q))
    for head in heads(q, k, logits):
        tiles = _Tiles(head, up, *row_factors(head, pivot, largest))
        for m in head.row_blocks():
            total = torch.zeros(BLOCK, 1, dtype=torch.float64, device=q.device)
            for n in head.key_blocks(m):
                p, grad = tiles.probs_and_gradient(m, n)
                total += zero_where_zero_(grad.mul_(p), p).sum(1, keepdim=True)
            if up.lse is not None:
                total -= tiles.columns["lse"][m : m + BLOCK]
            shift = total.to(head.dtype)
            for n in head.key_blocks(m):
                p, grad = tiles.probs_and_gradient(m, n)
                sums.add(head, m, n, zero_where_zero_(grad.sub_(shift).mul_(p), p))
            delta[head.b, head.h, m : m + BLOCK] = shift[: head.T - m, 0]
    return sums.q.to(q.dtype), sums.k.to(k.dtype), sums.bias, delta


class _Tiles:
    """Tiles of A and of G = ∂L/∂A of one head, whose gradients are padded to whole tiles."""

    def __init__(self, head: Head, up: Upstream, pivot: Tensor, largest: Tensor):
        self.head, self.pivot, self.largest = head, pivot, largest
        b, h = head.b, head.h
        rows = {name: getattr(up, name) for name in DIFFERENTIABLE}
        self.columns = {name: _column(x[b, h], head) for name, x in rows.items() if x is not None}
        # what every key of a row has in common
        self.level = self.columns.get("mass", torch.zeros_like(pivot))
        if "entropy" in self.columns:
            # lse − S − 1, and −log of the largest A_ij is lse − the largest S_ij; of an empty row any number does
            depth = -largest.masked_fill(largest == 0, 1).log()
            self.level = self.level + self.columns["entropy"] * (depth - 1)
        self.received = None if up.received is None else _column(up.received[b, h], head).T
        self.grad = head.q.new_empty(BLOCK, BLOCK)
        self.chosen = None
        if up.picked is not None:
            chosen = up.chosen[b if up.chosen.shape[0] > 1 else 0]
            self.chosen, self.picked = padded(chosen, BLOCK).long(), padded(up.picked[b, h].to(head.dtype), BLOCK)
        self.pairs = None if up.pairs is None else up.pairs[:, b, h].to(head.dtype)
        self.cells = None
        if up.cells is not None:
            self.cells = up.cells[b, h].to(head.dtype)
            rows, keys = up.row_cells[:, None] // max(1, self.cells.shape[1]), up.key_cells[:, None]
            self.row_cells, self.key_cells = (padded(x, BLOCK)[:, 0] for x in (rows, keys))

    def probs_and_gradient(self, m: int, n: int) -> tuple[Tensor, Tensor]:
        """A and G of rows m… and keys n…, in buffers that the next tile overwrites; where A is 0, G may be anything."""
        head, rows, keys = self.head, slice(m, m + BLOCK), slice(n, n + BLOCK)
        column = {name: x[rows] for name, x in self.columns.items()}
        x = head.exponents(head.scores(m, n), self.pivot[rows])
        grad = self.grad.copy_(self.level[rows])
        if "entropy" in column:
            grad.addcmul_(column["entropy"], x, value=-LN2)
        p = x.exp2_().mul_(self.largest[rows])
        if "sum_sq" in column:
            grad.addcmul_(column["sum_sq"], p, value=2)
        position = m + head.logits.offset
        if "below" in column:
            grad += column["below"].expand(-1, BLOCK).tril(position - 1 - n)
        if "distance" in column:
            at = torch.arange(position, position + BLOCK, device=p.device)
            grad.addcmul_(column["distance"], (at[:, None] - head.keys[keys]).to(p.dtype).abs_())
        if self.received is not None:
            grad += self.received[:, keys]
        if self.cells is not None:
            grad += self.cells[self.row_cells[rows]][:, self.key_cells[keys]]
        if self.chosen is not None:
            _add_chosen(grad, self.chosen[rows] - n, self.picked[rows])
        if self.pairs is not None:
            difference = p - self._mirror(m, n) if head.reached(n, m) else p.clone()
            if m == n:
                # one number, however two products round it
                difference.fill_diagonal_(0)
            grad.addcmul_(self.pairs[0], difference, value=4).addcmul_(self.pairs[1], difference.sign(), value=2)
        return p, grad

    def _mirror(self, m: int, n: int) -> Tensor:
        x = self.head.scores(n, m, transposed=True)
        keys = slice(n, n + BLOCK)
        return self.head.exponents(x, self.pivot[keys].T).exp2_().mul_(self.largest[keys].T)


def _column(x: Tensor, head: Head) -> Tensor:
    return padded(x[:, None].to(head.dtype), BLOCK)


def _add_chosen(grad: Tensor, index: Tensor, picked: Tensor) -> None:
    """Add each row's gradients of its chosen keys, which lie at index of the tile or outside it."""
    inside = (index >= 0) & (index < BLOCK)
    index, picked = index.masked_fill(~inside, 0), picked.masked_fill(~inside, 0)
    # one after another: two of one key in one scatter would be summed in any order on a GPU
    for c in range(index.shape[1]):
        grad.scatter_add_(1, index[:, c : c + 1], picked[:, c : c + 1])

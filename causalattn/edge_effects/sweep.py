"""One pass over the edges, each row's maximum known: their effects, reduced to rows, columns, the largest and cells."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .._checks import Logits
from .._tiles import BLOCK, FLOOR, FORBIDDEN, LN2, Head, heads, padded
from ..attention.map import cell_edges, tile_cells
from ..attention.topk import KEYS_AT_ONCE, largest_of
from .edit import Edit, divergence, edit_of, moved_share, scaled

# below this share of ‖v‖² + ‖o‖² their difference is formed, above it ‖v‖² − 2·o·v + ‖o‖² loses no more than 4 ×
CLOSE = 1 / 16
PAIRS_AT_ONCE = 4096


class Rows(NamedTuple):
    """What the passes before know of rows: [B, H, T] each, left [B, H, T, V]."""

    pivot: Tensor
    largest: Tensor
    ceiling: Tensor
    dominant: Tensor
    left: Tensor | None  # o, or the readout, or None where only probabilities count
    level: Tensor | None  # readout·o


@torch.library.custom_op("causalattn::edge_effects", mutates_args=())
def sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
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
    ceiling: Tensor,
    dominant: Tensor,
    left: Tensor | None,
    level: Tensor | None,
    strength: float,
    want: str,
    n: int,
    cells: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row, column, values, indices and map, each empty unless want, names separated by spaces, has it."""
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    rows = Rows(pivot, largest, ceiling, dominant, left, level)
    run = _sweep_triton if use_triton(backend, q) else _sweep_torch
    results = run(q, k, v, logits, rows, strength, want.split(), n, cells)
    if "map" in want:
        sizes = (cell_edges(count, cells, q.device).diff() for count in (q.shape[2], k.shape[2]))
        row_sizes, key_sizes = (size.double() for size in sizes)
        results = (*results[:-1], results[-1].div_(row_sizes[:, None] * key_sizes).to(accumulator(q)))
    return results


@sweep.register_fake
def _(
    q, k, v, start, stop, offset, bias, slopes, scale, softcap, sink, pivot, largest, ceiling, dominant, left, level,
    strength, want, n, cells, backend,
):  # fmt: skip
    map_dtype = accumulator(q) if "map" in want else torch.float64
    return _empty_results(q, k, want.split(), n, cells, map_dtype)


def _empty_results(
    q: Tensor, k: Tensor, want: list[str], n: int, cells: int, map_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    B, H, T, _ = q.shape
    S, dtype = k.shape[2], accumulator(q)
    largest = (B, H, T, n) if "topk" in want else 0
    R, C = torch.sym_min(cells, T), torch.sym_min(cells, S)
    return (
        q.new_empty((B, H, T) if "row" in want else 0, dtype=dtype),
        q.new_empty((B, H, S) if "column" in want else 0, dtype=dtype),
        q.new_empty(largest, dtype=dtype),
        q.new_empty(largest, dtype=torch.int32),
        q.new_empty((B, H, R, C) if "map" in want else 0, dtype=map_dtype),
    )


def _sweep_triton(
    q: Tensor, k: Tensor, v: Tensor | None, logits: Logits, rows: Rows, strength: float, want: list[str], n: int,
    cells: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..kernels.edge_effects.columns import edge_columns_fwd
    from ..kernels.edge_effects.map import edge_map_fwd
    from ..kernels.edge_effects.rows import edge_rows_fwd

    row, column, values, indices, total = _empty_results(q, k, want, n, cells, torch.float64)
    signed = rows.level is not None
    terms = torch.stack((*rows[:4], rows.level if signed else rows.pivot))
    edit = (None,) * 5 if strength == math.inf else edit_of(strength)
    given = (q, k, v, *logits[:-1], rows.left, terms, (edit[0], edit[1] or None, *edit[2:]), signed)
    if "row" in want or "topk" in want:
        sums, values, indices = edge_rows_fwd(*given, n if "topk" in want else 0)
        row = sums if "row" in want else row
    if "column" in want:
        column = edge_columns_fwd(*given)
    if "map" in want:
        total = edge_map_fwd(*given, cells)
    return row, column, values, indices, total


def _sweep_torch(
    q: Tensor, k: Tensor, v: Tensor | None, logits: Logits, rows: Rows, strength: float, want: list[str], n: int,
    cells: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    row, column, values, indices, total = _empty_results(q, k, want, n, cells, torch.float64)
    total.zero_()
    row_cells, key_cells = (tile_cells(count, cells, q.device) for count in (q.shape[2], k.shape[2]))
    for head in heads(q, k, logits):
        b, h = head.b, head.h
        values_of = None if v is None else v[b, h // (q.shape[1] // k.shape[1])]
        edges = _Edges(head, values_of, rows, strength)
        received = torch.zeros(head.k.shape[0], dtype=torch.float64, device=q.device)
        for m in head.row_blocks():
            here = slice(m, min(m + BLOCK, head.T))
            sent = torch.zeros(BLOCK, dtype=torch.float64, device=q.device)
            tiles = len(head.key_blocks(m))
            held = _Held(here.stop - m, n, tiles, head.q, edges.signed) if "topk" in want else None
            for at in head.key_blocks(m):
                effect, size, allowed = edges.tile(m, at)
                sent += size.sum(1)
                received[at : at + BLOCK] += size.sum(0)
                if held is not None:
                    held.take(effect, size, allowed, at)
                if "map" in want:
                    _add_to_cells(total[b, h], size, row_cells[m // BLOCK], key_cells[at // BLOCK])
            if "row" in want:
                row[b, h, here] = sent[: here.stop - m]
            if held is not None:
                values[b, h, here], indices[b, h, here] = held.result()
        if "column" in want:
            column[b, h] = received[: head.S]
    return row, column, values, indices, total


class _Edges:
    """Effects of one head's edges, a tile at a time in buffers that the next tile overwrites."""

    def __init__(self, head: Head, v: Tensor | None, rows: Rows, strength: float):
        def own(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x[head.b, head.h].to(head.dtype)
            return padded(x if x.ndim == 2 else x[:, None], BLOCK)

        self.head, self.signed = head, rows.level is not None
        self.edit: Edit | None = None if strength == math.inf else edit_of(strength)
        self.rows = Rows(*map(own, rows))
        self.ceiling = self.rows.ceiling / head.unit
        self.v = None if v is None else padded(v.to(head.dtype), BLOCK)
        self.size, self.work = head.q.new_empty(2, BLOCK, BLOCK)
        if v is not None and not self.signed:
            self.left_sq, self.v_sq = (torch.linalg.vecdot(x, x)[:, None] for x in (self.rows.left, self.v))

    def tile(self, m: int, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Effects of rows m… on keys n…, [BLOCK, BLOCK], their sizes, and where they are allowed, None everywhere."""
        head, block = self.head, slice(m, m + BLOCK)
        x = head.scores(m, n)
        if head.logits.bias is None:
            seen = head.seen(m, n)
            allowed = None if seen is None else seen.dense()
        else:
            # which forbids by −∞
            allowed = x > FLOOR
        ceiling = self.ceiling[block]
        # on a GPU, where values are unknown, any row may have a dominant edge
        dominant = x > ceiling if ceiling.is_cuda or ceiling.isfinite().any() else None
        effect = self._effects(head.exponents(x, self.rows.pivot[block]), allowed, dominant, m, n)
        if dominant is not None:
            torch.where(dominant, self.rows.dominant[block], effect, out=effect)
        if allowed is not None:
            effect.masked_fill_(~allowed, 0)
        # rows that fill up a tile
        effect[head.T - m :] = 0
        return effect, torch.abs(effect, out=self.size) if self.signed else effect, allowed

    def _effects(self, t: Tensor, allowed: Tensor | None, dominant: Tensor | None, m: int, n: int) -> Tensor:
        """From t = log2 p − log2 of the row's largest p."""
        block, largest = slice(m, m + BLOCK), self.rows.largest[m : m + BLOCK]
        if self.v is None:
            return self._divergence(t, largest)
        if self.signed:
            # readout·v − readout·o
            pull = torch.addmm(-self.rows.level[block], self.rows.left[block], self.v[n : n + BLOCK].T, out=self.work)
        else:
            pull = self._distances(allowed, dominant, m, n)
        if self.edit is None:
            return pull
        share = moved_share(scaled(t, self.edit).mul_(largest), self.edit)
        return share.mul_(pull) if self.signed else share.abs_().mul_(pull)

    def _divergence(self, t: Tensor, largest: Tensor) -> Tensor:
        log2_p = t + torch.log2(largest)
        if self.edit is None:
            return log2_p.mul_(-LN2)
        y = scaled(t, self.edit).mul_(largest)
        # w ≤ 1 needs no logarithm of p
        return divergence(y, log2_p if self.edit.shift or self.edit.gain > 1 else None, self.edit)

    def _distances(self, allowed: Tensor | None, dominant: Tensor | None, m: int, n: int) -> Tensor:
        """‖v_j − o_i‖ of a tile, ∞ of its dominant edges, whose v_j is close to o_i but of which no use is made."""
        left, v = self.rows.left[m : m + BLOCK], self.v[n : n + BLOCK]
        left_sq, v_sq = self.left_sq[m : m + BLOCK], self.v_sq[n : n + BLOCK].T
        square = torch.addmm(v_sq, left, v.T, alpha=-2, out=self.work).add_(left_sq)
        if dominant is not None:
            square.masked_fill_(dominant, torch.inf)
        if left.is_cuda or not square.amin() > CLOSE * (left_sq.amax() + v_sq.amax()):
            close = square <= CLOSE * (left_sq + v_sq)
            _form_differences(square, left, v, close if allowed is None else close & allowed)
        return square.clamp_(min=0).sqrt_()


def _form_differences(square: Tensor, left: Tensor, v: Tensor, chosen: Tensor) -> None:
    """‖v_j − o_i‖² where chosen, in place, a fixed number of pairs at a time."""
    if square.is_cuda:
        for row in range(len(left)):
            exact = (v - left[row]).square_().sum(1)
            square[row] = torch.where(chosen[row], exact, square[row])
        return
    for pairs in chosen.nonzero().split(PAIRS_AT_ONCE):
        i, j = padded(pairs, PAIRS_AT_ONCE).T
        exact = (v[j] - left[i]).square_().sum(1)[: len(pairs)]
        square[i[: len(pairs)], j[: len(pairs)]] = exact


class _Held:
    """The n largest sizes of each row of a block so far, the effects they are of, and their keys."""

    def __init__(self, count: int, n: int, tiles: int, like: Tensor, signed: bool):
        self.best = like.new_full((count, n), FORBIDDEN)
        self.effects = torch.zeros_like(self.best) if signed else None
        self.index = torch.full((count, n), -1, device=like.device)
        self.width = min(KEYS_AT_ONCE, tiles * BLOCK)
        # sizes, and of signed effects themselves
        self.space = like.new_empty(1 + signed, count, self.width)
        self.first = self.used = 0

    def take(self, effect: Tensor, size: Tensor, allowed: Tensor | None, first: int) -> None:
        count, here = len(self.best), slice(self.used, self.used + BLOCK)
        if self.used == 0:
            self.first = first
        self.space[0, :, here] = size[:count]
        if allowed is not None:
            self.space[0, :, here].masked_fill_(~allowed[:count], FORBIDDEN)
        if self.effects is not None:
            self.space[1, :, here] = effect[:count]
        self.used += BLOCK
        if self.used == self.width:
            self._merge()

    def result(self) -> tuple[Tensor, Tensor]:
        """effects and keys, 0 and −1 where a row has no more."""
        if self.used:
            self._merge()
        free = self.best <= FLOOR
        effects = self.best if self.effects is None else self.effects
        return effects.masked_fill(free, 0), self.index.masked_fill(free, -1).int()

    def _merge(self) -> None:
        n, space = self.best.shape[1], self.space[:, :, : self.used]
        # what is held comes first: its keys are the smaller ones
        self.best, places = largest_of(torch.cat([self.best, space[0]], 1), n)
        held = self.index.gather(1, places.clamp(max=n - 1))
        self.index = torch.where(places < n, held, places + (self.first - n))
        if self.effects is not None:
            self.effects = torch.cat([self.effects, space[1]], 1).gather(1, places)
        self.used = 0


def _add_to_cells(
    total: Tensor, size: Tensor, rows: tuple[slice, Tensor, Tensor], keys: tuple[slice, Tensor, Tensor]
) -> None:
    (some_rows, row_members, row_weights), (some_keys, key_members, key_weights) = rows, keys
    # no product with the weights: 0 · ∞, of the divergence of an emptied row, is not 0
    part = size.index_select(1, key_members.flatten()).view(BLOCK, *key_members.shape)
    part = part.masked_fill_(key_weights == 0, 0).sum(2).index_select(0, row_members.flatten())
    part = part.view(*row_members.shape, -1).masked_fill_(row_weights[..., None] == 0, 0)
    total[some_rows, some_keys] += part.sum(1, dtype=torch.float64)

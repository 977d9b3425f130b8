"""A plan resolved for one call: what each query row loses and gains, once for all heads that share it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import Logits
from .address import parse_span
from .arguments import ROUNDING
from .plan import Item, Plan, check_plan
from .runs import Runs, Softs, covered, merged, summed
from .scores import forbidden
from .shares import Shares

# a token number from here on is none, also of a model that goes on generating
MOST = 2**31


class Frame(NamedTuple):
    """How a sequence's tokens count: token n is key position origin + n; negatives count from rows or from keys."""

    origin: int
    rows: int
    keys: int


class Call(NamedTuple):
    """The shape of one call and who may attend whom in it; start and stop are [B or 1, T], bias has 4 axes.

    strict: every row and column named must lie in this call, where a model's may lie in another step of it.
    """

    B: int
    H: int
    T: int
    S: int
    offset: int
    start: Tensor
    stop: Tensor
    bias: Tensor | None
    strict: bool

    def of_pairs(self, bound: Tensor, pairs: Tensor, rows: Tensor) -> Tensor:
        """start or stop of these rows for pairs of sequence and head: [P, R]."""
        pairs, rows = pairs.to(bound.device), rows.to(bound.device)
        sequences = pairs[:, 0] if bound.shape[0] > 1 else torch.zeros_like(pairs[:, 0])
        return bound[sequences[:, None], rows].long()

    def shut(self, pairs: Tensor, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """How many of the keys low ≤ j < high of these rows the bias forbids to pairs of sequence and head: [P, R]."""
        each, at = (x.to(low.device) for x in rows.unique(return_inverse=True))
        pairs = pairs.to(low.device)
        shut = forbidden(self.bias if self.bias.shape[2] == 1 else self.bias[:, :, each])
        counted = shut.expand(*shut.shape[:3], self.S).cumsum(-1, dtype=torch.int32)
        counted = torch.nn.functional.pad(counted, (1, 0))
        b, h, at = (x % n for x, n in zip((pairs[:, :1], pairs[:, 1:], at), counted.shape[:3], strict=True))
        return counted[b, h, at, torch.maximum(low, high)] - counted[b, h, at, low]


class Surgery(NamedTuple):
    """What is done to the same rows of several heads; pairs [P, 2] are their sequences and heads.

    cuts are merged and sorted by row, softs unique and sorted, on no cut key; hard holds one key a row. Keys that have
    shares are softs too, of strength −∞: the rest of the row is what is left without them.
    key_edits and value_edits: the vector added to each key position's k or v. patches: rows and where they come from.
    """

    pairs: Tensor
    cuts: Runs
    softs: Softs
    hard: Softs
    shares: Shares
    key_edits: dict[int, Tensor]
    value_edits: dict[int, Tensor]
    patches: list[tuple[Tensor, Tensor]]
    off: str | None
    real: Tensor


def surgeries_of(do: Plan, q: Tensor, k: Tensor, logits: Logits) -> list[Surgery]:
    """The surgeries of a plan whose rows and columns count the positions of q and k.

    Raises:
        TypeError: do is no Plan.
        ValueError: a text in it, or as in `resolve`.
    """
    check_plan(do)
    B, H, T, _ = q.shape
    if any(item.layers is not None for item in do.items):
        raise ValueError(f"a do on tensors has no layers, got {do}")
    call = Call(B, H, T, k.shape[2], logits.offset, logits.start, logits.stop, logits.bias, True)
    return resolve(do, call, [Frame(0, logits.offset + T, k.shape[2])] * B)[0]


def check_edits(surgeries: list[Surgery], D: int, V: int | None) -> None:
    """Vectors added to k have D numbers and those added to v have V; without v, V is None."""
    for name, count in (("key_edits", D), ("value_edits", V)):
        for delta in (x for surgery in surgeries for x in getattr(surgery, name).values() if count is not None):
            if len(delta) != count:
                raise ValueError(f"the delta of a {name[:-1]} must hold {count} numbers, got {len(delta)}")


def touched_rows(surgeries: list[Surgery], device: torch.device) -> Tensor:
    """The query rows whose probabilities some surgery changes, sorted."""
    rows = [x for s in surgeries for x in (s.cuts.row, s.softs.row, s.hard.row)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows]).unique().to(device)


def resolve(plan: Plan, call: Call, frames: Sequence[Frame], layer: int | None = None) -> tuple[list[Surgery], list]:
    """The surgeries of a plan, and how many edges (or heads) each item matched: numbers, or tensors on a GPU.

    Raises:
        ValueError: a sequence, head, row or column out of range; an edge the mask forbids; two hards on a row, or one
            onto a cut key.
    """
    sets: dict[tuple, list[tuple[int, int]]] = {}
    for item in plan.items:
        _check_scope(item, call)
    for b in range(call.B):
        for h in range(call.H):
            chosen = tuple(n for n, item in enumerate(plan.items) if _takes(item, b, h))
            if chosen:
                sets.setdefault((chosen, frames[b]), []).append((b, h))
    surgeries: list[Surgery] = []
    found: list[list[Tensor]] = [[] for _ in plan.items]
    for (chosen, frame), some in sets.items():
        pairs = torch.tensor(some)
        parts = [(plan.items[n], _entries(plan.items[n], call, frame, layer)) for n in chosen]
        for n, (item, part) in zip(chosen, parts, strict=True):
            found[n].append(_allowed(item, part, pairs, call))
        surgeries.append(_surgery(parts, pairs, call, frame, layer))
    if call.strict and not call.start.is_cuda:
        for item, allowed in zip(plan.items, found, strict=True):
            _check_allowed(item, allowed, call)
    sums = [sum(allowed.sum() for allowed in parts) for parts in found]
    return surgeries, [x if isinstance(x, Tensor) and x.is_cuda else int(x) for x in sums]


def _takes(item: Item, b: int, h: int) -> bool:
    return (item.batch is None or b in item.batch) and (item.heads is None or h in item.heads)


def _check_scope(item: Item, call: Call) -> None:
    for name, count in (("heads", call.H), ("batch", call.B)):
        chosen = getattr(item, name)
        if chosen is not None and not all(0 <= i < count for i in chosen):
            raise ValueError(f"{name} of {item} must be from 0 to {count - 1}, got {list(chosen)}")


def _entries(item: Item, call: Call, frame: Frame, layer: int | None) -> Runs:
    """The rows an item touches and the keys it touches there, before the mask has its say."""
    if item.edges is not None:
        # one by one, for a number named twice is one number but an edge is both of its numbers
        sides = zip(*item.edges, strict=True), (("row", frame.rows), ("col", frame.keys))
        named = [[_numbers(name, (i,), count, item)[0] for i in x] for x, (name, count) in zip(*sides, strict=True)]
        rows, cols = zip(*dict.fromkeys(zip(*named, strict=True)), strict=True)
        row, low = (torch.tensor(x, dtype=torch.int64) + frame.origin for x in (rows, cols))
        place = torch.stack([torch.zeros_like(row), torch.arange(len(row))], 1)
        entries = _within(Runs(row - call.offset, low, low + 1, place), item, call, frame)
        if item.do == "patch_edges" and len(row) < len(item.edges):
            raise ValueError(f"{item} names an edge twice")
        return _sourced(entries, (1, len(row)), item, call, layer)
    row = _positions("row", item.row, frame.rows, call.T + call.offset - frame.origin, item, call.strict)
    row = torch.arange(call.T) if row is None else row + (frame.origin - call.offset)
    if item.do == "causal":
        return Runs(row, (row + call.offset + 1).clamp(0, call.S), torch.full_like(row, call.S))
    key = _positions("col", item.col, frame.keys, call.S - frame.origin, item, call.strict)
    if key is None:
        return _within(Runs(row, torch.zeros_like(row), torch.full_like(row, call.S)), item, call, frame)
    key, order = key.sort()
    key = key + frame.origin
    if item.do == "cut":
        # neighbours as one run
        first = torch.cat([torch.ones_like(key[:1], dtype=torch.bool), key.diff() > 1]).nonzero()[:, 0]
        low = key[first]
        high = torch.cat([key[first[1:] - 1], key[-1:]]) + 1
    else:
        low, high = key, key + 1
    # rows of which all are meant count as tokens do
    number = row + (call.offset - frame.origin) if item.row is None and not call.strict else torch.arange(len(row))
    place = torch.stack([number.repeat_interleave(len(order)), order.repeat(len(row))], 1)
    row, low, high = row.repeat_interleave(len(low)), low.repeat(len(row)), high.repeat(len(row))
    if item.do != "patch_edges":
        return _within(Runs(row, low, high), item, call, frame)
    entries = _within(Runs(row, low, high, place), item, call, frame)
    return _sourced(entries, (len(number), len(order)), item, call, layer)


def _positions(name: str, where, count: int, present: int, item: Item, strict: bool) -> Tensor | None:
    """Token numbers, or None for all; an open end of a span reaches what is present."""
    if where is None:
        return None
    if isinstance(where, str):
        span = parse_span(where)
        start, stop = (
            end if x is None else _numbers(name, (x,), count, item, end=True)[0]
            for x, end in ((span.start, 0), (span.stop, present))
        )
        if stop <= start and (strict or span.stop is not None):
            raise ValueError(f"{name} of {item} must hold at least one token, got {where} of {count}")
        if strict and stop > count:
            raise ValueError(f"{name} of {item} must be from 0 to {count - 1}, got {stop - 1}")
        return torch.arange(start, max(start, min(stop, present)))
    return torch.tensor(_numbers(name, where, count, item), dtype=torch.int64)


def _numbers(name: str, numbers: tuple[int, ...], count: int, item: Item, end: bool = False) -> list[int]:
    counted = [i + count if i < 0 else i for i in numbers]
    if wrong := [i for i, n in zip(numbers, counted, strict=True) if not 0 <= n < MOST]:
        raise ValueError(f"{name} of {item} must be from {-count} to {count - 1 + end}, got {wrong[0]}")
    return list(dict.fromkeys(counted))


def _within(entries: Runs, item: Item, call: Call, frame: Frame) -> Runs:
    row, low, high, place = entries
    if call.strict:
        sides = (("row", row, call.T, call.offset - frame.origin), ("col", low, call.S, -frame.origin))
        for name, x, count, shift in sides:
            if len(x) and not 0 <= int(x.min()) <= int(x.max()) < count:
                wrong = int(x.min()) if x.min() < 0 else int(x.max())
                raise ValueError(f"{name} of {item} must be from {shift} to {count - 1 + shift}, got {wrong + shift}")
    here = (row >= 0) & (row < call.T) & (high > 0) & (low < call.S)
    return Runs(row[here], low[here].clamp(min=0), high[here].clamp(max=call.S), None if place is None else place[here])


def _allowed(item: Item, entries: Runs, pairs: Tensor, call: Call) -> Tensor:
    """How many keys of each entry mask and bias allow each pair, [P, entries]; of what is no edge, one a pair."""
    if item.do in ("head_off", "patch"):
        return torch.ones(len(pairs), min(1, len(entries.row)), dtype=torch.int64)
    start, stop = (call.of_pairs(bound, pairs, entries.row) for bound in (call.start, call.stop))
    low, high = (x.to(start.device) for x in entries[1:3])
    low, high = torch.maximum(low, start), torch.minimum(high, stop)
    count = (high - low).clamp_(min=0)
    return count if call.bias is None or not count.numel() else count - call.shut(pairs, entries.row, low, high)


def _check_allowed(item: Item, allowed: list[Tensor], call: Call) -> None:
    """An item must have an edge somewhere; those named one by one, and every row of a hard do, some sequence's each."""
    if not allowed:
        return
    each = torch.cat(allowed).amax(0)
    if not each.any():
        raise ValueError(f"{item} matched no edge: the mask forbids it")
    if (item.edges is not None or item.do == "hard") and not each.all():
        raise ValueError(f"{item}: the mask forbids {int((each == 0).sum())} of its {len(each)} edges")


def _surgery(parts: list[tuple[Item, Runs]], pairs: Tensor, call: Call, frame: Frame, layer: int | None) -> Surgery:
    def of(*kinds: str) -> list[tuple[Item, Runs]]:
        return [(item, entries) for item, entries in parts if item.do in kinds]

    cuts = merged([entries for _, entries in of("cut", "causal")], call.S)
    shares = _shares(of("patch_edges"), pairs, call, frame, layer)
    removed = [(e, -math.inf) for _, e in of("patch_edges")]
    softs = summed([(e, item.strength or 0.0) for item, e in of("soft", "key_edit")] + removed, call.S)
    # what is cut has no score left to raise
    softs = Softs(*(x[~covered(cuts, softs, call.S)] for x in softs))
    hard = summed([(e, 0.0) for _, e in of("hard")], call.S)
    if (hard.row.diff() == 0).any():
        row = int(hard.row[1:][hard.row.diff() == 0][0]) + call.offset - frame.origin
        raise ValueError(f"a row takes one hard do, got two on row {row}")
    for what, x in (("hard do", hard), ("patch", shares)):
        if (onto := covered(cuts, x, call.S)).any():
            row, key = (int(x[onto][0]) for x in x[:2])
            raise ValueError(
                f"row {row + call.offset - frame.origin} has a {what} onto key {key - frame.origin}, which is cut"
            )
    edits = {kind: _edits([(e, item.delta) for item, e in of(kind)]) for kind in ("key_edit", "value_edit")}
    patches = [(e.row.unique(), _source(item, layer)) for item, e in of("patch") if len(e.row)]
    off = [item.value for item, _ in of("head_off")]
    if len(set(off)) > 1:
        raise ValueError("a head is switched off to zero or to its mean, got both")
    every = torch.arange(call.T)
    real = call.of_pairs(call.stop, pairs, every) > call.of_pairs(call.start, pairs, every)
    edited = (edits["key_edit"], edits["value_edit"])
    return Surgery(pairs, cuts, softs, hard, shares, *edited, patches, off[0] if off else None, real)


def _edits(parts: list[tuple[Runs, Tensor]]) -> dict[int, Tensor]:
    edits: dict[int, Tensor] = {}
    for entries, delta in parts:
        for key in entries.low.unique().tolist():
            edits[key] = edits[key] + delta if key in edits else delta
    return edits


def _shares(parts: list[tuple[Item, Runs]], pairs: Tensor, call: Call, frame: Frame, layer: int | None) -> Shares:
    """What the items' sources say of each pair's edges."""
    device = call.start.device
    row, key = (torch.cat([torch.empty(0, dtype=torch.int64), *(e[n] for _, e in parts)]) for n in (0, 1))
    values = [torch.empty(len(pairs), 0, device=device)]
    for item, entries in parts:
        source = _on_edges(item, layer)
        b, h, i, j = (x % n for x, n in zip((*pairs.T, *entries.place.T), source.shape, strict=True))
        values.append(source[b[:, None], h[:, None], i, j].to(device))
    value = torch.cat(values, 1)
    if not value.is_cuda:
        open_ = torch.cat([torch.empty(len(pairs), 0), *(_allowed(item, e, pairs, call) for item, e in parts)], 1) > 0
        sums = torch.zeros(len(pairs), call.T, dtype=torch.float64)
        sums.index_add_(1, row, torch.where(open_, value.detach(), 0).double())
        if (sums > 1 + ROUNDING).any():
            most, where = sums.amax(0).max(0)
            at = int(where) + call.offset - frame.origin
            raise ValueError(f"patched probabilities must sum to at most 1 in a row, got {float(most):.4g} on row {at}")
    place, order = (row * (call.S + 2) + key).sort()
    if (place.diff() == 0).any():
        first = order[1:][place.diff() == 0][0]
        edge = int(row[first]) + call.offset - frame.origin, int(key[first]) - frame.origin
        raise ValueError(f"an edge takes one patch, got two on {edge}")
    return Shares(row[order], key[order], value[:, order.to(device)])


def _sourced(entries: Runs, named: tuple[int, int], item: Item, call: Call, layer: int | None) -> Runs:
    """The entries that the source of a patch has probabilities for; named is how many rows and columns there are."""
    if item.do != "patch_edges":
        return entries
    shape = _on_edges(item, layer).shape
    # a span of a model's tokens may reach some that are yet to come
    fixed = [call.strict or item.edges is not None or isinstance(where, tuple) for where in (item.row, item.col)]
    wanted = (call.B, call.H, *named)
    for count, most, is_fixed in zip(shape, wanted, (True, True, *fixed), strict=True):
        if is_fixed and count not in (1, most):
            raise ValueError(f"source of {item} must broadcast to {list(wanted)}, got {list(shape)}")
    sizes = torch.tensor(shape[2:])
    kept = ((entries.place >= 0) & ((entries.place < sizes) | (sizes == 1))).all(1)
    return Runs(*(x[kept] for x in entries))


def _on_edges(item: Item, layer: int | None) -> Tensor:
    """The source of a patch of edges, [B or 1, H or 1, rows or 1, cols or 1]."""
    source = _source(item, layer)
    if item.edges is None:
        return source[(None,) * (4 - source.ndim)]
    if source.ndim > 3:
        raise ValueError(f"source of {item} must have at most 3 axes [B, H, edges], got {list(source.shape)}")
    return source[(None,) * (3 - source.ndim)][:, :, None]


def _source(item: Item, layer: int | None) -> Tensor:
    if isinstance(item.source, Tensor):
        return item.source
    if layer not in item.source:
        raise ValueError(f"{item} has no source for layer {layer}, only for {sorted(item.source)}")
    return item.source[layer]

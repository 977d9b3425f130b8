"""What a transformers mask allows, as two integers a row.

transformers describes a mask by a function of (batch, head, query, key) and a 2-D padding mask. Its own functions are
read exactly, from their code and closures, in O(T + S); any other is probed in row chunks. Positions in a mask function
are absolute; ours count from the first key that is held, so query i sits at q_offset − kv_offset + i.
"""

import warnings
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...masks import Intervals

PROBE = 1 << 24  # booleans evaluated at a time


class ModelMask(NamedTuple):
    """One layer's mask in O(T); passed through a model in the place of a 4-D mask.

    outputs: the rows as the model defines them; statistics: the same with padded queries empty.
    last: [B or 1, T] int32, one past the last real key of the row's own sequence or packed segment.
    bias: additive, broadcastable to [B, H, T, S], only where some row is not one run of keys.
    plain: "full" or "causal" where outputs is exactly that, so that SDPA needs no mask.
    """

    outputs: Intervals
    statistics: Intervals
    last: Tensor
    bias: Tensor | None
    keys: int
    plain: str | None

    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> "ModelMask":
        return self

    def __getattr__(self, name: str):
        raise AttributeError(f"this model reads {name} of its attention mask, but causalattn's is only row intervals")


class _Rows(NamedTuple):
    """Absolute key bounds of each query while a mask function is read; every tensor is [B or 1, T] int64."""

    query: Tensor
    position: Tensor
    start: Tensor
    stop: Tensor
    first: Tensor
    last: Tensor
    segments: Tensor | None = None

    def within(self, start: Tensor | None = None, stop: Tensor | None = None) -> "_Rows":
        return self._replace(
            start=self.start if start is None else torch.maximum(self.start, start),
            stop=self.stop if stop is None else torch.minimum(self.stop, stop),
        )


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | ModelMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> ModelMask:
    """Return the ModelMask of a mask function and a 2-D padding mask: our side of AttentionMaskInterface."""
    # static caches hand the mask that generate made back to the model, which calls this again
    if isinstance(attention_mask, ModelMask):
        return attention_mask
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    function = causal_mask_function if mask_function is None else mask_function
    q_offset = int(q_offset)
    query = torch.arange(q_length, device=device)[None] + q_offset
    low, high = torch.full_like(query, kv_offset), torch.full_like(query, kv_offset + kv_length)
    # a sink that a sliding cache has dropped keeps its place: a negative key, inside no row
    unread = _Rows(query, query, low, high, torch.zeros_like(query), high)
    rows = _narrow(function, unread)
    real = _real_keys(attention_mask, kv_offset + kv_length)
    bias = None
    if rows is None:
        probe = partial(_probe, function, batch_size, kv_length, q_offset, kv_offset, attention_mask, use_vmap, device)
        start, stop, bias = _from_probe(probe, batch_size, q_length, kv_length)
        rows = unread._replace(start=start + kv_offset, stop=stop + kv_offset)
    first, last = rows.first, rows.last
    if real is not None:
        start, stop, runs = _skip_padding(real, rows.start, rows.stop)
        rows = rows._replace(start=start, stop=stop)
        first, last, _ = _skip_padding(real, first, last)
        if bias is None and not bool(runs.all()):
            bias = torch.zeros(real.shape[0], 1, 1, kv_length, device=device)
            bias.masked_fill_(~real[:, None, None, kv_offset:], -torch.inf)
            _warn_of_bias()
    padded = None
    # the padding that cross-attention is given is the encoder's, and says nothing of the decoder's queries
    cross = function is bidirectional_mask_function and q_offset + q_length != kv_offset + kv_length
    if real is not None and not cross and q_offset + q_length <= real.shape[1]:
        padded = ~real[:, q_offset : q_offset + q_length]
    shift = partial(torch.sub, other=kv_offset)
    return _assemble(
        shift(rows.start), shift(rows.stop), shift(first), shift(last), kv_length, q_offset - kv_offset, bias, padded
    )


def unmasked(T: int, S: int, *, causal: bool, window: int | None, device: torch.device) -> ModelMask:
    """The mask of a layer that was given none: full, or causal from the first key on as SDPA's flag has it."""
    offset = 0 if causal else S - T
    query = torch.arange(T, device=device)[None] + offset
    start, stop = torch.zeros_like(query), torch.full_like(query, S)
    first, last = start, stop
    if causal:
        stop = torch.minimum(stop, query + 1)
    if window is not None and causal:
        start = torch.maximum(start, query - window + 1)
    return _assemble(start, stop, first, last, S, offset, None, None)


def dense_mask(mask: Tensor, T: int, S: int) -> ModelMask:
    """Read a user's own [B, H or 1, T, S] mask (bool: True attends; float: added to the scores)."""
    if mask.ndim != 4 or mask.shape[2] not in (1, T) or mask.shape[3] != S:
        raise ValueError(f"attention_mask must have shape [B, H or 1, {T}, {S}], got {list(mask.shape)}")
    mask = mask.expand(-1, -1, T, -1)
    lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    allowed = mask if lowest is None else mask > lowest
    start, stop, runs = _runs(allowed.any(1))
    bias = torch.zeros_like(mask, dtype=torch.float32) if lowest is None else mask.masked_fill(~allowed, 0)
    if mask.shape[1] > 1 or not bool(runs.all()):
        bias = bias.masked_fill(~allowed, -torch.inf)
    if bool(bias.any()):
        _warn_of_bias()
    else:
        bias = None
    filled = stop > start
    first = torch.where(filled, start, S).amin(-1, keepdim=True).expand_as(start)
    last = stop.amax(-1, keepdim=True).expand_as(stop)
    return _assemble(start, stop, first, last, S, S - T, bias, None)


def _assemble(start, stop, first, last, S, offset, bias, padded) -> ModelMask:
    empty = stop <= start
    start, stop = start.masked_fill(empty, 0), stop.masked_fill(empty, 0)
    start, stop, first, last = (x.to(torch.int32) for x in torch.broadcast_tensors(start, stop, first, last))
    outputs = statistics = Intervals(start.contiguous(), stop.contiguous(), first.contiguous(), offset)
    if padded is not None:
        start, stop, first, last, padded = torch.broadcast_tensors(start, stop, first, last, padded)
        statistics = Intervals(start.masked_fill(padded, 0), stop.masked_fill(padded, 0), first.contiguous(), offset)
    return ModelMask(outputs, statistics, last.contiguous(), bias, S, _plain(outputs, S) if bias is None else None)


def _plain(intervals: Intervals, S: int) -> str | None:
    start, stop = intervals.start, intervals.stop
    if start.any():
        return None
    if (stop == S).all():
        return "full"
    diagonal = torch.arange(1, stop.shape[-1] + 1, device=stop.device)
    return "causal" if intervals.offset == 0 and (stop == diagonal).all() else None


@cache
def _known_functions() -> dict:
    """The code objects of transformers' own closures; a closure shares its code with every other of its kind."""
    from transformers import masking_utils as m

    ids = torch.zeros(1, 1, dtype=torch.long)
    makers = {
        "and": lambda: m.and_masks(m.causal_mask_function),
        "window": lambda: m.sliding_window_overlay(1),
        "two_sided": lambda: m.sliding_window_bidirectional_overlay(1),
        "chunk": lambda: m.chunked_overlay(1, ids[0]),
        "segments": lambda: m.packed_sequence_mask_function(ids),
        "positions": lambda: m.remap_positions_for_packed_sequence(m.causal_mask_function, ids),
    }
    codes = {}
    for name, make in makers.items():
        try:
            codes[make().__code__] = name
        except AttributeError:  # a release without this function cannot hand one over either
            continue
    return codes


def _narrow(function, rows: _Rows) -> _Rows | None:
    """The bounds left by one of transformers' own mask functions; None for a function it did not write."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is bidirectional_mask_function:
        return rows
    if function is causal_mask_function:
        return rows.within(stop=rows.query + 1)
    code = getattr(function, "__code__", None)
    kind = _known_functions().get(code)
    if kind is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    if kind == "and":
        for part in held["mask_functions"]:
            rows = rows if rows is None else _narrow(part, rows)
        return rows
    if kind == "window":
        return rows.within(start=rows.query - held["sliding_window"] + 1)
    if kind == "two_sided":
        window = held["sliding_window"]
        return rows.within(start=rows.query - window, stop=rows.query + window + 1)
    if kind == "chunk":
        start = rows.query - (rows.position - held["left_padding"][:, None]) % held["chunk_size"]
        return rows.within(start=start, stop=start + held["chunk_size"])
    if kind == "segments":
        return _narrow_to_segments(held["packed_sequence_mask"], rows)
    return _narrow_by_position(held["mask_function"], held["position_ids"], rows)


def _narrow_to_segments(ids: Tensor, rows: _Rows) -> _Rows | None:
    if ids.shape[1] != rows.query.shape[1] or bool((ids.diff(dim=-1) < 0).any()):
        return None
    ids = ids.contiguous()
    start, stop = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
    return rows.within(start, stop)._replace(first=start, last=stop, segments=ids)


def _narrow_by_position(function, position_ids: Tensor, rows: _Rows) -> _Rows | None:
    """Positions that count up by one inside every segment are a shift of the indices there."""
    if rows.segments is None or position_ids.shape[1] != rows.segments.shape[1]:
        return None
    if bool(((position_ids.diff(dim=-1) != 1) & (rows.segments.diff(dim=-1) == 0)).any()):
        return None
    narrowed = _narrow(function, rows._replace(position=position_ids))
    return narrowed if narrowed is None else narrowed._replace(position=rows.position)


def _real_keys(attention_mask: Tensor | None, stop: int) -> Tensor | None:
    """[B, stop] bool over absolute positions, or None where every key is real."""
    if attention_mask is None:
        return None
    real = attention_mask.bool()
    if real.shape[1] < stop:
        real = torch.nn.functional.pad(real, (0, stop - real.shape[1]))
    real = real[:, :stop]
    return None if bool(real.all()) else real


def _skip_padding(real: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink [start, stop) to its first and last real keys; runs is False where padding lies between them."""
    B, S = real.shape
    start, stop = (x.expand(B, -1).clamp(0, S) for x in (start, stop))
    stop = torch.maximum(start, stop)
    positions = torch.arange(S, device=real.device)
    following = torch.where(real, positions, S).flip(-1).cummin(-1).values.flip(-1)
    preceding = torch.where(real, positions + 1, 0).cummax(-1).values
    counted = torch.nn.functional.pad(real.cumsum(-1), (1, 0))
    count = counted.gather(1, stop) - counted.gather(1, start)
    start = torch.nn.functional.pad(following, (0, 1), value=S).gather(1, start)
    stop = torch.nn.functional.pad(preceding, (1, 0)).gather(1, stop)
    stop = torch.where(count > 0, stop, start)
    return start, stop, count == stop - start


def _probe(function, batch_size, kv_length, q_offset, kv_offset, attention_mask, use_vmap, device, first, count):
    """[B, count, S] bool of query rows first … first + count − 1, as transformers itself evaluates them."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=count,
        kv_length=kv_length,
        q_offset=q_offset + first,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    return mask[:, 0]


def _from_probe(probe, B: int, T: int, S: int) -> tuple[Tensor, Tensor, Tensor | None]:
    step = max(1, PROBE // max(1, B * S))
    parts = [_runs(probe(row, min(step, T - row))) for row in range(0, T, step)]
    start, stop, runs = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    if bool(runs.all()):
        return start, stop, None
    bias = torch.zeros(B, 1, T, S, device=start.device)
    for row in range(0, T, step):
        rows = bias[:, 0, row : row + step]
        rows.masked_fill_(~probe(row, rows.shape[1]), -torch.inf)
    _warn_of_bias()
    return start, stop, bias


def _runs(allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of [B, n, S]: its first allowed key, one past its last, and whether all between are allowed."""
    count = allowed.sum(-1)
    edges = allowed.to(torch.uint8)
    start = edges.argmax(-1)
    stop = torch.where(count > 0, allowed.shape[-1] - edges.flip(-1).argmax(-1), start)
    return start, stop, count == stop - start


def _warn_of_bias() -> None:
    # one text from one place, so that Python's own filter shows it once
    warnings.warn(
        "the attention mask is not one run of keys a query, so it is kept as an additive bias: one value a key where "
        "only padding lies between real keys, B·T·S values otherwise",
        stacklevel=1,
    )

"""Masks as two integers a row: query i may attend the keys start[i] ≤ j < stop[i]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Intervals(NamedTuple):
    """A mask resolved for T queries and S keys; accepted wherever a Mask is.

    start, stop: [B or 1, T] int32; query i may attend start ≤ j < stop; an empty row is (0, 0).
    first: [B or 1, T] int32, the first real key of the row's own sequence or segment (the sink).
    offset: query i sits at key position offset + i.
    """

    start: Tensor
    stop: Tensor
    first: Tensor
    offset: int

    def without_first(self) -> "Intervals":
        """The same mask with each row's first real key forbidden, where it is the row's leftmost key."""
        return normal(torch.where(self.start == self.first, self.start + 1, self.start), self.stop, *self[2:])

    def to_dense(self, S: int) -> Tensor:
        """bool [B or 1, T, S], True where query i may attend key j."""
        keys = torch.arange(S, device=self.start.device)
        return (keys >= self.start[..., None]) & (keys < self.stop[..., None])

    def to(self, device: torch.device | str) -> "Intervals":
        return Intervals(self.start.to(device), self.stop.to(device), self.first.to(device), self.offset)


@dataclass(frozen=True)
class Mask:
    """A mask written without knowing T: an intersection of rules, resolved to intervals at the call.

    Example:
        >>> mask = causal() & padding([3, 2])
        >>> mask.resolve(3, 3).stop
        tensor([[1, 2, 3],
                [1, 2, 0]], dtype=torch.int32)
    """

    rules: tuple["_Rule", ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(self.rules + other.rules)

    def is_causal(self) -> bool:
        """Whether its rules alone say that no query attends a key after its own."""
        return any(isinstance(rule, _Window) and rule.right == 0 for rule in self.rules)

    def resolve(
        self, T: int, S: int, *, offset: int | None = None, device: torch.device | str | None = None
    ) -> Intervals:
        """Intervals of T queries over S keys; offset defaults to S − T (the last query sits at the last key)."""
        offset = S - T if offset is None else offset
        positions = torch.arange(offset, offset + T, device=device)[None]  # [1, T]
        start, first = torch.zeros_like(positions), torch.zeros_like(positions)
        stop = torch.full_like(positions, S)
        for rule in self.rules:
            left, right, origin = rule.bounds(positions, S)
            start, stop = torch.maximum(start, left), torch.minimum(stop, right)
            first = torch.maximum(first, origin)
        return normal(start, stop, first, offset)

    def to_dense(
        self, T: int, S: int, *, offset: int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """bool [B or 1, T, S], True where query i may attend key j: O(T·S), for looking at."""
        return self.resolve(T, S, offset=offset, device=device).to_dense(S)


def full() -> Mask:
    """Every query may attend every key."""
    return Mask()


def causal() -> Mask:
    """j ≤ p_i: bottom-right aligned, equal to SDPA's causal mask where T = S."""
    return Mask((_Window(None, 0),))


def sliding_window(w: int, right: int | None = 0) -> Mask:
    """p_i − w < j ≤ p_i + right: w keys to the left, self included; right=None is unbounded.

    Raises:
        ValueError: w < 1 or right < 0.
    """
    if w < 1:
        raise ValueError(f"w must be at least 1, got {w}")
    if right is not None and right < 0:
        raise ValueError(f"right must be at least 0 or None, got {right}")
    return Mask((_Window(w, right),))


def chunked(c: int) -> Mask:
    """Keys of the query's own chunk of c positions (c·⌊p_i / c⌋ ≤ j < c·⌊p_i / c⌋ + c).

    Raises:
        ValueError: c < 1.
    """
    if c < 1:
        raise ValueError(f"c must be at least 1, got {c}")
    return Mask((_Chunked(c),))


def prefix(n: int) -> Mask:
    """j < max(n, p_i + 1): the first n keys for everyone, causal after them.

    Raises:
        ValueError: n < 0.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return Mask((_Prefix(n),))


def packed(cu_seqlens: Tensor | Sequence[int]) -> Mask:
    """Keys of the query's own segment of a packed batch; cu_seqlens is [segments + 1], from 0 to T = S.

    Raises:
        ValueError: cu_seqlens is not one-dimensional, does not start at 0, or decreases (checked on the CPU);
            on resolve, T ≠ S or cu_seqlens does not end at S.
    """
    bounds = torch.as_tensor(cu_seqlens)
    if bounds.ndim != 1 or bounds.numel() < 1 or bounds.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers of shape [segments + 1], got {list(bounds.shape)} {bounds.dtype}"
        )
    if not bounds.is_cuda and (bounds[0] != 0 or (bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {bounds.tolist()}")
    return Mask((_Packed(bounds),))


def padding(lengths: Tensor | Sequence[int], side: Literal["right", "left"] = "right") -> Mask:
    """The real keys of each sequence; lengths is [B]. Padded keys are forbidden, padded queries are empty rows.

    Raises:
        ValueError: side is unknown, lengths is not [B] or is negative; on resolve, a length beyond S.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    counts = torch.as_tensor(lengths)
    if counts.ndim != 1 or counts.is_floating_point():
        raise ValueError(f"lengths must be integers of shape [B], got {list(counts.shape)} {counts.dtype}")
    if not counts.is_cuda and (counts < 0).any():
        raise ValueError(f"lengths must be at least 0, got {counts.tolist()}")
    return Mask((_Padding(counts, side),))


def intervals(start: Tensor, stop: Tensor, first: Tensor | None = None) -> Mask:
    """Explicit intervals, [T] or [B, T] integers; first is the first real key of each row's sequence (default 0).

    Raises:
        ValueError: start, stop and first differ in shape, or are not [T] or [B, T]; on resolve, T differs.
    """
    first = torch.zeros_like(start) if first is None else first
    for name, bound in (("start", start), ("stop", stop), ("first", first)):
        if bound.ndim not in (1, 2) or bound.shape != start.shape or bound.is_floating_point():
            raise ValueError(
                f"{name} must be integers of shape [T] or [B, T], alike in start, stop and first, "
                f"got {list(bound.shape)} {bound.dtype}"
            )
    return Mask((_Explicit(*(bound if bound.ndim == 2 else bound[None] for bound in (start, stop, first))),))


class _Rule(Protocol):
    def bounds(self, positions: Tensor, S: int) -> tuple[Tensor, Tensor, Tensor]:
        """(start, stop, first) of the queries at positions [1, T]; each broadcasts to [B or 1, T]."""


@dataclass(frozen=True, eq=False)
class _Window:
    left: int | None
    right: int | None

    def bounds(self, positions, S):
        zero = torch.zeros_like(positions)
        start = zero if self.left is None else positions - self.left + 1
        return start, zero + S if self.right is None else positions + self.right + 1, zero


@dataclass(frozen=True, eq=False)
class _Chunked:
    length: int

    def bounds(self, positions, S):
        start = positions.div(self.length, rounding_mode="floor") * self.length
        return start, start + self.length, torch.zeros_like(positions)


@dataclass(frozen=True, eq=False)
class _Prefix:
    length: int

    def bounds(self, positions, S):
        zero = torch.zeros_like(positions)
        return zero, (positions + 1).clamp(min=self.length), zero


@dataclass(frozen=True, eq=False)
class _Packed:
    bounds_: Tensor

    def bounds(self, positions, S):
        edges = self.bounds_.to(positions.device, positions.dtype)
        if positions.shape[-1] != S:
            raise ValueError(f"packed needs as many queries as keys, got T = {positions.shape[-1]} and S = {S}")
        if not self.bounds_.is_cuda and self.bounds_[-1] != S:
            raise ValueError(f"cu_seqlens must end at S = {S}, got {int(self.bounds_[-1])}")
        # right=True steps over empty segments; the last edge never starts one
        segment = torch.searchsorted(edges, positions.contiguous(), right=True).clamp(1, max(1, len(edges) - 1))
        start = edges[segment - 1]
        return start, edges[segment.clamp(max=len(edges) - 1)], start


@dataclass(frozen=True, eq=False)
class _Padding:
    lengths: Tensor
    side: str

    def bounds(self, positions, S):
        if not self.lengths.is_cuda and (self.lengths > S).any():
            raise ValueError(f"lengths must be at most S = {S}, got {int(self.lengths.max())}")
        lengths = self.lengths.to(positions.device, positions.dtype)[:, None]  # [B, 1]
        start = S - lengths if self.side == "left" else torch.zeros_like(lengths)
        stop = start + lengths
        padded = (positions < start) | (positions >= stop)
        return start.expand_as(padded), torch.where(padded, 0, stop), start.expand_as(padded)


@dataclass(frozen=True, eq=False)
class _Explicit:
    start: Tensor
    stop: Tensor
    first: Tensor

    def bounds(self, positions, S):
        if self.start.shape[-1] != positions.shape[-1]:
            raise ValueError(f"mask is for T = {self.start.shape[-1]}, got T = {positions.shape[-1]}")
        return tuple(bound.to(positions.device, positions.dtype) for bound in (self.start, self.stop, self.first))


def normal(start: Tensor, stop: Tensor, first: Tensor, offset: int) -> Intervals:
    """Bounds as operators read them: int32, contiguous, of one shape, 0 and 0 where nothing may be attended."""
    empty = stop <= start
    start, stop, first = torch.broadcast_tensors(start.masked_fill(empty, 0), stop.masked_fill(empty, 0), first)
    return Intervals(*(bound.to(torch.int32).contiguous() for bound in (start, stop, first)), offset)

"""Layers of a short text as one batch: what they cost there is calls, not numbers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .integrations.transformers.attention import AttentionCall
from .masks import Intervals


def stacked(calls: dict[int, AttentionCall]) -> Iterator[tuple[list[int], AttentionCall]]:
    """Calls by layer as a few calls, the sequences of like layers one after another, each with its layers."""
    groups: list[list[int]] = []
    for layer, call in calls.items():
        group = next((group for group in groups if _alike(calls[group[0]], call)), None)
        if group is None:
            groups.append([layer])
        else:
            group.append(layer)
    for group in groups:
        yield group, _joined([calls[layer] for layer in group])


def parted(value, parts: int) -> list:
    """A result of stacked calls as those of each layer."""

    def part(n: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.unflatten(0, (parts, -1))[n]

    return [mapped(value, part(n)) for n in range(parts)]


def mapped(value, function: Callable[[Tensor], Tensor]):
    """Nested tuples with the function of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        members = [mapped(member, function) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def _alike(a: AttentionCall, b: AttentionCall) -> bool:
    """Whether two layers differ in nothing but q, k and v."""
    if not all(x is None for call in (a, b) for x in (call.bias, call.sink)):
        return False
    same = (a.q.shape, a.k.shape, a.v.shape, a.scale, a.softcap) == (
        b.q.shape,
        b.k.shape,
        b.v.shape,
        b.scale,
        b.softcap,
    )
    bounds = zip((*a.intervals[:3], a.last), (*b.intervals[:3], b.last), strict=True)
    return same and a.intervals.offset == b.intervals.offset and all(torch.equal(x, y) for x, y in bounds)


def _joined(calls: list[AttentionCall]) -> AttentionCall:
    first, n = calls[0], len(calls)
    if n == 1:
        return first
    q, k, v = (torch.cat([getattr(call, name) for call in calls]) for name in "qkv")

    def of_each(x: Tensor) -> Tensor:
        return x.expand(len(first.q), -1).repeat(n, 1)

    bounds = Intervals(*map(of_each, first.intervals[:3]), first.intervals.offset)
    return first._replace(q=q, k=k, v=v, intervals=bounds, last=of_each(first.last))

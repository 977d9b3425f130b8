"""Results by name, and those that follow from what the passes gave."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Intervals


class Asymmetry(NamedTuple):
    """How far A is from Aᵀ: frobenius, ratio, l1, max [B, H] and net_flow [B, H, T]; max has no gradient."""

    frobenius: Tensor
    ratio: Tensor
    l1: Tensor
    max: Tensor
    net_flow: Tensor


class AttentionStats(NamedTuple):
    """What `attention_stats` was asked for, float32 (float64 for float64 q); None where it was not."""

    lse: Tensor | None = None
    max: Tensor | None = None
    mass: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None
    below: Tensor | None = None
    diag: Tensor | None = None
    distance: Tensor | None = None
    columns: Tensor | None = None
    received: Tensor | None = None
    received_mean: Tensor | None = None
    net_flow: Tensor | None = None
    dag_score: Tensor | None = None
    asymmetry: Asymmetry | None = None


def wanted(want: str | Iterable[str]) -> set[str]:
    if want == "all":
        return set(AttentionStats._fields)
    names = {want} if isinstance(want, str) else set(want)
    if unknown := sorted(names - set(AttentionStats._fields)):
        raise ValueError(f"want must be 'all' or names among {', '.join(AttentionStats._fields)}, got {unknown[0]!r}")
    return names


def diagonal(intervals: Intervals) -> Tensor:
    """[B or 1, T, 1] int32: each query's own key position."""
    start = intervals.start
    positions = torch.arange(start.shape[1], dtype=torch.int32, device=start.device) + intervals.offset
    return positions.expand_as(start)[..., None]


def chosen_keys(columns: Sequence[int | str], intervals: Intervals, S: int) -> Tensor:
    """[B or 1, T, len(columns)] int32."""
    chosen = []
    for column in columns:
        if column == "sink":
            chosen.append(intervals.first)
        elif isinstance(column, int) and -S <= column < S:
            chosen.append(torch.full_like(intervals.first, column % S))
        else:
            raise ValueError(f"columns must hold 'sink' or positions from {-S} to {S - 1}, got {column!r}")
    return torch.stack(chosen, -1) if chosen else intervals.first[..., None][..., :0]


def column_statistics(received: Tensor, mass: Tensor, intervals: Intervals) -> dict[str, Tensor]:
    rows = attending(intervals, received.shape[2])[:, None]
    columns = {"received": received, "received_mean": received / rows.clamp(min=1)}
    if mass.shape[2] == received.shape[2]:
        columns["net_flow"] = mass - received
    return columns


def attending(intervals: Intervals, S: int) -> Tensor:
    """How many rows may attend each key, [B or 1, S]."""
    # +1 where an interval starts, −1 where it stops, summed up
    edges = torch.zeros(len(intervals.start), S + 1, dtype=torch.int32, device=intervals.start.device)
    one = torch.ones_like(intervals.start)
    edges.scatter_add_(1, intervals.start.long(), one).scatter_add_(1, intervals.stop.long(), -one)
    return edges.cumsum(1)[:, :-1]


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Σ part / Σ whole over the rows, summed in float64; 0 where there is nothing."""
    total = whole.sum(-1, dtype=torch.float64)
    share = part.sum(-1, dtype=torch.float64) / total.masked_fill(total == 0, 1)
    return share.masked_fill(total == 0, 0).to(part.dtype)


def asymmetry_of(difference_sq: Tensor, l1: Tensor, largest: Tensor, sum_sq: Tensor, net_flow: Tensor) -> Asymmetry:
    # ‖A + Aᵀ‖² = 4 Σ A² − ‖A − Aᵀ‖² cannot cancel: A ≥ 0, so ‖A − Aᵀ‖² is at most half of 4 Σ A²
    total = 4 * sum_sq.sum(-1, dtype=torch.float64) - difference_sq
    ratio = _root(difference_sq / total.masked_fill(total == 0, 1)).to(difference_sq.dtype)
    return Asymmetry(_root(difference_sq), ratio, l1, largest.detach(), net_flow)


def _root(x: Tensor) -> Tensor:
    """√x, whose gradient at 0 is taken to be 0."""
    return x.masked_fill(x == 0, 1).sqrt().masked_fill(x == 0, 0)

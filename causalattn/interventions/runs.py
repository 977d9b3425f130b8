"""Keys of query rows, as runs of neighbours and one by one."""

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Query row[n] and keys low[n] ≤ j < high[n], int64; of an item, place [n, 2] in its own rows and columns."""

    row: Tensor
    low: Tensor
    high: Tensor
    place: Tensor | None = None


class Softs(NamedTuple):
    """Query row[n] gets strength[n] on key[n]; with an edit of that key, what the edit adds too."""

    row: Tensor
    key: Tensor
    strength: Tensor


def merged(parts: list[Runs], S: int) -> Runs:
    """Overlapping and touching runs of a row as one, sorted."""
    if not parts:
        return Runs(*torch.empty(3, 0, dtype=torch.int64))
    row, low, high = (torch.cat(x) for x in zip(*(part[:3] for part in parts), strict=True))
    base = row * (S + 2)
    order = (base + low).argsort(stable=True)
    row, base, low = row[order], base[order], (base + low)[order]
    reach = (base + high[order]).cummax(0).values
    new = torch.ones_like(row, dtype=torch.bool)
    new[1:] = low[1:] > reach[:-1]
    first = new.nonzero()[:, 0]
    last = torch.cat([first[1:] - 1, torch.tensor([len(row) - 1])]) if len(row) else first
    return Runs(row[first], (low - base)[first], (reach - base)[last])


def summed(parts: list[tuple[Runs, float]], S: int) -> Softs:
    """The single keys of runs, each once, with the sum of what is put on it."""
    row = torch.cat([torch.empty(0, dtype=torch.int64), *(entries.row for entries, _ in parts)])
    key = torch.cat([torch.empty(0, dtype=torch.int64), *(entries.low for entries, _ in parts)])
    each = torch.cat(
        [torch.empty(0, dtype=torch.float64), *(torch.full((len(e.row),), x, dtype=torch.float64) for e, x in parts)]
    )
    place, inverse = (row * (S + 2) + key).unique(return_inverse=True)
    strength = torch.zeros(len(place), dtype=torch.float64).index_add_(0, inverse, each)
    return Softs(place // (S + 2), place % (S + 2), strength)


def covered(cuts: Runs, keys: Softs, S: int) -> Tensor:
    """Which of the keys lie in a cut run of their row."""
    if not len(cuts.row):
        return torch.zeros_like(keys.row, dtype=torch.bool)
    place = keys.row * (S + 2) + keys.key
    run = torch.searchsorted(cuts.row * (S + 2) + cuts.low, place, right=True) - 1
    return (run >= 0) & (place < (cuts.row * (S + 2) + cuts.high)[run.clamp(min=0)])

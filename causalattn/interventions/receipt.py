"""What a plan did while a model ran under it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan


class Moved(NamedTuple):
    """How far probabilities moved, summed over rows, float64, without gradient.

    mass: Σ_j max(A_ij − A'_ij, 0), what was taken from keys; kl: Σ_j A'_ij log(A'_ij / A_ij) in nats, over rows that
    kept a key; emptied: how many rows did not.
    """

    mass: Tensor
    kl: Tensor
    emptied: Tensor


class Receipt:
    """What the forward passes under a plan came to; read after the `with`, for on a GPU reading waits.

    edges: (sequence, head, query, key) matched, over all passes; a head that is switched off or patched counts as one.
    mass, kl, emptied: see `Moved`. layers: the same by layer number. items: edges by item of the plan.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._matched: list[list[int | Tensor]] = [[] for _ in plan.items]
        self._moved: dict[int, list[Moved]] = {}

    def note(self, layer: int, places: Iterable[int], matched: list[int | Tensor], moved: Moved) -> None:
        """Add one pass through one layer; places are the items, of the plan, that matched is of."""
        for place, count in zip(places, matched, strict=True):
            self._matched[place].append(count)
        self._moved.setdefault(layer, []).append(moved)

    @property
    def items(self) -> list[int]:
        return [int(sum(counts)) for counts in self._matched]

    @property
    def edges(self) -> int:
        return sum(self.items)

    @property
    def layers(self) -> dict[int, Moved]:
        return {layer: _total(parts) for layer, parts in sorted(self._moved.items())}

    @property
    def mass(self) -> float:
        return float(self._whole().mass)

    @property
    def kl(self) -> float:
        return float(self._whole().kl)

    @property
    def emptied(self) -> int:
        return int(self._whole().emptied)

    def _whole(self) -> Moved:
        return _total([moved for parts in self._moved.values() for moved in parts])

    def __repr__(self) -> str:
        return f"Receipt(edges={self.edges}, mass={self.mass:.4g}, kl={self.kl:.4g}, emptied={self.emptied})"


def _total(parts: list[Moved]) -> Moved:
    sums = torch.tensor([[float(x) for x in moved] for moved in parts], dtype=torch.float64).view(-1, 3).sum(0)
    return Moved(*sums)

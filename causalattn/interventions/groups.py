"""The rows of a surgery by how many keys they gain or lose, so that each lot is one rectangle of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .edges import Surgery

# a longer cut is never listed key by key: its row is attended again, in tiles
LISTED = 64


class Group(NamedTuple):
    """R rows with up to n listed keys and m runs of keys taken out; a row's surplus places hold key −1 and empty runs.

    rows [R]; keys, strength [R, n]: what a key's score gains, −∞ where it is cut; low, high [R, m]: cut runs and listed
    keys in order, between which lie the keys that stay as they are.
    listed: every cut key is among keys. loses: some key's strength is negative.
    """

    rows: Tensor
    keys: Tensor
    strength: Tensor
    low: Tensor
    high: Tensor
    listed: bool
    loses: bool

    def split(self, size: int) -> "list[Group]":
        """The same rows, at most size of them at a time."""
        parts = zip(*(x.split(size) for x in self[:5]), strict=True)
        return [Group(*part, self.listed, self.loses) for part in parts]


def groups(surgery: Surgery, S: int, device: torch.device) -> list[Group]:
    """Every row of the surgery's cuts and softs in one group."""
    cuts, softs = surgery.cuts, surgery.softs
    lengths = cuts.high - cuts.low
    rows = torch.cat([cuts.row, softs.row]).unique()
    cut_keys = torch.zeros_like(rows).index_add_(0, torch.searchsorted(rows, cuts.row), lengths)
    listed = cut_keys <= LISTED

    few = listed[torch.searchsorted(rows, cuts.row)]
    each = lengths[few]
    within = torch.arange(int(each.sum())) - (each.cumsum(0) - each).repeat_interleave(each)
    key_row = torch.cat([cuts.row[few].repeat_interleave(each), softs.row])
    key = torch.cat([cuts.low[few].repeat_interleave(each) + within, softs.key])
    strength = torch.cat([torch.full_like(within, -torch.inf, dtype=torch.float64), softs.strength])
    order = (key_row * (S + 2) + key).argsort()
    key_at, key, strength = torch.searchsorted(rows, key_row[order]), key[order], strength[order]

    run_row = torch.cat([cuts.row, softs.row])
    low, high = torch.cat([cuts.low, softs.key]), torch.cat([cuts.high, softs.key + 1])
    order = (run_row * (S + 2) + low).argsort()
    run_at, low, high = torch.searchsorted(rows, run_row[order]), low[order], high[order]

    widths = torch.stack([_ceiling(at.bincount(minlength=len(rows))) for at in (key_at, run_at)], 1)
    kinds, kind_of = torch.cat([widths, listed[:, None].long()], 1).unique(dim=0, return_inverse=True)
    found = []
    for number, (n, m, whole) in enumerate(kinds.tolist()):
        chosen = (kind_of == number).nonzero()[:, 0]
        place = torch.full((len(rows),), -1).index_put_((chosen,), torch.arange(len(chosen)))
        here, runs = place[key_at] >= 0, place[run_at] >= 0
        strengths = _rectangle(place[key_at[here]], strength[here], len(chosen), n, 0.0)
        tensors = (
            rows[chosen],
            _rectangle(place[key_at[here]], key[here], len(chosen), n, -1),
            strengths,
            _rectangle(place[run_at[runs]], low[runs], len(chosen), m, S),
            _rectangle(place[run_at[runs]], high[runs], len(chosen), m, S),
        )
        loses = not whole or bool((strengths < 0).any())
        found.append(Group(*(x.to(device) for x in tensors), bool(whole), loses))
    return found


def _ceiling(counts: Tensor) -> Tensor:
    """The next power of two, 0 for 0."""
    return torch.where(counts > 0, 2 ** torch.log2(counts.clamp(min=1).double()).ceil().long(), 0)


def _rectangle(at: Tensor, values: Tensor, rows: int, width: int, fill: float) -> Tensor:
    """values of row at[n], which ascends, side by side: [rows, width], fill where a row has fewer."""
    place = torch.arange(len(at)) - torch.searchsorted(at, at)
    return torch.full((rows, width), fill, dtype=values.dtype).index_put_((at, place), values)

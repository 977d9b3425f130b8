"""Probabilities that chosen edges are given, and what they leave to the rest of their rows."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """Query row[n] attends key[n] with probability value[:, n], [P, N] for P heads; sorted by row and key."""

    row: Tensor
    key: Tensor
    value: Tensor

    def of(self, rows: Tensor, keys: Tensor, S: int) -> Tensor:
        """The values at rows [R] and keys [R, n], NaN where there is none: [P, R, n]."""
        value = self.value.to(rows.device)
        if not len(self.row):
            return value.new_full((len(value), *keys.shape), torch.nan)
        known, wanted = (self.row * (S + 2) + self.key).to(rows.device), rows[:, None] * (S + 2) + keys
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        return torch.where((known[at] == wanted) & (keys >= 0), value[:, at], torch.nan)


class Blend(NamedTuple):
    """Rows in which some keys have their shares c, [P, R, n], 0 for other keys, and the rest has left in all, [P, R].

    given [P, R, n]: which keys. whole: Σ c as it was given, where nothing is left, else 0. lse [P, R]: the row's.
    """

    c: Tensor
    given: Tensor
    left: Tensor
    whole: Tensor
    lse: Tensor


def blend(shares: Tensor, s: Tensor, allowed: Tensor, lse: Tensor, sink: Tensor) -> Blend:
    """Give keys with scores s, [P, R, n], their shares, NaN for none; lse [P, R] is the rest's, sink [P] the heads'.

    The rest's probabilities sum to left, so that its scores stay what they are under the new lse.
    """
    given = allowed & ~shares.isnan()
    c = torch.where(given, shares.to(s), 0)
    total = c.sum(-1)
    here = given.any(-1)
    rest = torch.where(lse.detach() == -torch.inf, sink[:, None], lse)
    gone = here & (total > 0) & ((rest.detach() == -torch.inf) | (total.detach() >= 1))
    left = torch.where(gone, 0, 1 - total)
    whole = torch.where(gone, total, 0)
    c = c / torch.where(gone, total, 1)[..., None]
    own = torch.logsumexp(torch.where(given, s, torch.finfo(s.dtype).min / 2), -1) if s.shape[-1] else lse
    rest = rest - torch.log(left.masked_fill(left == 0, 1))
    # a learned sink that is given nothing beside it is no row
    rest = torch.where((lse.detach() == -torch.inf) & (total == 0), lse, rest)
    return Blend(c, given, left, whole, torch.where(gone, own, torch.where(here, rest, lse)))

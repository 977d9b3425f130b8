"""Interventions on the probabilities of chosen rows, written out: O(R·S) memory."""

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import Logits
from ..interventions.edges import Surgery, check_edits
from ..interventions.groups import Group, groups
from ..interventions.scores import Pairs
from ..interventions.shares import blend
from .forward import attend


def edited_rows(
    surgeries: list[Surgery], q: Tensor, k: Tensor, logits: Logits, rows: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """A' of q's chosen rows, in any order and with repeats, and their lse: [B, H, R, S], [B, H, R]; differentiable."""
    check_edits(surgeries, k.shape[3], None)
    shape, S = (*q.shape[:2], len(rows)), k.shape[2]
    gain = torch.zeros(*shape, S, dtype=accumulator(q), device=q.device)
    key, allowed = torch.zeros(shape, dtype=torch.int64, device=q.device), torch.zeros_like(gain[..., 0]).bool()
    forced_score = torch.zeros_like(gain[..., 0])
    every = [(surgery, Pairs(surgery.pairs, q, k, logits)) for surgery in surgeries]
    for surgery, pairs in every:
        for group in groups(surgery, S, q.device):
            here = (pairs.b, pairs.h)
            gain = gain.index_put(here, gain[here] + _gain(surgery, pairs, group, rows))
        onto = _lookup(surgery.hard.row, surgery.hard.key, q.shape[2]).to(q.device)[rows]
        s, may = (x[..., 0] for x in pairs.scores(rows, onto[:, None], surgery.key_edits))
        key[pairs.b, pairs.h], allowed[pairs.b, pairs.h] = onto.clamp(min=0), may
        forced_score = forced_score.index_put((pairs.b, pairs.h), s)
    part = logits.of_rows(rows, k.shape[2], accumulator(q))
    bias = gain if part.bias is None else part.bias + gain
    _, lse, _, _, probs = attend(q[:, :, rows], k, None, *part._replace(bias=bias), dtype, backend)
    for surgery, pairs in every:
        for group in groups(surgery, S, q.device) if len(surgery.shares.row) else []:
            here = (pairs.b, pairs.h)
            mixed, total = _blended(surgery, pairs, group, rows, probs[here], lse[here])
            probs, lse = probs.index_put(here, mixed), lse.index_put(here, total)
    if not allowed.numel() or not S:
        return probs, lse
    one_hot = torch.zeros_like(probs).scatter(-1, key[..., None], 1)
    return torch.where(allowed[..., None], one_hot, probs), torch.where(allowed, forced_score, lse)


def _gain(surgery: Surgery, pairs: Pairs, group: Group, rows: Tensor) -> Tensor:
    """What the scores of chosen rows gain from one group, −∞ where cut: [P, R, S]."""
    S = pairs.k.shape[2]
    at = _lookup(group.rows.cpu(), torch.arange(len(group.rows)), pairs.q.shape[2]).to(rows.device)[rows]
    member = (at >= 0)[:, None]
    keys, strength, low, high = (x[at.clamp(min=0)] for x in group[1:5])
    # the last column takes what belongs to no key
    keys = keys.masked_fill(~member | (keys < 0), S)
    edges = torch.zeros(len(rows), S + 1, dtype=torch.int32, device=rows.device)
    for x, step in ((low, 1), (high, -1)):
        edges.scatter_add_(1, x.masked_fill(~member, S), torch.full_like(x, step, dtype=torch.int32))
    gone = edges.cumsum(1) > 0
    gain = torch.zeros(gone.shape, dtype=pairs.dtype, device=rows.device).masked_fill_(gone, -torch.inf)
    gain = gain.scatter(1, keys, strength.to(gain)).expand(len(pairs.b), -1, -1)
    if surgery.key_edits:
        edited, plain = (pairs.scores(rows, keys, edits)[0] for edits in (surgery.key_edits, {}))
        gain = gain.scatter_add(2, keys.expand(len(pairs.b), -1, -1), edited - plain)
    return gain[..., :S]


def _blended(
    surgery: Surgery, pairs: Pairs, group: Group, rows: Tensor, probs: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities [P, R, S] and lse [P, R] of chosen rows, with one group's patched keys at their shares."""
    S = probs.shape[2]
    at = _lookup(group.rows.cpu(), torch.arange(len(group.rows)), pairs.q.shape[2]).to(rows.device)[rows]
    keys = group.keys[at.clamp(min=0)].masked_fill((at < 0)[:, None], -1)
    s, allowed = pairs.scores(rows, keys, surgery.key_edits)
    mixed = blend(surgery.shares.of(rows, keys, S), s, allowed, lse, pairs.sink)
    # the last column takes what belongs to no key
    where = keys.masked_fill(keys < 0, S).expand_as(mixed.c)
    c = torch.zeros(*probs.shape[:2], S + 1, dtype=mixed.c.dtype, device=rows.device).scatter(2, where, mixed.c)
    return (mixed.left[..., None] * probs + c[..., :S]).to(probs.dtype), mixed.lse.to(lse.dtype)


def _lookup(rows: Tensor, values: Tensor, T: int) -> Tensor:
    """values by row, −1 where there is none: [T]."""
    return torch.full((T,), -1).index_put_((rows,), values)

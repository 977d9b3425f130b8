"""Interventions on out and lse as closed forms, on the rows they touch; a row that loses nearly all is formed again.

With p = A_ij, λ_j what the score of key j gains (−∞ where it is cut) and W = Σ_j p_j (e^{λ_j} − 1):

    o' = (o + Σ_j p_j (e^{λ_j} − 1) v_j) / (1 + W),  lse' = lse + log(1 + W);  hard onto j: o' = v_j, lse' = S_ij

Edges that take probabilities c of another run are cut first: then o' = (1 − Σ c) o + Σ c v_j.

Where the keys that lose had most of a row, the difference has lost digits: the keys that stay as they are, which lie in
runs between the others, are attended again and merged by their lse. On a GPU, whose values cannot be looked at without
waiting for them, so is every row that loses anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import Logits
from ..interventions.edges import Surgery, check_edits
from ..interventions.groups import Group, groups
from ..interventions.receipt import Moved
from ..interventions.scores import Pairs
from ..interventions.shares import blend
from .forward import attend

# the share from which on a row is formed again; up to it an error of o grows 1 / (1 − share) times
HOT, HOT_16_BIT = 0.9, 0.5
# numbers gathered at a time: k and v of listed keys, and ALiBi's bias of rows that are attended again
WORKSPACE = 2**26


class Inputs(NamedTuple):
    """What one call attends with."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Logits
    backend: str


def operate(surgeries: list[Surgery], inputs: Inputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Moved]:
    """out and lse under the surgeries, differentiable, and how far the probabilities moved."""
    check_edits(surgeries, inputs.k.shape[3], inputs.v.shape[3])
    total = Moved(*torch.zeros(3, dtype=torch.float64, device=lse.device))
    with torch.autocast(lse.device.type, enabled=False):
        for surgery in surgeries:
            b, h = surgery.pairs.to(lse.device).T
            heads = _Heads(surgery, inputs, out[b, h], lse[b, h])
            heads.operate()
            out = out.index_put((b, h), heads.out.to(out.dtype))
            lse = lse.index_put((b, h), heads.lse)
            total = Moved(*(x + y.sum(dtype=torch.float64) for x, y in zip(total, heads.moved(), strict=True)))
    return out, lse, total


class _Heads:
    """The P heads of one surgery: out [P, T, V] and lse [P, T], while they are changed."""

    def __init__(self, surgery: Surgery, inputs: Inputs, out: Tensor, lse: Tensor):
        self.surgery, self.inputs, self.dtype = surgery, inputs, accumulator(inputs.q)
        self.out, self.lse, self.before = out.to(self.dtype), lse, lse.detach()
        self.pairs = Pairs(surgery.pairs, inputs.q, inputs.k, inputs.logits)
        self.hot = HOT if inputs.q.itemsize > 2 else HOT_16_BIT
        self.mass, self.kl = torch.zeros_like(self.before), torch.zeros_like(self.before)
        # what patched edges were given in rows that have nothing else
        self.whole = torch.zeros_like(self.before)

    def operate(self) -> None:
        device = self.lse.device
        width = len(self.surgery.pairs) * (self.inputs.k.shape[3] + self.inputs.v.shape[3])
        for group in groups(self.surgery, self.inputs.k.shape[2], device):
            for part in group.split(max(1, WORKSPACE // (width * max(1, group.keys.shape[1])))):
                self._tilt(part)
        self._force(self.surgery.hard.row.to(device), self.surgery.hard.key.to(device))
        for key, delta in self.surgery.value_edits.items():
            self._shift_values(key, delta)
        for rows, source in self.surgery.patches:
            self._patch(rows.to(device), source)
        if self.surgery.off == "zero":
            self.out = torch.zeros_like(self.out)
        elif self.surgery.off == "mean":
            filled = (self.surgery.real.to(device) & (self.before > -torch.inf))[..., None]
            mean = (self.out * filled).sum(1, keepdim=True) / filled.sum(1, keepdim=True).clamp(min=1)
            self.out = torch.where(filled, mean, self.out)

    def moved(self) -> Moved:
        emptied = (self.lse.detach() == -torch.inf) & (self.before > -torch.inf)
        return Moved(self.mass, self.kl.masked_fill(emptied, 0), emptied)

    def _tilt(self, group: Group) -> None:
        """Some keys of these rows gain or lose, and all are divided anew."""
        rows, lse, out = group.rows, self.lse[:, group.rows], self.out[:, group.rows]
        s, allowed = self.pairs.scores(rows, group.keys, {})
        strength = group.strength.to(self.dtype)
        edited = self.pairs.scores(rows, group.keys, self.surgery.key_edits)[0] if self.surgery.key_edits else s
        strength = torch.where(allowed, strength + (edited - s), 0)
        values = self.pairs.taken(self.inputs.v, group.keys, allowed)

        filled = lse.detach() > -torch.inf
        gap = torch.where(allowed, s - torch.where(filled, lse, 0)[..., None], -torch.inf)
        p = torch.exp(gap)
        lost = (p * -torch.expm1(strength.clamp(max=0))).detach().sum(-1)
        # of a share below a hundredth, which a sink leaves to the keys, rounding has taken digits already
        again = lost > self.hot * (self._held(lse) - 0.01)
        again &= (strength.detach() < 0).any(-1)
        again |= not group.listed
        if rows.is_cuda:
            again |= group.loses or bool(self.surgery.key_edits)
        # e^{−top} on both sides of the quotient, so that no strength overflows and no p that it raises is 0
        w, top = _growth(gap, strength)
        whole = torch.where(again, 1, torch.exp(-top) + w.sum(-1))
        new_out = (out * torch.exp(-top)[..., None] + (w[..., None] * values).sum(-2)) / whole[..., None]
        new_lse = torch.where(filled, lse + (top + torch.log(whole)), lse)
        kept = 1 - p.detach().sum(-1)

        gained = torch.where(allowed, s + strength, -torch.inf)
        new_out, new_lse, kept = self._form_again(group, again, gained, values, (new_out, new_lse, kept))
        if len(self.surgery.shares.row):
            shares = self.surgery.shares.of(rows, group.keys, self.inputs.k.shape[2])
            mixed = blend(shares, edited, allowed, new_lse, self.pairs.sink)
            new_out = mixed.left[..., None] * new_out + (mixed.c[..., None] * values).sum(-2)
            new_lse, kept = mixed.lse, kept.masked_fill(mixed.whole > 0, 0)
            gained = torch.where(mixed.given, torch.log(mixed.c) + new_lse[..., None], gained)
            gained = gained.masked_fill((mixed.whole > 0)[..., None] & ~mixed.given, -torch.inf)
            strength = torch.where(mixed.given, gained - s, strength)
            self.whole = self.whole.index_copy(1, rows, mixed.whole)
        self._account(rows, p, strength, gained, kept.clamp(0, 1), new_lse)
        self.out = self.out.index_copy(1, rows, new_out)
        self.lse = self.lse.index_copy(1, rows, new_lse)

    def _held(self, lse: Tensor) -> Tensor:
        """What share of each row its keys have, all but a learned sink's: [P, R]."""
        return -torch.expm1((self.pairs.sink.detach()[:, None] - lse.detach()).clamp(max=0))

    def _form_again(self, group: Group, again: Tensor, gained: Tensor, values: Tensor, closed: tuple) -> tuple:
        """out, lse and what share the other keys had, with the rows that again marks put in; gained is S + λ."""
        places, parts = [], []
        for n in range(len(again)):
            at = torch.arange(len(group.rows), device=again.device) if again.is_cuda else again[n].nonzero()[:, 0]
            for some in at.split(max(1, WORKSPACE // max(1, self.inputs.k.shape[2]))):
                out, lse = self._between(n, group.rows[some], group.low[some], group.high[some])
                sink = self._sink(n, lse[:, :1])
                kept = torch.exp(_merge(out, torch.cat([lse, sink], -1))[1] - self.lse[n, group.rows[some]]).detach()
                lse = torch.cat([lse, gained[n, some]], -1)
                merged, total = _merge(torch.cat([out, values[n, some]], -2), torch.cat([lse, sink], -1))
                # a sink alone is no row
                total = total.masked_fill((lse.detach() == -torch.inf).all(-1), -torch.inf)
                places.append((torch.full_like(some, n), some))
                parts.append((merged, total, kept.nan_to_num(0)))
        if not places:
            return closed
        place = tuple(torch.cat(x) for x in zip(*places, strict=True))
        parts = (torch.cat(x) for x in zip(*parts, strict=True))
        if again.is_cuda:
            chosen = again[place]
            parts = (
                torch.where(chosen.view(-1, *[1] * (new.ndim - 1)), new, old[place])
                for new, old in zip(parts, closed, strict=True)
            )
        return tuple(old.index_put(place, new.to(old.dtype)) for old, new in zip(closed, parts, strict=True))

    def _sink(self, n: int, like: Tensor) -> Tensor:
        """Head n's learned sink, −∞ without one."""
        return self.pairs.sink[n].to(like.dtype).expand_as(like)

    def _between(self, n: int, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Head n's out [R, m + 1, V] and lse [R, m + 1] of the keys around m runs, empty ones left out."""
        q, k, v, logits, backend = self.inputs
        b, h = self.surgery.pairs[n].tolist()
        g = h // (q.shape[1] // k.shape[1])
        own = logits.of_head(b, h)._replace(sink=None).of_rows(rows, k.shape[2], self.dtype)
        head = (q[b : b + 1, h : h + 1, rows], *(x[b : b + 1, g : g + 1] for x in (k, v)))
        start, stop = own.start[0].long(), own.stop[0].long()
        edges = [start]
        for m in range(low.shape[1]):
            edges += [torch.maximum(torch.minimum(low[:, m], stop), edges[-1])]
            edges += [torch.maximum(torch.minimum(high[:, m], stop), edges[-1])]
        edges.append(torch.maximum(stop, edges[-1]))
        outs, lses = [], []
        for n, (left, right) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
            if n == 0 or rows.is_cuda or (right > left).any():
                bounds = {"start": left.int()[None], "stop": right.int()[None]}
                out, lse, *_ = attend(*head, *own._replace(**bounds), None, backend)
                outs.append(out[0, 0].to(self.dtype))
                lses.append(lse[0, 0])
        return torch.stack(outs, 1), torch.stack(lses, 1)

    def _account(self, rows: Tensor, p: Tensor, strength: Tensor, gained: Tensor, kept: Tensor, lse: Tensor) -> None:
        """Note how far these rows' probabilities move; kept [P, R] is what keys neither listed nor cut had together."""
        with torch.no_grad():
            some = lse > -torch.inf
            after = torch.exp(gained - torch.where(some, lse, torch.inf)[..., None])
            shift = torch.where(some, lse - self.before[:, rows], 0)
            cut = (1 - p.sum(-1) - kept).clamp(min=0)
            self.mass[:, rows] = (p - after).clamp(min=0).sum(-1) + cut - kept * torch.expm1(-shift).clamp(max=0)
            self.kl[:, rows] = torch.where(after > 0, after * strength, 0).sum(-1) - shift

    def _force(self, rows: Tensor, keys: Tensor) -> None:
        """Each row attends its one key, where the mask allows it."""
        s, allowed = (x[..., 0] for x in self.pairs.scores(rows, keys[:, None], self.surgery.key_edits))
        values = self.pairs.taken(self.inputs.v, keys[:, None], allowed[..., None])[..., 0, :]
        out, lse, before = self.out[:, rows], self.lse[:, rows], self.before[:, rows]
        self.out = self.out.index_copy(1, rows, torch.where(allowed[..., None], values, out))
        self.lse = self.lse.index_copy(1, rows, torch.where(allowed, s, lse))
        self.forced = allowed
        with torch.no_grad():
            plain = self.pairs.scores(rows, keys[:, None], {})[0][..., 0] if self.surgery.key_edits else s
            gap = torch.where(allowed, before - plain, 0)
            self.mass[:, rows] = torch.where(allowed, -torch.expm1(-gap), self.mass[:, rows])
            self.kl[:, rows] = torch.where(allowed, gap, self.kl[:, rows])

    def _shift_values(self, key: int, delta: Tensor) -> None:
        """A'_ij delta joins every row, by what the other interventions made of A."""
        cuts, softs, hard = self.surgery.cuts, self.surgery.softs, self.surgery.hard
        rows = torch.arange(self.lse.shape[1], device=self.lse.device)
        edges = (rows, torch.full_like(rows, key)[:, None])
        s, allowed = (x[..., 0] for x in self.pairs.scores(*edges, self.surgery.key_edits))
        gain = torch.zeros(len(rows), dtype=torch.float64)
        gain[softs.row[softs.key == key]] = softs.strength[softs.key == key]
        gain[cuts.row[(cuts.low <= key) & (key < cuts.high)]] = -torch.inf
        allowed = allowed & (self.lse.detach() > -torch.inf)
        p = torch.where(allowed, torch.exp(s + gain.to(s) - torch.where(allowed, self.lse, 0)), 0)
        shares = self.surgery.shares.of(*edges, self.inputs.k.shape[2])[..., 0]
        given, alone = allowed & ~shares.isnan(), self.whole > 0
        c = torch.where(given, shares.to(s), 0) / self.whole.where(alone, 1)
        p = torch.where(given, c, p.masked_fill(alone, 0))
        row = hard.row.to(rows.device)
        onto = (hard.key == key).to(p).expand(len(p), -1)
        p = p.index_copy(1, row, torch.where(self.forced, onto, p[:, row]))
        self.out = self.out + p[..., None] * delta.to(self.out)

    def _patch(self, rows: Tensor, source: Tensor) -> None:
        B, H, T, V = *self.inputs.q.shape[:3], self.out.shape[2]
        if source.shape[0] not in (1, B) or source.shape[1:] != (H, T, V):
            wanted = f"[{B} or 1, {H}, {T}, {V}]"
            raise ValueError(f"the source of a patch must have shape {wanted}, got {list(source.shape)}")
        taken = source.expand(B, -1, -1, -1)[self.pairs.b[:, None], self.pairs.h[:, None], rows]
        self.out = self.out.index_copy(1, rows, taken.to(self.out))


def _growth(gap: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """e^{−top} p (e^strength − 1) with p = e^gap, and top: the largest of 0 and all gap + strength."""
    up, down = strength.where(strength > 0, 0), strength.where(strength <= 0, 0)
    with_rest = [torch.cat([x.detach(), x.new_zeros(*x.shape[:-1], 1)], -1) for x in (gap, up)]
    place = sum(with_rest).argmax(-1, keepdim=True)
    # the two parts of top apart, so that a large strength costs no digits of gap
    gap_top, up_top = (x.gather(-1, place) for x in with_rest)
    top = gap_top + up_top
    w = torch.exp(gap - gap_top + (up - up_top)) * -torch.expm1(-up) + torch.exp(gap - top) * torch.expm1(down)
    return w, top[..., 0]


def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Parts [R, n, V] and [R, n + 1] of a row as one, [R, V] and [R]; the last part has no value."""
    top = lse.detach().amax(-1, keepdim=True)
    top = top.where(top > -torch.inf, 0)
    e = torch.exp(lse - top)
    total = e.sum(-1)
    empty = total == 0
    whole = total.masked_fill(empty, 1)
    merged = (e[:, :-1, None] * out).sum(-2) / whole[..., None]
    return merged, torch.where(empty, -torch.inf, torch.log(whole) + top[:, 0])

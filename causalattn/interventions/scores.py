"""Single scores and values of a call, gathered edge by edge."""

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import Logits


class Pairs:
    """P pairs of a sequence b and a head h of one call; edges of theirs are rows [R] or [P, R] and keys [R, n]."""

    def __init__(self, pairs: Tensor, q: Tensor, k: Tensor, logits: Logits):
        self.q, self.k, self.logits, self.dtype = q, k, logits, accumulator(q)
        self.b, self.h = pairs.to(q.device).T
        self.group = self.h // (q.shape[1] // k.shape[1])
        # each head's learned sink, −∞ without one
        if logits.sink is None:
            self.sink = torch.full(self.h.shape, -torch.inf, dtype=self.dtype, device=q.device)
        else:
            self.sink = logits.sink[self.h].to(self.dtype)

    def allowed(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Where the mask allows them: bool [P, R, n]."""
        start, stop = self.logits.start, self.logits.stop
        sequences = (self.b if start.shape[0] > 1 else torch.zeros_like(self.b))[:, None]
        return (keys >= start[sequences, rows][..., None]) & (keys < stop[sequences, rows][..., None])

    def scores(self, rows: Tensor, keys: Tensor, edits: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """S with some keys' k edited, 0 where forbidden, and where it is allowed, by the bias too: [P, R, n]."""
        q, logits = self.q, self.logits
        b, h = self.b[:, None, None], self.h[:, None, None]
        allowed = self.allowed(rows, keys)
        at = keys.clamp(0, max(self.k.shape[2] - 1, 0))
        near = self.taken(self.k, keys, allowed)  # [P, R, n, D]
        for key, delta in edits.items():
            near = near + torch.where((keys == key)[..., None], delta.to(near), 0)
        s = (q[b[..., 0], h[..., 0], rows].to(self.dtype)[:, :, None] * near).sum(-1) * logits.scale
        if logits.softcap > 0:
            s = torch.tanh(s / logits.softcap) * logits.softcap
        if logits.bias is not None:
            bias = logits.bias.expand(*q.shape[:3], self.k.shape[2])[b, h, rows[:, None], at]
            allowed = allowed & ~forbidden(bias)
            s = s + bias.to(self.dtype)
        if logits.slopes is not None:
            slopes = logits.slopes.expand(*q.shape[:2])[self.b, self.h].to(self.dtype)
            s = s - slopes[:, None, None] * (rows[:, None] + logits.offset - at).abs()
        allowed = allowed & (s.detach() != -torch.inf)
        return torch.where(allowed, s, 0), allowed

    def taken(self, x: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """k or v at keys, 0 where forbidden, for 0 · NaN must not leak from padding: [P, R, n, ·]."""
        taken = x[self.b[:, None, None], self.group[:, None, None], keys.clamp(0, max(x.shape[2] - 1, 0))]
        return taken.to(self.dtype).masked_fill(~allowed[..., None], 0)


def forbidden(bias: Tensor) -> Tensor:
    """Where a bias lets no probability through: −∞, or the least number of its dtype, which many masks are made of."""
    return bias.detach() <= torch.finfo(bias.dtype).min

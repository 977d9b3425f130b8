"""The torch path's order of work: groups of GROUP tokens, all those of a block advancing together token by token.

States are [..., N, E] here: sums over N then run along contiguous E. What a group computes depends on its own tokens
and on the state it begins with, so the size of a block changes no bit.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulator

GROUP = 64
# entries of the states that advance together: what a cache holds GROUP times
TOGETHER = 2**15
# below this |ΔA| the derivative of (e^{ΔA} − 1)/A by A is a series: its closed form cancels
NEAR = 0.5


class Block(NamedTuple):
    """Some sequences and, of each, some groups in a row."""

    batch: slice
    first: int
    groups: int
    dtype: torch.dtype

    def tokens(self, x: Tensor) -> Tensor:
        """Of x [B, T, …] this block's tokens, zeros past T: [GROUP, sequences, groups, …]."""
        start, count = self.first * GROUP, self.groups * GROUP
        x = x[self.batch, start : start + count].to(self.dtype)
        x = F.pad(x, (0, 0, 0, count - x.shape[1]))
        return x.unflatten(1, (self.groups, GROUP)).movedim(2, 0).contiguous()

    def store(self, out: Tensor, x: Tensor) -> None:
        """Write x, as tokens gives it, where it belongs in out [B, T, …]."""
        rows = out[self.batch, self.first * GROUP : (self.first + self.groups) * GROUP]
        rows.copy_(x.movedim(0, 2).flatten(1, 2)[:, : rows.shape[1]])


class Blocks:
    """What advances together: as many groups as TOGETHER holds, of one sequence or, if those are few, of several."""

    def __init__(self, u: Tensor, A: Tensor):
        self.batch, T, _ = u.shape
        self.dtype = accumulator(u)
        self.groups = -(-T // GROUP)
        room = max(1, TOGETHER // A.numel())
        self.width = max(1, min(self.groups, room))
        self.height = max(1, room // self.width)

    def forwards(self) -> Iterator[Block]:
        for b in range(0, self.batch, self.height):
            for g in range(0, self.groups, self.width):
                yield Block(slice(b, b + self.height), g, min(self.width, self.groups - g), self.dtype)

    def backwards(self) -> Iterator[Block]:
        return reversed(list(self.forwards()))


class Steps:
    """The decays e^{ΔA} of a block, [GROUP, sequences, groups, N, E], and what its inputs are weighted with."""

    def __init__(self, block: Block, delta: Tensor, A: Tensor, zoh: bool):
        self.delta = block.tokens(delta)
        self.zoh = zoh
        self.A = A.to(block.dtype).mT.contiguous()
        if zoh:
            # (e^{ΔA} − 1)/A without a case for A = 0: so small an A gives Δ to the last bit
            tiny = math.sqrt(torch.finfo(block.dtype).tiny)
            self.A = torch.where(self.A.abs() < tiny, -tiny, self.A)
        self.exponent = self.delta[..., None, :] * self.A
        self.decay = self.exponent.exp()
        self.held = self.exponent.expm1().div_(self.A) if zoh else self.delta[..., None, :]
        # e^{ΣΔA}: from before each group's first token to its last
        # along contiguous tokens: over a leading axis the order of a sum moves with the other axes
        length = self.delta.movedim(0, -1).contiguous().sum(-1)
        self.across = (length[..., None, :] * self.A).exp_()

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.across)

    def inputs(self, t: int, u: Tensor, b: Tensor, out: Tensor) -> None:
        """B̄_t u_t."""
        if self.zoh:
            torch.mul(self.held[t], u[..., None, :], out=out)
            out.mul_(b[..., None])
        else:
            torch.mul((self.delta[t] * u)[..., None, :], b[..., None], out=out)

    def held_by_rate(self, t: int) -> Tensor:
        """∂/∂A (e^{ΔA} − 1)/A = Δ²·Σ_k k/(k + 1)!·(ΔA)^{k−1}, of token t."""
        x, delta = self.exponent[t], self.delta[t][..., None, :]
        terms = 15 if x.dtype == torch.float64 else 8
        series = torch.full_like(x, terms / math.factorial(terms + 1))
        for k in range(terms - 1, 0, -1):
            series.mul_(x).add_(k / math.factorial(k + 1))
        closed = (delta * self.decay[t]).sub_(self.held[t]).div_(self.A)
        return torch.where(x.abs() < NEAR, series.mul_(delta).mul_(delta), closed)


def sigmoid(x: Tensor) -> Tensor:
    """torch's own rounds the last entries of a tensor differently, wherever those lie."""
    return x.neg().exp_().add_(1).reciprocal_()

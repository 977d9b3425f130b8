"""The blocked torch path: masked base-2 scores of one head, tile by tile, every tile of one fixed shape."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import accumulator
from ._checks import Logits

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
BLOCK = 1024
# finite stand-ins for −inf: a running maximum starts above every forbidden score, so no difference is ever NaN
FLOOR, FORBIDDEN = -1e30, -2e30


class Head:
    """Scores of query head h of sequence b, in the accumulation dtype and in units of log 2.

    Ragged tails are padded with zeros to the full tile, so a row's bits depend on nothing but its own sequence.
    """

    def __init__(self, q: Tensor, k: Tensor, logits: Logits, b: int, h: int):
        self.logits, self.b, self.h = logits, b, h
        self.dtype = accumulator(q)
        self.T, self.S = q.shape[2], k.shape[2]
        # log2e rides on q unless a softcap or a bias has to see natural units first
        self.natural = logits.softcap > 0 or logits.bias is not None
        self.q = padded(q[b, h].to(self.dtype) * (logits.scale * (1.0 if self.natural else LOG2E)), BLOCK)
        self.k = padded(k[b, h // (q.shape[1] // k.shape[1])].to(self.dtype), BLOCK)
        row = b if logits.start.shape[0] > 1 else 0
        self.start = padded(logits.start[row, :, None], BLOCK)  # [T rounded up, 1]
        self.stop = padded(logits.stop[row, :, None], BLOCK)
        self.keys = torch.arange(self.k.shape[0], device=q.device)
        self._x = self.q.new_empty(BLOCK, BLOCK)
        self._bounds = None if q.is_cuda else _bounds(self.start, self.stop, self.T)

    def normalizer(self, m_i: Tensor, l_i: Tensor) -> tuple[Tensor, Tensor]:
        """From a row's maximum and sum, with the learned sink: its lse in base 2 and exp2(m_i − lse), in float64."""
        m_i, empty = m_i.double(), l_i == 0
        sink = m_i if self.logits.sink is None else self.logits.sink[self.h].double() * LOG2E
        pivot = torch.maximum(m_i, sink)
        total = l_i * torch.exp2(m_i - pivot)
        if self.logits.sink is not None:
            total += torch.exp2(sink - pivot)
        lse = (torch.log2(total) + pivot).masked_fill(empty, -torch.inf)
        return lse, torch.exp2(m_i - lse.masked_fill(empty, torch.inf))

    def row_blocks(self) -> range:
        return range(0, self.T, BLOCK)

    def key_blocks(self, m: int) -> Iterator[int]:
        """First keys of the tiles that some row of block m may attend; on a GPU, where values are unknown, of all."""
        low, high = (0, self.S) if self._bounds is None else self._bounds[m // BLOCK][:2]
        return iter(range(low // BLOCK * BLOCK, high, BLOCK))

    def seen(self, m: int, n: int) -> Tensor | None:
        """bool [BLOCK, BLOCK], or None where every row may attend every key of the tile."""
        if self._bounds is not None:
            inner_low, inner_high = self._bounds[m // BLOCK][2:]
            if inner_low <= n and n + BLOCK <= inner_high:
                return None
        keys = self.keys[n : n + BLOCK]
        return (keys >= self.start[m : m + BLOCK]) & (keys < self.stop[m : m + BLOCK])

    def scores(self, m: int, n: int) -> Tensor:
        """Masked scores [BLOCK, BLOCK] of rows m… and keys n…, in a buffer that the next call overwrites."""
        x = torch.mm(self.q[m : m + BLOCK], self.k[n : n + BLOCK].T, out=self._x)
        if self.natural:
            x = self._shape(x, m, n)
        seen = self.seen(m, n)
        return x if seen is None else x.masked_fill_(~seen, FORBIDDEN)

    def _shape(self, x: Tensor, m: int, n: int) -> Tensor:
        softcap, bias = self.logits.softcap, self.logits.bias
        if softcap > 0:
            x.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            tile = bias[self.b, self.h, m : m + BLOCK, n : n + BLOCK]
            x[: tile.shape[0], : tile.shape[1]] += tile
            x.clamp_(min=FORBIDDEN)
        return x.mul_(LOG2E)


def heads(q: Tensor, k: Tensor, logits: Logits) -> Iterator[Head]:
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            yield Head(q, k, logits, b, h)


def padded(x: Tensor, block: int) -> Tensor:
    """x with zero rows appended up to a multiple of block."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block))


def _bounds(start: Tensor, stop: Tensor, T: int) -> list[list[int]]:
    """Of each block of rows: the first and last key some row may attend, then those that every row may attend."""
    filled = (stop > start)[:, 0]
    rows = torch.arange(len(start)) < T
    start, stop = start[:, 0], stop[:, 0]
    parts = (
        torch.where(filled, start, 2**31 - 1).view(-1, BLOCK).amin(1),
        stop.view(-1, BLOCK).amax(1),
        torch.where(rows, start, 0).view(-1, BLOCK).amax(1),
        torch.where(rows, stop, 2**31 - 1).view(-1, BLOCK).amin(1),
    )
    return torch.stack(parts, 1).tolist()

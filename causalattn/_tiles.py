"""The blocked torch path: masked scores of one head, tile by tile, every tile of one fixed shape."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import accumulator
from ._checks import Logits
from ._seen import Seen, seen_patterns, zero_where_zero_

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
BLOCK = 512
# finite stand-ins for −inf: a running maximum starts above every forbidden score, so no difference is ever NaN
FLOOR, FORBIDDEN = -1e20, -1e33
SMALLEST_UNIT = 1e-12


class Head:
    """Scores of query head h of sequence b in the accumulation dtype; unit times a score is in units of log 2.

    Ragged tails are padded with zeros to the full tile, so a row's bits depend on nothing but its own sequence.
    """

    def __init__(
        self, q: Tensor, k: Tensor, logits: Logits, b: int, h: int, patterns: Callable[[Tensor, Tensor], Seen]
    ):
        self.logits, self.b, self.h = logits, b, h
        self.dtype = accumulator(q)
        self.T, self.S = q.shape[2], k.shape[2]
        # the unit is positive and joins where a maximum is subtracted, in one rounding; q keeps the sign, exactly
        # times a tiny unit what is forbidden would not be far
        extras = logits.softcap > 0 or logits.bias is not None or logits.slopes is not None
        self.shaped = extras or abs(logits.scale) < SMALLEST_UNIT
        self.unit = LOG2E if self.shaped else abs(logits.scale) * LOG2E
        self.q = padded(q[b, h].to(self.dtype) * (logits.scale > 0 or -(logits.scale < 0)), BLOCK)
        self.k = padded(k[b, h // (q.shape[1] // k.shape[1])].to(self.dtype), BLOCK)
        row = b if logits.start.shape[0] > 1 else 0
        self.start = padded(logits.start[row, :, None], BLOCK)  # [T rounded up, 1]
        self.stop = padded(logits.stop[row, :, None], BLOCK)
        self.bias = None if logits.bias is None else logits.bias.expand(*q.shape[:3], self.S)[b, h]
        self.slope = None if logits.slopes is None else logits.slopes.expand(*q.shape[:2])[b, h].to(self.dtype)
        self.keys = torch.arange(self.k.shape[0], device=q.device)
        self.ceiling: Tensor | None = None
        self._x, self._mirror = self.q.new_empty(2, BLOCK, BLOCK)
        self._bounds = None if q.is_cuda else _bounds(self.start, self.stop, self.T)
        self._patterns, self._last = patterns, (None, None, None)

    def normalizer(self, m_i: Tensor, l_i: Tensor) -> tuple[Tensor, Tensor]:
        """As `normalizer`, with the head's learned sink."""
        return normalizer(m_i, l_i, None if self.logits.sink is None else self.logits.sink[self.h])

    def row_blocks(self) -> range:
        return range(0, self.T, BLOCK)

    def key_blocks(self, m: int) -> range:
        """First keys of the tiles that some row of block m may attend; on a GPU, where values are unknown, of all."""
        low, high = (0, self.S) if self._bounds is None else self._bounds[m // BLOCK][:2]
        return range(low // BLOCK * BLOCK, high, BLOCK)

    def reached(self, m: int, n: int) -> bool:
        """Whether some row of block m may attend some key of block n."""
        return self._bounds is None or n in self.key_blocks(m)

    def seen(self, m: int, n: int) -> Seen | None:
        """Which keys n… the rows m… may attend; None where every row may attend every key of the tile."""
        if self._bounds is not None:
            inner_low, inner_high = self._bounds[m // BLOCK][2:]
            if inner_low <= n and n + BLOCK <= inner_high:
                return None
        if self._last[:2] != (m, n):
            start, stop = ((bound[m : m + BLOCK] - n).clamp_(0, BLOCK) for bound in (self.start, self.stop))
            self._last = m, n, self._patterns(start, stop)
        return self._last[2]

    def scores(self, m: int, n: int, transposed: bool = False) -> Tensor:
        """Masked scores of rows m… and keys n…, [BLOCK, BLOCK], keys first if transposed.

        The buffer is this head's, one for each orientation: the next call overwrites it.
        """
        rows, keys = self.q[m : m + BLOCK], self.k[n : n + BLOCK]
        if transposed:
            x = torch.mm(keys, rows.T, out=self._mirror)
        else:
            x = torch.mm(rows, keys.T, out=self._x)
        seen = self.seen(m, n)
        if self.shaped:
            self._shape(x.T if transposed else x, m, n)
        if seen is not None:
            seen.forbid_(x, transposed)
        if self.ceiling is not None:
            x.masked_fill_(self.above(x, m), FORBIDDEN)
        return x

    def leave_out(self, ceiling: Tensor) -> None:
        """Forbid what lies above ceiling [T], which is in base 2: of some rows one score, ∞ for the others."""
        self.ceiling = padded(ceiling[:, None] / self.unit, BLOCK)

    def above(self, x: Tensor, m: int) -> Tensor:
        return x > self.ceiling[m : m + BLOCK]

    def exponents(self, x: Tensor, pivot: Tensor) -> Tensor:
        """unit · x − pivot, in place; pivot broadcasts, in base 2."""
        return torch.add(-pivot, x, alpha=self.unit, out=x)

    def probs(self, m: int, n: int, pivot: Tensor, largest: Tensor) -> Tensor:
        """A of rows m… and keys n…, [BLOCK, BLOCK], in the buffer of `scores`; pivot and largest are columns."""
        return self.exponents(self.scores(m, n), pivot).exp2_().mul_(largest)

    def _shape(self, x: Tensor, m: int, n: int) -> None:
        softcap = self.logits.softcap
        x.mul_(abs(self.logits.scale))
        if softcap > 0:
            x.div_(softcap).tanh_().mul_(softcap)
        if self.bias is not None:
            tile = self.bias[m : m + BLOCK, n : n + BLOCK]
            x[: tile.shape[0], : tile.shape[1]] += tile
            x.clamp_(min=FORBIDDEN)
        if self.slope is not None:
            positions = torch.arange(m, m + BLOCK, device=x.device) + self.logits.offset
            x.sub_((positions[:, None] - self.keys[n : n + BLOCK]).abs_() * self.slope)


def normalizer(m_i: Tensor, l_i: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """From a row's maximum in base 2 and its sum, with a sink: its lse in base 2 and exp2(m_i − lse), in float64."""
    m_i, empty = m_i.double(), l_i == 0
    sink = None if sink is None else sink.double() * LOG2E
    pivot = m_i if sink is None else torch.maximum(m_i, sink)
    total = l_i * torch.exp2(m_i - pivot)
    if sink is not None:
        total += torch.exp2(sink - pivot)
    lse = (torch.log2(total) + pivot).masked_fill(empty, -torch.inf)
    return lse, torch.exp2(m_i - lse.masked_fill(empty, torch.inf))


def heads(q: Tensor, k: Tensor, logits: Logits) -> Iterator[Head]:
    """Every head of every sequence, autocast off while they are gone through: it would round products to 16 bits."""
    patterns = seen_patterns(BLOCK, accumulator(q), FORBIDDEN)
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                yield Head(q, k, logits, b, h, patterns)


class ScoreGradients:
    """Gradients of q, k and, if asked for, bias, in the accumulation dtype, from those of tiles of masked scores."""

    def __init__(self, q: Tensor, k: Tensor, logits: Logits, bias: bool):
        self.q, self.k = (x.new_zeros(x.shape, dtype=accumulator(x)) for x in (q, k))
        self.bias = logits.bias.new_zeros(logits.bias.shape, dtype=accumulator(q)) if bias else None

    def add(self, head: Head, m: int, n: int, grad: Tensor) -> None:
        """Take in the gradient of rows m… and keys n…, [BLOCK, BLOCK], 0 where forbidden; it is overwritten."""
        b, h, group = head.b, head.h, head.h // (self.q.shape[1] // self.k.shape[1])
        q, k, scale = head.q[m : m + BLOCK], head.k[n : n + BLOCK], abs(head.logits.scale)
        if self.bias is not None:
            self._add_to_bias(b, h, m, n, grad[: head.T - m, : head.S - n])
        if head.logits.softcap > 0:
            t = torch.tanh(q @ k.T * (scale / head.logits.softcap))
            # 0 · NaN must not leak from padding
            grad.mul_(zero_where_zero_((1 - t).mul_(1 + t), grad))
        seen = head.seen(m, n)
        if seen is not None:
            q, k = q.masked_fill(~seen.rows, 0), k.masked_fill(~seen.keys, 0)
        # products of whole tiles: of ragged ones the bits would depend on how far the tail is padded
        self.q[b, h, m : m + BLOCK] += (grad @ k)[: head.T - m] * head.logits.scale
        self.k[b, group, n : n + BLOCK] += (grad.T @ q)[: head.S - n] * scale

    def _add_to_bias(self, b: int, h: int, m: int, n: int, grad: Tensor) -> None:
        B, H, T, S = self.bias.shape
        rows, keys = (slice(i, i + BLOCK) if size > 1 else slice(1) for i, size in ((m, T), (n, S)))
        tile = self.bias[b if B > 1 else 0, h if H > 1 else 0, rows, keys]
        tile += grad.sum_to_size(tile.shape)


def sink_gradient(sink: Tensor, pivot: Tensor, largest: Tensor, delta: Tensor, exact: bool) -> Tensor:
    """−Σ_i e^{sink − lse_i} δ_i of each head over the rows that may attend something.

    δ_i = Σ_j A_ij ∂L/∂A_ij − ∂L/∂lse_i; exact: the forward took sink · log2 e in float64.
    """
    # with the rounding that largest has seen, which is a large one of a large sink
    above = (sink.to(torch.float64 if exact else torch.float32) * LOG2E)[:, None] - pivot
    # beyond 64 the sink takes all, and largest may have lost its digits
    taken = torch.where(above > 64, 1, torch.exp2(above.double()) * largest)
    return -(taken * delta).masked_fill(pivot <= FLOOR, 0).sum((0, 2)).to(sink.dtype)


def row_factors(head: Head, pivot: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Of A = exp2(x − pivot)·largest, the factors of one head's rows as columns, 0 where rows fill up a tile."""
    return tuple(padded(x[head.b, head.h, :, None].to(head.dtype), BLOCK) for x in (pivot, largest))


def reached_values(values: Tensor, seen: Seen | None) -> Tensor:
    """values with the rows that no query of the tile may attend set to 0: 0 · NaN must not leak from padding."""
    return values if seen is None else values.masked_fill(~seen.keys, 0)


def padded(x: Tensor, block: int) -> Tensor:
    """x with zero rows appended up to a multiple of block, x itself where it is one and contiguous."""
    missing = -x.shape[0] % block
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _bounds(start: Tensor, stop: Tensor, T: int) -> list[list[int]]:
    """Of each block of rows: the first and last key some row may attend, then those that every row may attend."""
    shape = (len(start) // BLOCK, BLOCK)
    start, stop = start.view(shape), stop.view(shape)
    real = (torch.arange(start.numel()) < T).view(shape)
    far = torch.iinfo(torch.int32).max
    parts = (
        torch.where(stop > start, start, far).amin(1),
        stop.amax(1),
        torch.where(real, start, 0).amax(1),
        torch.where(real, stop, far).amin(1),
    )
    return torch.stack(parts, 1).tolist()

"""Rows of P = exp2(score − pivot), times unit where it is given, of one head: by blocked torch or by the kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import Logits
from .._tiles import BLOCK, Head
from .gram import block_and_tile, center_panel, multiply

FAR = 2**31 - 1


class HeadRows:
    """Tile by tile, as every operator of the torch path forms them; hull [2] with center: the keys a mean is over."""

    block = chunk = BLOCK

    def __init__(self, head: Head, pivot: Tensor, unit: Tensor | None, hull: Tensor | None):
        self.head, self.hull = head, hull
        self.T, self.width = head.T, len(head.k)
        self.tile = min(BLOCK, block_and_tile(head.q, False)[1])
        self.pivot, self.unit = (None if x is None else x[head.b, head.h, :, None] for x in (pivot, unit))
        # where they cannot be read, all of them
        known = hull is not None and not hull.is_cuda
        self.keys = range(0, self.width, BLOCK)
        if known:
            low, high = hull.tolist()
            self.keys = range(low // BLOCK * BLOCK, high, BLOCK)

    def fill(self, panel: Tensor, first: int) -> None:
        for m in range(first, min(first + len(panel), self.T), BLOCK):
            rows = slice(m, min(m + BLOCK, self.T))
            count, keys = rows.stop - m, self.head.key_blocks(m)
            p = panel[m - first :][:BLOCK]
            p[:, : keys.start].zero_()
            p[:, keys[-1] + BLOCK if keys else keys.start :].zero_()
            p[count:].zero_()
            for n in keys:
                x = self.head.exponents(self.head.scores(m, n)[:count], self.pivot[rows]).exp2_()
                p[:count, n : n + BLOCK] = x if self.unit is None else x.mul_(self.unit[rows])
        if self.hull is not None:
            center_panel(panel, self.hull, self.block, self.chunk)

    def chunks(self, m: int, n: int) -> range:
        if self.hull is not None:
            return self.keys
        a, b = self.head.key_blocks(m), self.head.key_blocks(n)
        return range(max(a.start, b.start), min(a.stop, b.stop), BLOCK)

    def multiply(self, C: Tensor, left: Tensor, right: Tensor, m: int, n: int, add: bool) -> None:
        multiply(self, C, left, right, m, n, add)


class KernelRows:
    """Written by the kernel; causal: row i attends no key after offset + i, which here cannot be read from stop."""

    def __init__(
        self, q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, unit: Tensor | None, hull: Tensor | None,
        causal: bool, b: int, h: int,
    ):  # fmt: skip
        self.T, self.S = q.shape[2], k.shape[2]
        self.block, self.tile = block_and_tile(q, True)
        self.chunk = self.block
        self.width = -(-self.S // self.chunk) * self.chunk
        self.hull, self.causal, self.offset = hull, causal, logits.offset
        row = b if len(logits.start) > 1 else 0
        self.start, self.stop = logits.start[row], logits.stop[row]
        bias = None if logits.bias is None else logits.bias.expand(*q.shape[:3], self.S)[b, h]
        slope = None if logits.slopes is None else logits.slopes.expand(*q.shape[:2])[b, h]
        self.arguments = (
            q[b, h], k[b, h // (q.shape[1] // k.shape[1])], self.start, self.stop, logits.offset, bias, slope,
            logits.scale, logits.softcap, pivot[b, h], None if unit is None else unit[b, h],
        )  # fmt: skip
        self.bounds: tuple[Tensor, Tensor] | None = None

    def fill(self, panel: Tensor, first: int) -> None:
        from ..kernels.covariance.panel import panel_fwd

        panel_fwd(*self.arguments, first, panel)
        if self.hull is not None:
            center_panel(panel, self.hull, self.block, self.chunk)

    def chunks(self, m: int, n: int) -> range:
        last = self.S
        if self.causal and self.hull is None:
            last = min(last, max(0, self.offset + m + self.tile))
        return range(0, last, self.chunk)

    def multiply(self, C: Tensor, left: Tensor, right: Tensor, m: int, n: int, add: bool) -> None:
        if C.dtype == torch.float64:
            multiply(self, C, left, right, m, n, add)
        else:
            from ..kernels.covariance.products import products_fwd

            if self.bounds is None:
                self.bounds = self._bounds()
            products_fwd(left, right, *self.bounds, C, m, n, add)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The first and one past the last key that some row of each block may attend, [blocks] int32."""
        from ..kernels.covariance.products import TILE

        missing = -self.T % self.block
        low = F.pad(torch.where(self.stop > self.start, self.start, FAR), (0, missing), value=FAR)
        low, high = low.view(-1, TILE).amin(1), F.pad(self.stop, (0, missing)).view(-1, TILE).amax(1)
        if self.hull is not None:
            low, high = (bound.expand_as(low).contiguous() for bound in self.hull)
        return low, high

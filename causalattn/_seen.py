"""Who may attend whom within one tile, as bits: what torch compares and fills an element at a time goes in vectors."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# made once for all heads and all tiles along a diagonal: as many as a causal or a sliding mask of any length has
PATTERNS = 4
WORD = {torch.float32: torch.int32, torch.float64: torch.int64}


class Seen:
    """Row i of a tile of `block` keys may attend keys start_i ≤ j < stop_i, [rows, 1] int32, counted from its first.

    rows [rows, 1] and keys [block, 1], bool: those with any key to attend, and those with any row that may.
    """

    def __init__(self, start: Tensor, stop: Tensor, block: int, dtype: torch.dtype, forbidden: float):
        keys = torch.arange(block, dtype=torch.int32, device=start.device)
        # both differences are negative within the interval, and the sign is shifted over all bits
        bits = (keys - stop).bitwise_and_(start - 1 - keys).bitwise_right_shift_(31)
        self.rows, self.keys = bits.amin(1, keepdim=True).bool(), bits.amin(0)[:, None].bool()
        self.bits = bits.to(WORD[dtype])
        forbidden_word = torch.full((), forbidden, dtype=dtype, device=bits.device).view(WORD[dtype])
        self._fill = forbidden_word & ~self.bits

    def forbid_(self, x: Tensor, transposed: bool = False) -> None:
        """Put the forbidden score where no row may attend, whatever was there; x has keys first if transposed."""
        bits, fill = self._mirrored if transposed else (self.bits, self._fill)
        x.view(bits.dtype).bitwise_and_(bits).bitwise_or_(fill)

    def dense(self) -> Tensor:
        """bool [rows, block]."""
        return self.bits.bool()

    @functools.cached_property
    def _mirrored(self) -> tuple[Tensor, Tensor]:
        return self.bits.T.contiguous(), self._fill.T.contiguous()


def seen_tiles(block: int, dtype: torch.dtype, forbidden: float) -> Callable[[Tensor, Tensor], Seen]:
    """`Seen` of start and stop, which on a CPU is made once for those that are alike."""

    @functools.lru_cache(maxsize=PATTERNS)
    def of_bytes(start: bytes, stop: bytes) -> Seen:
        bounds = (torch.frombuffer(bytearray(x), dtype=torch.int32)[:, None] for x in (start, stop))
        return Seen(*bounds, block, dtype, forbidden)

    def of(start: Tensor, stop: Tensor) -> Seen:
        if start.is_cuda:
            return Seen(start, stop, block, dtype, forbidden)
        return of_bytes(start.numpy().tobytes(), stop.numpy().tobytes())

    return of


def zero_where_zero_(x: Tensor, p: Tensor) -> Tensor:
    """x with 0 where p is 0, whatever was there: 0 · NaN must not leak."""
    words, like = x.view(WORD[x.dtype]), p.view(WORD[p.dtype])
    # the sign of one of n and −n is set unless n is 0
    words.bitwise_and_((-like).bitwise_or_(like).bitwise_right_shift_(8 * x.element_size() - 1))
    return x

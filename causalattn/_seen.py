"""Who may attend whom within one tile, as bits: comparisons and fills with bools go an element at a time on a CPU."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# kept for all heads and for tiles along a diagonal: a causal mask has up to 4, most sliding windows have no more
PATTERNS = 8
WORD = {torch.float32: torch.int32, torch.float64: torch.int64}


class Seen:
    """Row i of a tile may attend keys start_i ≤ j < stop_i, [rows, 1] int32, counted from the tile's first key."""

    def __init__(self, start: Tensor, stop: Tensor, block: int, dtype: torch.dtype, forbidden: int):
        """forbidden: the bits of the score that stands for none."""
        keys = torch.arange(block, dtype=torch.int32, device=start.device)
        # both differences are negative within the interval, and the sign is shifted over all bits
        bits = (keys - stop).bitwise_and_(start - 1 - keys).bitwise_right_shift_(31)
        self.bits = bits.to(WORD[dtype])
        self._fill = ~self.bits & forbidden

    @functools.cached_property
    def rows(self) -> Tensor:
        """Those with any key to attend, bool [rows, 1]."""
        return self.bits.amin(1, keepdim=True).bool()

    @functools.cached_property
    def keys(self) -> Tensor:
        """Those that any row may attend, bool [block, 1]."""
        return self.bits.amin(0)[:, None].bool()

    def dense(self) -> Tensor:
        """bool [rows, block]."""
        return self.bits.bool()

    def forbid_(self, x: Tensor, transposed: bool = False) -> None:
        """Put the forbidden score where no row may attend, whatever was there; x has keys first if transposed."""
        bits, fill = self._mirrored if transposed else (self.bits, self._fill)
        x.view(bits.dtype).bitwise_and_(bits).bitwise_or_(fill)

    @functools.cached_property
    def _mirrored(self) -> tuple[Tensor, Tensor]:
        return self.bits.T.contiguous(), self._fill.T.contiguous()


def seen_patterns(block: int, dtype: torch.dtype, forbidden: float) -> Callable[[Tensor, Tensor], Seen]:
    """`Seen` of start and stop, which on a CPU is made once for tiles that are alike."""
    word = torch.tensor(forbidden, dtype=dtype, device="cpu").view(WORD[dtype]).item()

    @functools.lru_cache(maxsize=PATTERNS)
    def remembered(start: bytes, stop: bytes) -> Seen:
        bounds = (torch.frombuffer(bytearray(x), dtype=torch.int32)[:, None] for x in (start, stop))
        return Seen(*bounds, block, dtype, word)

    def pattern(start: Tensor, stop: Tensor) -> Seen:
        if start.is_cuda:
            return Seen(start, stop, block, dtype, word)
        return remembered(start.numpy().tobytes(), stop.numpy().tobytes())

    return pattern


def zero_where_zero_(x: Tensor, p: Tensor) -> Tensor:
    """x with 0 where p is +0, whatever was there: 0 · NaN must not leak."""
    words, p_words = x.view(WORD[x.dtype]), p.view(WORD[p.dtype])
    # 1 or 0 in p's own width: into bools a comparison is slow
    words.mul_(torch.ne(p_words, 0, out=torch.empty_like(p_words)))
    return x

"""Masked scores of this rank's queries on the keys of any rank, and what is put together from such blocks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, use_triton
from .._checks import Logits, check_qk, resolve_logits, resolve_mask
from .._tiles import FLOOR, LN2, normalizer
from ..masks import Intervals, Mask, normal
from .layout import Layout, Order, Span, check_order, layout_of
from .ring import Ring


class Block(NamedTuple):
    """Some of this rank's rows on some keys of a visiting rank, as slices of what each holds, and their scores."""

    rows: slice
    keys: slice
    logits: Logits
    a: Span
    b: Span


class Blocks:
    """The arguments that every operator of a sharded sequence shares, checked; intervals are those of all T tokens."""

    def __init__(
        self, name: str, q: Tensor, k: Tensor, mesh: DeviceMesh, order: Order, causal: bool,
        mask: Mask | Intervals | None, alibi_slopes: Tensor | None, scale: float | None, softcap: float | None,
        sink: Tensor | None, backend: Backend, check: Callable[[], dict[str, object]] = dict,
    ):  # fmt: skip
        """check raises what is wrong with the operator's other arguments, or says what must be alike on every rank."""
        self.ring = Ring(mesh)

        def check_own() -> dict[str, object]:
            check_qk(q, k)
            if q.shape[2] != k.shape[2]:
                raise ValueError(f"k must have q's {q.shape[2]} tokens on each rank, got {k.shape[2]}")
            check_no_gradient(q, k, sink)
            check_order(order)
            use_triton(backend, q)
            if not isinstance(mask, Mask | Intervals | None):
                raise TypeError(f"mask must be a causalattn Mask or Intervals, got {type(mask).__name__}")
            nobody = Intervals(*torch.zeros(3, 1, q.shape[2], dtype=torch.int32, device=q.device), 0)
            options = {"bias": None, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
            self.local = resolve_logits(q, k, nobody, **options)
            B, H, _, D = q.shape
            same = {"the batch": B, "heads": H, "key heads": k.shape[1], "the head dim": D, "dtype": q.dtype}
            same |= {"order": order, "causal": causal, "scale": self.local.scale, "softcap": self.local.softcap}
            same |= {name: x is not None for name, x in (("alibi_slopes", alibi_slopes), ("sink", sink))}
            return same | {"backend": backend} | check()

        self.layout = layout_of(self.ring, self.ring.agree(name, tokens_of(q), check_own), order)
        self.order = order
        # a mask is of all tokens, of which each rank holds some
        every = q.new_empty(()).expand(q.shape[0], 1, self.layout.T, 1)
        if isinstance(mask, Intervals) and (mask.offset or mask.start.shape[-1] != self.layout.T):
            got = f"{list(mask.start.shape)} from position {mask.offset}"
            raise ValueError(f"mask must be for the {self.layout.T} tokens of all ranks, from position 0, got {got}")
        self.intervals = resolve_mask(every, every, mask, causal)
        self.sink = self.local.sink
        self._reach = _reached(self.intervals, self.layout)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.layout.lengths

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor over all T."""
        spans = self.layout.spans[self.ring.rank]
        return torch.cat([x.narrow(dim, span.first, span.stop - span.first) for span in spans], dim)

    def with_mask(self, intervals: Intervals) -> "Blocks":
        """The same scores under another mask of all T tokens."""
        twin = object.__new__(Blocks)
        twin.__dict__ |= self.__dict__ | {"intervals": intervals, "_reach": _reached(intervals, self.layout)}
        return twin

    def met(self, *tensors: Tensor) -> Iterator[tuple[Block, list[Tensor]]]:
        """Every block, with the part of the visiting rank's tensors that belongs to its keys."""
        for owner, held in self.ring.visits(tensors, self.lengths):
            for block in self.of(owner):
                yield block, [x[:, :, block.keys] for x in held]

    def of(self, owner: int) -> Iterator[Block]:
        """Every block of this rank's rows and owner's keys in which some row may attend some key."""
        for a in self.layout.spans[self.ring.rank]:
            for b in self.layout.spans[owner]:
                if self.reached(a, b):
                    yield Block(a.local, b.local, self.logits(a, b), a, b)

    def reached(self, a: Span, b: Span) -> bool:
        """Whether some row of one span may attend some key of another."""
        return self._reach[a, b]

    def logits(self, a: Span, b: Span) -> Logits:
        """Scores of the rows of one span on the keys of another, without the learned sink."""
        start, stop = (
            (x[:, a.first : a.stop] - b.first).clamp(0, b.stop - b.first)
            for x in (self.intervals.start, self.intervals.stop)
        )
        start, stop, _, offset = normal(start, stop, start, a.first - b.first)
        return self.local._replace(start=start, stop=stop, offset=offset, sink=None)


class Softmax:
    """Of each row the sums over the blocks met so far, relative to its largest score so far, in float64.

    `add` takes a block's maximum, in base 2, and its largest probability, and says by which factors sums of its rows
    and those so far are to be multiplied.
    """

    def __init__(self, like: Tensor):
        self.pivot = torch.full(like.shape[:3], FLOOR, dtype=torch.float64, device=like.device)
        self.total = torch.zeros_like(self.pivot)

    def add(self, rows: slice, pivot: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what the block's sums count, what the sums so far still count, by how much the maximum grew, base 2)."""
        before, pivot = self.pivot[:, :, rows], pivot.double()
        m = torch.maximum(before, pivot)
        grown = m - before
        kept = torch.exp2(-grown)
        # where a row may attend no key of the block, its largest probability is 0; a NaN stays
        part = torch.where(largest == 0, 0, torch.exp2(pivot - m) / largest.double())
        self.total[:, :, rows] = self.total[:, :, rows] * kept + part
        self.pivot[:, :, rows] = m
        return part, kept, grown

    def result(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """lse, natural, and the largest probability: what sums so far are to be multiplied by."""
        lse, unit = normalizer(self.pivot, self.total, None if sink is None else sink[:, None])
        return lse * LN2, unit


def tokens_of(x: object, axis: int = 2) -> int:
    """How many tokens a tensor holds that nobody has checked yet."""
    return x.shape[axis] if isinstance(x, Tensor) and x.ndim > axis else 0


def check_no_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError("a sharded sequence has no gradient: pass detached tensors, as q.detach()")


def _reached(intervals: Intervals, layout: Layout) -> dict[tuple[Span, Span], bool]:
    """In which pairs of spans some row may attend some key: the one look at values."""
    spans = [span for own in layout.spans for span in own]
    filled = [span for span in spans if span.stop > span.first]
    start = torch.where(intervals.stop > intervals.start, intervals.start, layout.T)
    edges = [(start[:, a.first : a.stop].amin(), intervals.stop[:, a.first : a.stop].amax()) for a in filled]
    bounds = dict(
        zip(filled, torch.stack([torch.stack(edge) for edge in edges]).tolist() if edges else (), strict=True)
    )
    none = layout.T, 0
    return {
        (a, b): low < b.stop and b.first < high and b in bounds
        for a, (low, high) in ((a, bounds.get(a, none)) for a in spans)
        for b in spans
    }

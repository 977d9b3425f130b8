"""Which tokens each rank holds: a run of them, or one from either end so that a causal mask gives all the same work."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .ring import Ring

Order = Literal["contiguous", "zigzag"]
ORDERS = ("contiguous", "zigzag")


class Span(NamedTuple):
    """Tokens first ≤ t < stop of the sequence, which begin at `at` in the tensors of the rank that holds them."""

    first: int
    stop: int
    at: int

    @property
    def local(self) -> slice:
        return slice(self.at, self.at + self.stop - self.first)


class Layout(NamedTuple):
    """T tokens over the ranks: how many each holds, and which."""

    T: int
    lengths: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]


def check_order(order: Order) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be 'contiguous' or 'zigzag', got {order!r}")


def layout_of(ring: Ring, counts: list[int], order: Order) -> Layout:
    """From how many tokens each rank holds; "contiguous" takes any numbers, "zigzag" those that `shard` gives."""
    layout = _layout(sum(counts), ring.size, order, tuple(counts))
    if layout.lengths != tuple(counts):
        raise ValueError(
            f"order='zigzag' needs {list(layout.lengths)} of {layout.T} tokens on the ranks, as shard gives, "
            f"got {counts}"
        )
    return layout


def shard(x: Tensor, *, mesh: DeviceMesh, order: Order = "contiguous", dim: int = 2) -> Tensor:
    """This rank's part of a tensor that every rank has: tokens along dim.

    Args:
        x: any tensor, the same shape on every rank.
        mesh: one axis, the ranks that share the sequence.
        order: "contiguous", T / W tokens each, the first ranks one more where W does not divide T; "zigzag", of 2 W
            such runs the r-th and the r-th from the end, so that under a causal mask every rank has the same work.
        dim: the axis of the tokens.

    Returns:
        A tensor of its own, not a view.

    Raises:
        ValueError: an unknown order, or a mesh of more than one axis. TypeError: mesh is no DeviceMesh.

    Source: zig-zag order as in Zhu's ring attention and PyTorch's context parallelism.
    """
    ring = Ring(mesh)
    check_order(order)
    _check_dim(dim, x)
    spans = _layout(x.shape[dim], ring.size, order).spans[ring.rank]
    return torch.cat([x.narrow(dim, span.first, span.stop - span.first) for span in spans], dim)


def unshard(x: Tensor, *, mesh: DeviceMesh, order: Order = "contiguous", dim: int = 2) -> Tensor:
    """The whole of what every rank holds a part of, in the order of the tokens, on every rank, without gradient.

    Args:
        x: this rank's part; the parts may differ in length along dim only.
        mesh, order, dim: as in `shard`.

    Raises:
        As shard; ValueError also where zig-zag parts are not as `shard` gives them.
    """
    ring = Ring(mesh)
    _check_dim(dim, x)
    dim %= x.ndim

    def check() -> dict[str, object]:
        check_order(order)
        return {"order": order, "dim": dim, "dtype": x.dtype, "the other axes": (*x.shape[:dim], *x.shape[dim + 1 :])}

    layout = layout_of(ring, ring.agree("unshard", x.shape[dim], check), order)
    return assembled(ring.gather_ragged(x.detach(), layout.lengths, dim), layout, dim)


def assembled(parts: list[Tensor], layout: Layout, dim: int) -> Tensor:
    """The parts of the ranks in the order of the tokens."""
    pieces = [
        (span.first, part.narrow(dim, span.at, span.stop - span.first))
        for part, spans in zip(parts, layout.spans, strict=True)
        for span in spans
    ]
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], dim)


def _layout(T: int, W: int, order: Order, lengths: tuple[int, ...] | None = None) -> Layout:
    if order == "contiguous":
        lengths = lengths or _sizes(T, W)
        firsts = [sum(lengths[:r]) for r in range(W)]
        return Layout(T, lengths, tuple((Span(a, a + n, 0),) for a, n in zip(firsts, lengths, strict=True)))
    sizes = _sizes(T, 2 * W)
    firsts = [sum(sizes[:n]) for n in range(2 * W)]
    spans = tuple(
        (
            Span(firsts[r], firsts[r] + sizes[r], 0),
            Span(firsts[-1 - r], firsts[-1 - r] + sizes[-1 - r], sizes[r]),
        )
        for r in range(W)
    )
    return Layout(T, tuple(sizes[r] + sizes[-1 - r] for r in range(W)), spans)


def _sizes(T: int, parts: int) -> tuple[int, ...]:
    return tuple(T // parts + (n < T % parts) for n in range(parts))


def _check_dim(dim: int, x: Tensor) -> None:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be in {-x.ndim}…{x.ndim - 1}, got {dim}")

"""Correlations A Aᵀ of a sequence that several ranks share: each rank has the rows of its tokens."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, use_triton
from .._checks import Logits
from .._tiles import heads
from ..attention.forward import attend
from ..covariance.gram import PANEL_BLOCKS, Rows
from ..covariance.rows import FAR, HeadRows, KernelRows
from ..masks import Intervals, Mask
from .blocks import Blocks
from .layout import Order, Span, assembled


def attention_covariance(
    q: Tensor,
    k: Tensor,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    sum_heads: bool = False,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The rows of C = A Aᵀ that belong to this rank's tokens, as `causalattn.attention_covariance`, in float64.

    All ranks gather the keys, O(T·D); queries and the maxima of their rows go around the ring, and each rank multiplies
    its rows of A with those of every other, panel by panel: C_ij on one rank and C_ji on another.

    Args:
        q, k, mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend: as in `attention` here.
        sum_heads: Σ_h C_h.

    Returns:
        [B, H, T_r, T], or [B, T_r, T] with sum_heads; columns are positions in the whole sequence.

    Raises:
        As `attention` here.
    """
    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("attention_covariance", q, k, *options, lambda: {"sum_heads": sum_heads})
    return _covariance(blocks, q, k, sum_heads, False, backend)[0]


def attention_correlation(
    q: Tensor,
    k: Tensor,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    sum_heads: bool = False,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """R_ij = C_ij / √(C_ii C_jj) of this rank's tokens i and all tokens j, as `causalattn.attention_correlation`.

    Args:
        q, k, mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend: as in `attention` here.
        sum_heads: the correlation of the sum.

    Returns:
        [B, H, T_r, T], or [B, T_r, T] with sum_heads, float64, the diagonal exactly 1, or 0 of an empty row. R_ij and
        R_ji, which two ranks have, may differ by a rounding.

    Raises:
        As `attention` here.
    """
    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("attention_correlation", q, k, *options, lambda: {"sum_heads": sum_heads})
    C, own = _covariance(blocks, q, k, sum_heads, not sum_heads, backend)
    places = own.expand(*C.shape[:-1])[..., None]
    diagonal = C.gather(-1, places)[..., 0]
    every = assembled(blocks.ring.gather_ragged(diagonal, blocks.lengths, diagonal.ndim - 1), blocks.layout, -1)
    deviation, others = diagonal.sqrt()[..., None], every.sqrt()[..., None, :]
    for rows, scale_of in zip(C.split(512, -2), deviation.split(512, -2), strict=True):
        product = scale_of * others
        rows.div_(product).masked_fill_(product == 0, 0)
    # a NaN stays
    return C.scatter_(-1, places, torch.where(diagonal > 0, 1, diagonal)[..., None])


def _covariance(
    blocks: Blocks, q: Tensor, k: Tensor, sum_heads: bool, scaled: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """C of this rank's rows, each by its largest probability unless scaled away, and the rows' positions."""
    ring, layout = blocks.ring, blocks.layout
    B, H, T, _ = q.shape
    C = q.new_empty((B, T, layout.T) if sum_heads else (B, H, T, layout.T), dtype=torch.float64)
    with torch.autocast(q.device.type, enabled=False):
        keys = assembled(ring.gather_ragged(k, layout.lengths, 2), layout, 2)
        own = q, *_factors(blocks, q, keys, backend)
        for owner, theirs in ring.visits(own, layout.lengths):
            for a in layout.spans[ring.rank]:
                for b in layout.spans[owner]:
                    for at in ((n, h) for n in range(B) for h in range(H)):
                        left, right = (
                            _HeadPart(blocks, held, keys, span, scaled, at, backend)
                            for held, span in ((own, a), (theirs, b))
                        )
                        target = C[at[0]] if sum_heads else C[at]
                        _multiply(target[a.local, b.first : b.stop], left, right, sum_heads and at[1] > 0)
    return C, blocks.own(torch.arange(layout.T, device=q.device), 0)


def _factors(blocks: Blocks, q: Tensor, keys: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """Of this rank's rows the largest score in base 2 and the largest probability."""
    found = [
        attend(q[:, :, a.local], keys, None, *_logits(blocks, a)._replace(sink=blocks.sink), None, backend)[2:4]
        for a in blocks.layout.spans[blocks.ring.rank]
    ]
    return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))


def _logits(blocks: Blocks, span: Span) -> Logits:
    """Scores of the rows of a span on all keys."""
    return blocks.logits(span, Span(0, blocks.layout.T, 0))


class _HeadPart:
    """The rows of A of one head that belong to a span, formed a panel at a time."""

    def __init__(
        self, blocks: Blocks, held: tuple[Tensor, ...], keys: Tensor, span: Span, scaled: bool, at: tuple[int, int],
        backend: Backend,
    ):  # fmt: skip
        b, h = at
        q, pivot, largest = (x[b : b + 1, h : h + 1, span.local] for x in held)
        key_head = h * keys.shape[1] // held[0].shape[1]
        keys = keys[b : b + 1, key_head : key_head + 1]
        logits = _logits(blocks, span).of_head(b, h)
        unit = None if scaled else largest
        if use_triton(backend, q):
            self.rows: Rows = KernelRows(q, keys, logits, pivot, unit, None, False, 0, 0)
        else:
            (head,) = heads(q, keys, logits)
            self.rows = HeadRows(head, pivot, unit, None)
        self.height = PANEL_BLOCKS * self.rows.block
        self._keys = _panel_keys(logits, self.height)

    def panels(self, space: Tensor) -> Iterator[tuple[slice, Tensor, int, int]]:
        """Rows, what they are, in space, and the first and last key that some of them may attend."""
        for (low, high), m in zip(self._keys, range(0, self.rows.T, self.height), strict=True):
            rows = slice(m, min(m + self.height, self.rows.T))
            self.rows.fill(space, m)
            yield rows, space[: rows.stop - m], low, high


def _multiply(C: Tensor, left: _HeadPart, right: _HeadPart, add: bool) -> None:
    """C = P Qᵀ of the rows of left and of right, or C += it, over the keys that both may attend."""
    space = C.new_empty(2, left.height, left.rows.width)
    for m, p, *own in left.panels(space[0]):
        for n, q, low, high in right.panels(space[1]):
            keys = slice(max(low, own[0]), max(low, own[0], min(high, own[1])))
            product = p[:, keys] @ q[:, keys].T
            if add:
                C[m, n] += product
            else:
                C[m, n] = product


def _panel_keys(logits: Logits, height: int) -> list[tuple[int, int]]:
    """Of every so many rows the first and one past the last key that some of them may attend."""
    start, stop = logits.start[0], logits.stop[0]
    start = torch.where(stop > start, start, FAR)
    missing = -len(start) % height
    low = F.pad(start, (0, missing), value=FAR).view(-1, height).amin(1)
    high = F.pad(stop, (0, missing)).view(-1, height).amax(1)
    return torch.stack([torch.minimum(low, high), high], 1).tolist()

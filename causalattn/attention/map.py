"""The attention map pooled to cells, and any window of it exactly: one pass with each row's maximum known."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import Backend, accumulator, use_triton
from .._checks import Logits, check_qk, resolve_logits, resolve_mask
from .._tiles import BLOCK, heads, row_factors
from ..masks import Intervals, Mask
from ..statistics.backward import input_gradients, save
from .forward import attend


class MapSource(NamedTuple):
    """What a map was pooled from: inputs and, [B, H, T], each row's maximum score in base 2 and probability."""

    q: Tensor
    k: Tensor
    logits: Logits
    pivot: Tensor
    largest: Tensor
    backend: Backend


class AttentionMap(NamedTuple):
    """mean and max of A over cells, [B, H, cells of rows, cells of keys], and what `window` needs.

    float32, float64 for float64 q.
    """

    mean: Tensor
    max: Tensor
    source: MapSource

    def window(self, q0: int, q1: int, k0: int, k1: int) -> Tensor:
        """A of queries q0 … q1 − 1 and keys k0 … k1 − 1, formed again: [B, H, q1 − q0, k1 − k0], without gradient.

        To rounding what `attention(return_probs=True)` has there.

        Raises:
            ValueError: bounds that do not lie in 0 ≤ q0 ≤ q1 ≤ T and 0 ≤ k0 ≤ k1 ≤ S.
        """
        q, k, logits, pivot, largest, backend = self.source
        for name, low, high, count in (("queries", q0, q1, q.shape[2]), ("keys", k0, k1, k.shape[2])):
            if not 0 <= low <= high <= count:
                raise ValueError(f"window must have its {name} in 0…{count}, got {low}…{high}")
        rows = slice(q0, q1)
        with torch.no_grad():
            part = _window_logits(logits, rows, slice(k0, k1))
            _, _, some_pivot, some_largest, probs = attend(
                q[:, :, rows], k[:, :, k0:k1], None, *part, accumulator(q), backend
            )
            # the window's softmax brought to the whole row's
            factor = torch.exp2(some_pivot - pivot[:, :, rows]) * largest[:, :, rows] / some_largest
            return probs * factor.masked_fill_(some_largest == 0, 0)[..., None]


def attention_map(
    q: Tensor,
    k: Tensor,
    cells: int = 512,
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> AttentionMap:
    """Pool the attention map to cells × cells, in O(T + cells²) memory: a picture of any length.

        cell (r, c) holds rows ⌊r·T/R⌋ ≤ i < ⌊(r+1)·T/R⌋ and keys ⌊c·S/C⌋ ≤ j < ⌊(c+1)·S/C⌋
        R = min(cells, T), C = min(cells, S); mean and max of its A_ij, a forbidden entry counting 0

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H.
        cells: how many cells a side at most; up to that many tokens A itself is returned.
        causal, mask, bias, alibi_slopes, scale, softcap, sink: as in `attention`.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        AttentionMap; mean has gradients for q, k, bias and sink, max has none. `.window(q0, q1, k0, k1)` recomputes any
        part of A exactly, from q and k, which it keeps.

    Raises:
        ValueError: cells < 1, or a shape, device, mask or softcap that does not fit.
        TypeError: a dtype that does not fit, cells that is no integer, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: mipmaps of an attention matrix; the two passes are those of Dao et al. 2022 (arXiv:2205.14135), §B.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> pooled = attention_map(q, k, 2, causal=True)
        >>> pooled.mean
        tensor([[[[0.5000, 0.0000],
                  [0.2917, 0.2083]]]])
        >>> pooled.window(3, 4, 0, 2)
        tensor([[[[0.2500, 0.2500]]]])
    """
    check_qk(q, k)
    if not isinstance(cells, int | torch.SymInt) or isinstance(cells, bool):
        raise TypeError(f"cells must be an int, got {type(cells).__name__}")
    if cells < 1:
        raise ValueError(f"cells must be at least 1, got {cells}")
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    _, _, pivot, largest, _ = attend(q, k, None, *logits, None, backend)
    mean, peak = pool(q, k, *logits, pivot, largest, cells, backend)
    kept = logits._replace(bias=bias if bias is None else logits.bias.detach(), sink=None)
    return AttentionMap(mean, peak, MapSource(q.detach(), k.detach(), kept, pivot.detach(), largest.detach(), backend))


@torch.library.custom_op("causalattn::attention_map", mutates_args=())
def pool(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    stop: Tensor,
    offset: int,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    pivot: Tensor,
    largest: Tensor,
    cells: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mean and maximum of A over cells, [B, H, min(cells, T), min(cells, S)]."""
    if use_triton(backend, q):
        from ..kernels.attention.map import attention_map_fwd

        logits = (start, stop, offset, bias, slopes, scale, softcap)
        total, peak = attention_map_fwd(q, k, *logits, pivot, largest, cells)
    else:
        logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
        total, peak = _pool_torch(q, k, logits, pivot, largest, cells)
    sizes = (cell_edges(count, cells, q.device).diff() for count in (q.shape[2], k.shape[2]))
    rows, keys = (size.double() for size in sizes)
    return total.div_(rows[:, None] * keys).to(peak.dtype), peak


@pool.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, sink, pivot, largest, cells, backend):
    shape = (*q.shape[:2], torch.sym_min(cells, q.shape[2]), torch.sym_min(cells, k.shape[2]))
    return q.new_empty(shape, dtype=accumulator(q)), q.new_empty(shape, dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    save(ctx, inputs, *inputs[10:12])
    ctx.cells = inputs[12]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _peak):
    q, k = ctx.saved_tensors[:2]
    T, S = q.shape[2], k.shape[2]
    R, C = grad.shape[2:]
    rows, keys = (cell_edges(count, ctx.cells, q.device).diff() for count in (T, S))
    row_cells, key_cells = (
        ((torch.arange(count, device=q.device) + 1) * n - 1) // max(count, 1) for count, n in ((T, R), (S, C))
    )
    cells = {"cells": grad / (rows[:, None] * keys), "row_cells": row_cells * C, "key_cells": key_cells}
    return *input_gradients(ctx, **cells), None, None, None, None


pool.register_autograd(_backward, setup_context=_setup_context)


def cell_edges(count: int, cells: int, device: torch.device) -> Tensor:
    """⌊c·count/cells⌋ for c up to the number of cells, which is at most count."""
    cells = min(cells, count)
    return torch.arange(cells + 1, device=device) * count // max(cells, 1)


def _pool_torch(
    q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, largest: Tensor, cells: int
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    S = k.shape[2]
    total = q.new_zeros(B, H, min(cells, T), min(cells, S), dtype=torch.float64)
    peak = torch.zeros_like(total, dtype=accumulator(q))
    row_cells, key_cells = (tile_cells(count, cells, q.device) for count in (T, S))
    for head in heads(q, k, logits):
        factors = row_factors(head, pivot, largest)
        for m in head.row_blocks():
            rows, row_members, row_weights = row_cells[m // BLOCK]
            for n in head.key_blocks(m):
                keys, key_members, key_weights = key_cells[n // BLOCK]
                a = head.probs(m, n, *(x[m : m + BLOCK] for x in factors))
                a = a.index_select(1, key_members.flatten()).view(BLOCK, *key_members.shape)
                high = a.amax(2).index_select(0, row_members.flatten())
                low = a.mul_(key_weights).sum(2).index_select(0, row_members.flatten())
                here = (head.b, head.h, rows, keys)
                low, high = (x.view(*row_members.shape, -1) for x in (low, high))
                total[here] += low.mul_(row_weights[..., None]).sum(1, dtype=torch.float64)
                peak[here] = torch.maximum(peak[here], high.amax(1))
    return total, peak


def tile_cells(count: int, cells: int, device: torch.device) -> list[tuple[slice, Tensor, Tensor]]:
    """Of each tile of count tokens: the cells it meets, their tokens within it [cells, width] and weights of 1.

    A cell of fewer tokens repeats its last one with weight 0.
    """
    cells = min(cells, count)
    tiles = []
    for n in range(0, count, BLOCK):
        stop = min(n + BLOCK, count)
        some = slice(((n + 1) * cells - 1) // count, (stop * cells - 1) // count + 1)
        edges = (torch.arange(some.start, some.stop + 1, device=device) * count // cells).clamp(n, stop) - n
        width = min(-(-count // cells), BLOCK)
        members = edges[:-1, None] + torch.arange(width, device=device)
        last = edges[1:, None] - 1
        tiles.append((some, torch.minimum(members, last), (members <= last).to(torch.float32)))
    return tiles


def _window_logits(logits: Logits, rows: slice, keys: slice) -> Logits:
    """The logits of some rows and keys, counted from the first of them."""
    count = keys.stop - keys.start
    start, stop = ((bound[:, rows] - keys.start).clamp(0, count) for bound in (logits.start, logits.stop))
    bias = logits.bias
    if bias is not None:
        bias = bias[:, :, rows if bias.shape[2] > 1 else slice(None), keys if bias.shape[3] > 1 else slice(None)]
    return logits._replace(start=start, stop=stop, offset=logits.offset + rows.start - keys.start, bias=bias)

"""Attention of a sequence that several ranks share: keys and values go around, outputs stay where their queries are."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, accumulator, use_triton
from .._checks import check_v
from ..attention import AttentionOutput, TopK
from ..attention.forward import attend
from ..attention.topk import select_largest
from ..edge_effects.rest import attend_rest
from ..masks import Intervals, Mask
from ..statistics.chosen import chosen_scores
from ..statistics.rows import row_statistics
from .blocks import Blocks, Softmax, check_no_gradient
from .layout import Order


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> AttentionOutput:
    """Attend over all tokens of all ranks, each of which holds some: out and lse as of `causalattn.attention`.

    Every rank calls it with its own tokens and the same options. Keys and values go once around the ring, W − 1 times
    the bytes of a rank's own; the next are under way while a block is worked on.

    Args:
        q: this rank's queries, [B, H, T_r, D]; k: its keys, [B, H_kv, T_r, D]; v: its values, [B, H_kv, T_r, V].
        mesh: one axis, the ranks that share the sequence.
        order: which tokens a rank holds, see `shard`: "contiguous", T_r of the ranks in their order, any numbers; or
            "zigzag", as `shard` gives them.
        mask: of all T tokens: a Mask, or Intervals of T rows.
        causal, alibi_slopes, scale, softcap, sink, backend: as in `causalattn.attention`, the same on every rank.

    Returns:
        AttentionOutput of this rank's queries, without probs and without gradient. Blocks are put together in float64;
        kernels round each to q's dtype first.

    Raises:
        ValueError, TypeError: as in `causalattn.attention`; tokens, an order or a mesh that does not fit.
        NotImplementedError: an input that requires grad where gradients are recorded.
        RuntimeError: another rank is gone, or later than the group's timeout.

    Source: Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889).

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's, of many
        >>> mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> attention(q, k, v, mesh=mesh, causal=True).out
        tensor([[[[1.0000, 0.0000],
                  [0.3302, 0.6698]]]])
        >>> dist.destroy_process_group()
    """

    def check() -> dict[str, object]:
        check_v(v, k)
        check_no_gradient(v)
        return {"the value dim": v.shape[3]}

    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("attention", q, k, *options, check)
    # kernels multiply wide values slowly
    out, lse, _, _ = attend_all(blocks, q, k, v, backend, wide=not use_triton(backend, q))
    return AttentionOutput(out.to(v.dtype), lse.to(accumulator(q)), None)


def attend_all(
    blocks: Blocks,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    backend: Backend,
    ceiling: Tensor | None = None,
    *,
    wide: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """out (None without v), lse, the largest score in base 2 and the largest probability of each row, in float64.

    With ceiling [B, H, T_r] of the scores up to it, and without the sink: anything where it is ∞. wide: no block's out
    is rounded to v's dtype.
    """
    rows = Softmax(q)
    acc = None if v is None else torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    for block, (keys, *values) in blocks.met(k) if v is None else blocks.met(k, v):
        at = block.rows
        some = [x.to(accumulator(q) if wide else q.dtype) for x in values]
        inputs = q[:, :, at], keys, some[0] if some else None
        if ceiling is None:
            out, _, pivot, largest, _ = attend(*inputs, *block.logits, None, backend)
        else:
            out, pivot, largest = attend_rest(*inputs, *block.logits, ceiling[:, :, at], backend)
        part, kept, _ = rows.add(at, pivot, largest)
        if acc is not None:
            acc[:, :, at].mul_(kept[..., None]).add_(out * part[..., None])
    lse, unit = rows.result(blocks.sink if ceiling is None else None)
    return None if acc is None else acc.mul_(unit[..., None]), lse, rows.pivot, unit


def attention_topk(
    q: Tensor,
    k: Tensor,
    n: int,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> TopK:
    """Return the n largest probabilities of each of this rank's queries over the keys of all ranks.

    Args:
        q, k, mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend: as in `attention` here.
        n: how many of each row, at least 1.

    Returns:
        TopK as of `causalattn.attention_topk`, [B, H, T_r, n]; indices are positions in the whole sequence. Keys on
        different ranks whose scores differ by less than a rounding may come in either order.

    Raises:
        As `attention`; ValueError also for n < 1, TypeError for n that is no integer.
    """

    def check() -> dict[str, object]:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"n must be an int, got {type(n).__name__}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return {"n": n}

    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("attention_topk", q, k, *options, check)
    rows = Softmax(q)
    held = Largest(q, n)
    for block, (keys,) in blocks.met(k):
        some = q[:, :, block.rows]
        largest, pivot = row_statistics(some, keys, *block.logits, "max pivot", backend)
        _, indices = select_largest(some, keys, *block.logits, n, backend)
        rows.add(block.rows, pivot, largest)
        # a probability may have come to 0: the scores say which key is ahead
        scores = chosen_scores(some, keys, block.logits, indices)
        held.add(block.rows, scores, scores, indices, block.b.first)
    _, unit = rows.result(blocks.sink)
    probs = torch.exp2(held.sizes - rows.pivot[..., None]) * unit[..., None]
    free = (held.indices < 0) & ~rows.pivot.isnan()[..., None]
    return TopK(probs.masked_fill(free, 0).to(accumulator(q)), held.indices.int())


class Largest:
    """The n largest sizes of each row so far, the values that they are of, and where."""

    def __init__(self, q: Tensor, n: int):
        shape = (*q.shape[:3], n)
        self.sizes = torch.full(shape, -torch.inf, dtype=torch.float64, device=q.device)
        self.values = torch.zeros_like(self.sizes)
        self.indices = torch.full(shape, -1, dtype=torch.int64, device=q.device)

    def add(self, rows: slice, sizes: Tensor, values: Tensor, indices: Tensor, first: int) -> None:
        """Take in some of a block of keys from `first` on; index −1 is none. Equal sizes stay in the order of keys."""
        places = torch.where(indices >= 0, indices.long() + first, -1)
        sizes = sizes.masked_fill(indices < 0, -torch.inf)
        every = [
            torch.cat([old[:, :, rows], new], -1)
            for old, new in ((self.sizes, sizes), (self.values, values), (self.indices, places))
        ]
        # blocks do not come in the order of their keys
        order = every[2].sort(dim=-1, stable=True).indices
        every = [x.gather(-1, order) for x in every]
        order = every[0].sort(dim=-1, descending=True, stable=True).indices[..., : self.sizes.shape[3]]
        for old, new in zip((self.sizes, self.values, self.indices), every, strict=True):
            old[:, :, rows] = new.gather(-1, order)

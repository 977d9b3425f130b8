"""The statistics of texts shorter than a tile: a few heads' matrices at a time, of their own size."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import Logits, check_qk, check_square, resolve_logits
from .._tiles import BLOCK
from ..masks import Intervals
from .results import Asymmetry, AttentionStats, asymmetry_of, chosen_keys, column_statistics, diagonal, share, wanted

# elements of the matrices that are there at once, as many as of a tile
AREA = BLOCK * BLOCK


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether on a CPU a tile of fixed shape would be mostly padding."""
    lengths = q.shape[2], k.shape[2]
    return q.device.type == "cpu" and q.numel() > 0 and 0 < min(lengths) and max(lengths) <= BLOCK


def fits_one_tile(q: Tensor, k: Tensor) -> bool:
    """Whether the matrices of all heads have fewer elements than a tile, so that the time goes into calls."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= AREA


def short_stats(
    q: Tensor,
    k: Tensor,
    *,
    want: Iterable[str],
    mask: Intervals,
    columns: Sequence[int | str] = ("sink",),
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> AttentionStats:
    """What `attention_stats` gives, without gradient, in time that grows with the text's own length.

    The last bits are not those of `attention_stats` and depend on T, for a shorter text of a batch too.
    """
    check_qk(q, k)
    want = wanted(want)
    if want & {"net_flow", "asymmetry"}:
        check_square("net_flow and asymmetry", q, k)
    keys = torch.cat([diagonal(mask), chosen_keys(columns, mask, k.shape[2])], -1)
    logits = resolve_logits(q, k, mask, bias=bias, alibi_slopes=None, scale=scale, softcap=softcap, sink=sink)
    seen = mask.to_dense(k.shape[2])
    seen = None if seen.all() else seen
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        parts = [_of_heads(*some, logits.offset, want) for some in _probs(q, k, logits, seen, keys)]
    stats = {name: torch.cat([part[name] for part in parts]).unflatten(0, q.shape[:2]) for name in parts[0]}
    if "received" in stats:
        stats |= column_statistics(stats.pop("received"), stats["mass"], mask)
    if "columns" in stats:
        stats["diag"], stats["columns"] = stats["columns"][..., 0], stats["columns"][..., 1:]
    stats["dag_score"] = share(stats["below"], stats["mass"])
    if "asymmetry" in want:
        pairs = (stats.pop(name) for name in ("difference_sq", "l1", "largest"))
        asymmetry = asymmetry_of(*pairs, stats["sum_sq"], stats["net_flow"])
        stats["asymmetry"] = Asymmetry(*(x.to(accumulator(q)) for x in asymmetry))
    kept = {name: x if name == "asymmetry" else x.to(accumulator(q)) for name, x in stats.items() if name in want}
    return AttentionStats(**kept)


def _probs(q: Tensor, k: Tensor, logits: Logits, seen: Tensor | None, keys: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A [n, T, S] of the next heads, its lse and its mass, [n, T] each, and of keys [B or 1, T, …] theirs."""
    (B, H, T, _), S = q.shape, k.shape[2]
    for some in torch.arange(B * H).split(max(1, AREA // (T * S))):
        b, h = some // H, some % H
        x = (q[b, h].to(accumulator(q)) @ k[b, h // (H // k.shape[1])].to(accumulator(q)).mT).mul_(logits.scale)
        if logits.softcap > 0:
            x.div_(logits.softcap).tanh_().mul_(logits.softcap)
        if logits.bias is not None:
            x += logits.bias.expand(B, H, -1, -1)[b, h]
        if seen is not None:
            x.masked_fill_(~seen[b % len(seen)], -torch.inf)
        pivot = x.amax(-1, keepdim=True)
        # a row that may attend nothing
        pivot.masked_fill_(pivot.isneginf(), 0)
        own = x.sub_(pivot).exp_().sum(-1, keepdim=True)
        empty, total = own == 0, own
        if logits.sink is not None:
            total = own + torch.exp(logits.sink[h].to(own)[:, None, None] - pivot)
        lse = (pivot + total.log()).masked_fill_(empty, -torch.inf)
        total = total.masked_fill(empty, 1)
        yield x.div_(total), lse.squeeze(-1), (own / total).squeeze(-1), keys[b % len(keys)]


def _of_heads(
    A: Tensor, lse: Tensor, mass: Tensor, keys: Tensor, offset: int, want: set[str]
) -> dict[str, Tensor]:  # fmt: skip
    """Statistics of some heads, each [n, …], from A [n, T, S]; keys [n, T, …] are the columns."""
    sum_sq = torch.linalg.vector_norm(A, dim=-1).square()
    stats = {"mass": mass, "below": A.tril(offset - 1).sum(-1), "sum_sq": sum_sq}
    if want & {"received", "received_mean", "net_flow", "asymmetry"}:
        stats["received"] = A.sum(-2)
    if "lse" in want:
        stats["lse"] = lse
    if "max" in want:
        stats["max"] = A.amax(-1)
    if "entropy" in want:
        # a log and a product take a sixth of special.entr's time; 0 log 0 is 0
        stats["entropy"] = 0 - torch.linalg.vecdot(A, A.clamp(min=torch.finfo(A.dtype).tiny).log_())
    if "distance" in want:
        distance = torch.arange(A.shape[1])[:, None] + offset - torch.arange(A.shape[2])
        stats["distance"] = (A * distance.abs()).sum(-1)
    if want & {"diag", "columns"}:
        inside = (keys >= 0) & (keys < A.shape[2])
        stats["columns"] = A.gather(2, keys.where(inside, 0).long()).masked_fill(~inside, 0)
    if "asymmetry" in want:
        difference = A - A.mT
        # a row at a time, then float64
        stats["difference_sq"] = torch.linalg.vector_norm(difference, dim=-1).double().square().sum(-1)
        sizes = difference.abs_()
        stats |= {"l1": sizes.sum(-1).double().sum(-1), "largest": sizes.amax((1, 2))}
    return stats

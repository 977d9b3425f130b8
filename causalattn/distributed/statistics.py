"""Statistics of the attention map of a sequence that several ranks share, never the map itself."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, accumulator
from .._tiles import LN2
from ..masks import Intervals, Mask
from ..statistics import DEFAULT, AttentionStats
from ..statistics.chosen import chosen_probs
from ..statistics.pairs import pair_statistics
from ..statistics.received import received as received_pass
from ..statistics.results import Asymmetry, asymmetry_of, attending, chosen_keys, diagonal, wanted
from ..statistics.rows import ROWS, row_statistics
from .blocks import Blocks, Softmax
from .layout import Order, Span

SUMS = ("mass", "entropy", "sum_sq", "below", "distance")
COLUMNS = {"received", "received_mean", "net_flow", "asymmetry"}


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    want: str | Iterable[str] = DEFAULT,
    columns: Sequence[int | str] = ("sink",),
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> AttentionStats:
    """Measure the attention map of the tokens of all ranks, each with its own, as `causalattn.attention_stats`.

    Keys go around the ring once for the rows, once more, with what each has received, for the columns, and half around,
    with their queries, for the asymmetry.

    Args:
        q, k, mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend: as in `attention` here.
        want, columns: as in `causalattn.attention_stats`; columns are positions in the whole sequence.

    Returns:
        AttentionStats without gradient: of a row, a key or a token those of this rank's, [B, H, T_r]; of a head,
        dag_score and asymmetry, the same on every rank.

    Raises:
        As `attention`; ValueError also for an unknown want or column, NotImplementedError for asymmetry with
        alibi_slopes.
    """
    want = want if isinstance(want, str) else set(want)

    def check() -> dict[str, object]:
        if "asymmetry" in wanted(want) and alibi_slopes is not None:
            raise NotImplementedError("asymmetry of a sharded sequence takes no alibi_slopes, got some")
        return {"want": sorted(wanted(want)), "columns": [*columns]}

    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("attention_stats", q, k, *options, check)
    return measure(blocks, q, k, wanted(want), columns, backend)


def dag_score(
    q: Tensor,
    k: Tensor,
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
) -> Tensor:
    """Share of the attention mass strictly below the diagonal, as `causalattn.dag_score`: [B, H], the same everywhere.

    Args, Raises: as in `attention` here.
    """
    options = {"causal": causal, "mask": mask, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap}
    options |= {"sink": sink, "mesh": mesh, "order": order, "backend": backend}
    return attention_stats(q, k, want=("dag_score",), **options).dag_score


def measure(
    blocks: Blocks, q: Tensor, k: Tensor, want: set[str], columns: Sequence[int | str], backend: Backend
) -> AttentionStats:
    """The statistics that want names of the scores of blocks."""
    dtype = accumulator(q)
    chosen = chosen_keys(columns, blocks.intervals, blocks.layout.T)
    diagonals = [diagonal(blocks.intervals)] * ("diag" in want)
    picked = torch.cat([*diagonals, chosen if "columns" in want else chosen[..., :0]], -1)
    rows = _rows(blocks, q, k, want, blocks.own(picked, 1), backend)
    stats = dict(rows)
    if "diag" in want:
        stats["diag"] = rows["picked"][..., 0]
    stats["columns"] = rows["picked"][..., "diag" in want :]
    if want & COLUMNS:
        stats |= _columns(blocks, q, k, rows, backend)
    if "dag_score" in want:
        total = blocks.ring.total(torch.stack([rows["below"], rows["mass"]]).sum(-1))
        stats["dag_score"] = (total[0] / total[1].masked_fill(total[1] == 0, 1)).masked_fill(total[1] == 0, 0)
    if "asymmetry" in want:
        stats["asymmetry"] = _asymmetry(blocks, q, k, rows, stats["net_flow"], backend)
    found = {name: stats[name] for name in AttentionStats._fields if name in want}
    return AttentionStats(**{name: x if name == "asymmetry" else x.to(dtype) for name, x in found.items()})


def _rows(blocks: Blocks, q: Tensor, k: Tensor, want: set[str], picked: Tensor, backend: Backend) -> dict[str, Tensor]:
    """In float64 the row statistics that want names or needs, pivot and max, and A at the picked keys."""
    # what others are made of
    parts = {"dag_score": "below", "asymmetry": "sum_sq"}
    needed = {"mass", *want, *(parts[name] for name in want & {*parts})}
    sums = {name: torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device) for name in SUMS if name in needed}
    probs = torch.zeros(*q.shape[:3], picked.shape[2], dtype=torch.float64, device=q.device)
    passed = [name for name in ROWS if name in {*sums, "max", "pivot"}]
    rows = Softmax(q)
    for block, (keys,) in blocks.met(k):
        at, some = block.rows, q[:, :, block.rows]
        packed = row_statistics(some, keys, *block.logits, " ".join(passed), backend)
        found = dict(zip(passed, packed.double().unbind(), strict=True))
        part, kept, grown = rows.add(at, found["pivot"], found["max"])
        if "entropy" in sums:
            # Σ A (lse − S): of the block from its own lse, of those before from a maximum that has just grown
            sums["entropy"][:, :, at] += grown * LN2 * sums["mass"][:, :, at]
            found["entropy"] = found["entropy"] - part.log().masked_fill(part == 0, 0)
        for name, x in sums.items():
            power = 2 if name == "sum_sq" else 1
            x[:, :, at] = x[:, :, at] * kept**power + found[name] * part**power
        if picked.shape[2]:
            keys_of = (picked[:, at] - block.b.first).int().contiguous()
            factors = (packed[passed.index(name)] for name in ("pivot", "max"))
            here = chosen_probs(some, keys, *block.logits, *factors, keys_of, backend)
            probs[:, :, at] = probs[:, :, at] * kept[..., None] + here * part[..., None]
    lse, unit = rows.result(blocks.sink)
    sums = {name: x * (unit.square() if name == "sum_sq" else unit) for name, x in sums.items()}
    if "entropy" in sums:
        sums["entropy"] -= unit.log().masked_fill(unit == 0, 0) * sums["mass"]
    # 0 · NaN: of a row that holds one, what it may not attend is 0 all the same
    start, stop = (blocks.own(x, 1)[..., None] for x in blocks.intervals[:2])
    probs = (probs * unit[..., None]).masked_fill(~((picked >= start) & (picked < stop))[:, None], 0)
    return sums | {"lse": lse, "max": unit, "pivot": rows.pivot, "picked": probs}


def _columns(blocks: Blocks, q: Tensor, k: Tensor, rows: dict[str, Tensor], backend: Backend) -> dict[str, Tensor]:
    """What each of this rank's keys receives from the rows of all: the sums travel with their keys, and come home."""
    ring, lengths = blocks.ring, blocks.lengths
    factors = [rows[name].to(accumulator(q)) for name in ("pivot", "max")]
    total = torch.zeros(*q.shape[:3], dtype=torch.float64, device=q.device)
    for owner, (keys,) in ring.visits((k,), lengths):
        for block in blocks.of(owner):
            some = (x[:, :, block.rows] for x in factors)
            total[:, :, block.keys] += received_pass(
                q[:, :, block.rows], keys[:, :, block.keys], *block.logits, *some, backend
            )
        (total,) = ring.shift((total,), lengths, 2, owner)
    count = blocks.own(attending(blocks.intervals, blocks.layout.T), 1)[:, None]
    return {"received": total, "received_mean": total / count.clamp(min=1), "net_flow": rows["mass"] - total}


def _asymmetry(
    blocks: Blocks, q: Tensor, k: Tensor, rows: dict[str, Tensor], net_flow: Tensor, backend: Backend
) -> Asymmetry:
    """Pairs of tiles (i, j) and (j, i) need both ranks' queries and keys: half way around every pair has met."""
    ring = blocks.ring
    own = (q, k, *(rows[name].to(accumulator(q)) for name in ("pivot", "max")))
    sums = torch.zeros(2, *q.shape[:2], dtype=torch.float64, device=q.device)
    peak = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    half = ring.size // 2
    for hop, (owner, held) in enumerate(ring.visits(own, blocks.lengths, hops=half)):
        # two ranks opposite one another meet twice
        if 2 * hop == ring.size and ring.rank > owner:
            continue
        for a in blocks.layout.spans[ring.rank]:
            for b in blocks.layout.spans[owner]:
                met = hop == 0 and b.first < a.first
                if met or not (blocks.reached(a, b) or blocks.reached(b, a)):
                    continue
                found = _pairs(blocks, own, held, a, b, backend).double()
                sums += found[:2]
                peak = torch.maximum(peak, found[2])
    sums, peak, sum_sq = ring.total(sums), ring.largest(peak), ring.total(rows["sum_sq"].sum(-1))
    found = asymmetry_of(*sums, peak, sum_sq[..., None], net_flow)
    return Asymmetry(*(x.to(accumulator(q)) for x in found))


def _pairs(
    blocks: Blocks, own: tuple[Tensor, ...], held: tuple[Tensor, ...], a: Span, b: Span, backend: Backend
) -> Tensor:
    """Of the tiles (a, b) and (b, a), as one square in which the rows of each attend the keys of the other."""
    if a == b:
        q, k, *factors = (x[:, :, a.local] for x in own)
        return pair_statistics(q, k, *blocks.logits(a, a), *factors, backend)
    q, k, *factors = (torch.cat([x[:, :, a.local], y[:, :, b.local]], 2) for x, y in zip(own, held, strict=True))
    across, back = blocks.logits(a, b), blocks.logits(b, a)
    n = a.stop - a.first
    # the keys of a come first: those of b lie n further
    starts, stops = (
        (torch.where(across.stop > across.start, x + n, 0), y)
        for x, y in ((across.start, back.start), (across.stop, back.stop))
    )
    logits = across._replace(start=torch.cat(starts, 1), stop=torch.cat(stops, 1), offset=0)
    return pair_statistics(q, k, *logits, *factors, backend)

"""What an intervention on each single edge does in a sequence that several ranks share."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, accumulator
from .._checks import check_v
from ..attention import TopK
from ..edge_effects import EdgeEffects, check_count, check_measure, compared, edges_wanted, resolve_strength
from ..edge_effects.rest import ceiling_of, dominant_effects
from ..edge_effects.sweep import sweep
from ..masks import Intervals, Mask
from .attention import Largest, attend_all
from .blocks import Blocks, check_no_gradient
from .layout import Order

MOST = 64


def edge_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    order: Order = "contiguous",
    kind: Literal["cut", "soft", "hard"] = "cut",
    strength: float | None = None,
    measure: Literal["norm", "kl", "readout"] = "norm",
    readout: Tensor | None = None,
    want: str | Iterable[str] = ("row", "column", "topk"),
    n: int = 16,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> EdgeEffects:
    """Intervene on every edge of the whole sequence: `causalattn.edge_effects`, each rank with its own rows and keys.

    Keys and values go around the ring three times: for the outputs, for the rows without their dominant edge, and, with
    what each key has done so far, for the effects.

    Args:
        q, k, v, mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend: as in `attention` here.
        kind, strength, measure, readout, n: as in `causalattn.edge_effects`; readout is of this rank's queries.
        want: names among "row", "column" and "topk".

    Returns:
        EdgeEffects of this rank's rows and keys; indices are positions in the whole sequence.

    Raises:
        As `causalattn.edge_effects` and `attention` here; ValueError also for want="map".
    """
    want = want if isinstance(want, str) else [*want]

    def check() -> dict[str, object]:
        check_v(v, k)
        check_measure(measure, readout, q, v)
        check_no_gradient(v, readout)
        check_count("n", n, MOST)
        if "map" in edges_wanted(want):
            raise ValueError("want must be names among row, column, topk of a sharded sequence, got 'map'")
        same = {"the value dim": v.shape[3], "strength": resolve_strength(kind, strength), "measure": measure, "n": n}
        return same | {"want": edges_wanted(want)}

    options = (mesh, order, causal, mask, alibi_slopes, scale, softcap, sink, backend)
    blocks = Blocks("edge_effects", q, k, *options, check)
    strength, want = resolve_strength(kind, strength), edges_wanted(want)
    wide = accumulator(v)
    values = None if measure == "kl" else v
    out, _, pivot, largest = attend_all(blocks, q, k, values, backend, wide=True)
    out, pivot, largest = (None if x is None else x.to(wide) for x in (out, pivot, largest))
    ceiling = ceiling_of(pivot, largest)
    rest, _, *factors = attend_all(blocks, q, k, values, backend, ceiling, wide=True)
    dominant = dominant_effects(out, pivot, (rest, *factors), blocks.sink, readout, strength, measure)
    left, level = compared(out, readout, measure)
    terms = (pivot, largest, ceiling, dominant, left, level)
    return _swept(blocks, q, k, values, terms, strength, want, n, backend)


def _swept(
    blocks: Blocks, q: Tensor, k: Tensor, v: Tensor | None, terms: tuple[Tensor | None, ...], strength: float,
    want: list[str], n: int, backend: Backend,
) -> EdgeEffects:  # fmt: skip
    """The effects of all ranks' keys on this rank's rows: what a key has done travels with it, and comes home."""
    row, column = (torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device) for _ in range(2))
    held, wide = Largest(q, n), accumulator(q)
    for owner, visit in blocks.ring.visits((k,) if v is None else (k, v), blocks.lengths):
        for block in blocks.of(owner):
            at, (keys, *values) = block.rows, (x[:, :, block.keys] for x in visit)
            own = (None if x is None else x[:, :, at] for x in terms)
            sent, done, effects, places, _ = sweep(
                q[:, :, at], keys, values[0] if values else None, *block.logits, *own,
                strength, " ".join(want), n, 1, backend,
            )  # fmt: skip
            if "row" in want:
                row[:, :, at] += sent
            if "column" in want:
                column[:, :, block.keys] += done
            if "topk" in want:
                effects = effects.double()
                held.add(at, effects.abs(), effects, places, block.b.first)
        if "column" in want:
            (column,) = blocks.ring.shift((column,), blocks.lengths, 2, owner)
    return EdgeEffects(
        row.to(wide) if "row" in want else None,
        column.to(wide) if "column" in want else None,
        TopK(held.values.to(wide), held.indices.int()) if "topk" in want else None,
    )

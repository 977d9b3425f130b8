"""Statistics of a map under interventions: its touched rows from their probabilities, a lot of rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import Logits
from ..attention.intervened_rows import edited_rows
from ..interventions.edges import Surgery, touched_rows
from ..masks import Intervals
from .results import column_statistics, share

# float32 probabilities written out at a time, 256 MiB
WORKSPACE = 2**26

Measure = Callable[[Logits, set[str]], dict[str, Tensor]]


def measure_under(
    surgeries: list[Surgery],
    q: Tensor,
    k: Tensor,
    logits: Logits,
    intervals: Intervals,
    chosen: Tensor,
    want: set[str],
    backend: str,
    measure: Measure,
) -> dict[str, Tensor]:
    """What want names; measure gives the statistics of rows that no surgery touches, the others being empty there."""
    rows = touched_rows(surgeries, q.device)
    per_key = want & {"received", "received_mean", "net_flow"}
    needed = (want - per_key - {"dag_score"}) | ({"mass", "below"} if "dag_score" in want else set())
    needed |= {"mass", "received"} if per_key else set()
    empty = (bound.index_fill(1, rows, 0) for bound in (logits.start, logits.stop))
    stats = measure(logits._replace(**dict(zip(("start", "stop"), empty, strict=True))), needed)

    def touched(q: Tensor, k: Tensor, bias: Tensor | None, sink: Tensor | None, some: Tensor) -> list[Tensor]:
        A, lse = edited_rows(surgeries, q, k, logits._replace(bias=bias, sink=sink), some, lse_dtype, backend)
        return [_of_rows(name, A, lse, some + logits.offset, chosen[:, some]) for name in needed]

    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    step = max(1, WORKSPACE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    received = stats["received"].double() if per_key else None
    parts: dict[str, list[Tensor]] = {name: [] for name in needed}
    for some in rows.split(step):
        # only sums are kept for a gradient: the probabilities are formed again
        values = checkpoint(touched, q, k, logits.bias, logits.sink, some, use_reentrant=False)
        for name, value in zip(needed, values, strict=True):
            if name == "received":
                received = received + value
            else:
                parts[name].append(value)
    for name, some in parts.items():
        if some:
            stats[name] = stats[name].index_copy(2, rows, torch.cat(some, 2).to(stats[name].dtype))
    if per_key:
        stats |= column_statistics(received.to(lse_dtype), stats["mass"], intervals)
    if "dag_score" in want:
        stats["dag_score"] = share(stats["below"], stats["mass"])
    return stats


def _of_rows(name: str, A: Tensor, lse: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
    """One statistic of rows A [B, H, R, S] at these key positions; of received, the sum over them, [B, H, S]."""
    S = A.shape[3]
    keys = torch.arange(S, device=A.device)
    if name == "lse":
        return lse
    if name == "received":
        return A.sum(2)
    if name == "max":
        return A.detach().amax(3)
    if name == "columns":
        present = (chosen >= 0) & (chosen < S)
        at = chosen.clamp(0, S - 1).long()[:, None].expand(*A.shape[:3], -1)
        return A.gather(3, at).masked_fill(~present[:, None], 0)
    if name == "diag":
        return A.gather(3, positions.clamp(0, S - 1)[:, None].expand(*A.shape[:3], 1))[..., 0]
    weighted = {
        "mass": lambda: A,
        "entropy": lambda: -A * torch.log(A.where(A > 0, 1)),
        "sum_sq": lambda: A * A,
        "below": lambda: A * (keys < positions[:, None]),
        "distance": lambda: A * (keys - positions[:, None]).abs(),
    }
    return weighted[name]().sum(3)

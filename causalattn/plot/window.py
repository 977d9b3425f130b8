"""What figures show: a window of at most 128 tokens, and the edges above the null in it."""

from typing import NamedTuple

import numpy as np
import torch

from ..analysis import Report
from ..dense import offset_null
from ..masks import Intervals

WINDOW = 128
EDGES = 200
EPSILON = 1e-6  # a lift that float32 can tell from rounding
SPECIAL = {"Ġ": " ", "▁": " ", "Ċ": "⏎", "ĉ": "⇥"}


class Edge(NamedTuple):
    """Query i and key j within a window, and by how much A_ij exceeds its null."""

    i: int
    j: int
    lift: float


def prettify(token: str) -> str:
    """A token as one reads it: without the word marks of byte-pair and sentence-piece vocabularies."""
    for mark, text in SPECIAL.items():
        token = token.replace(mark, text)
    return token.strip(" ") or "␣"


def strength(row: dict) -> float:
    """How far a head is from its null: |z| without the sink, in a causal layer |z| of the unmasked scores; else 0."""
    z = row["unmasked_z"] if row["causal"] else row["sink_removed_z"]
    return 0.0 if z is None else abs(z)


def strongest_heads(report: Report, n: int = 5, sequence: int = 0) -> list[tuple[int, int]]:
    """The (layer, head) numbers of the n heads furthest from their null, the furthest first."""
    rows = [row for row in report.rows(top=0) if row["sequence"] == sequence]
    return [(row["layer"], row["head"]) for row in sorted(rows, key=strength, reverse=True)[:n]]


def real_tokens(report: Report, sequence: int = 0) -> range:
    """From a sequence's first token that is no padding to its last."""
    intervals = report.intervals[0]
    filled = (intervals.stop[sequence] > intervals.start[sequence]).nonzero().flatten().tolist()
    return range(filled[0], filled[-1] + 1) if filled else range(intervals.stop.shape[1])


def choose_window(report: Report, *, size: int = WINDOW, sequence: int = 0) -> range:
    """The run of at most size tokens whose keys the strongest heads attend most above uniform, weighted by |z|."""
    real = real_tokens(report, sequence)
    if len(real) <= size:
        return real
    rows = {(row["layer"], row["head"]): strength(row) for row in report.rows(top=0) if row["sequence"] == sequence}
    act = torch.zeros(len(real), dtype=torch.float64)
    for layer, head in strongest_heads(report, sequence=sequence):
        at = report.layer_ids.index(layer)
        stats, intervals = report.layers[at], report.intervals[at]
        received = stats.received[sequence, report.head_ids[at].index(head)].double()
        lift = (received - _uniform_received(intervals, sequence, len(received))).clamp(min=0)
        lift[intervals.first[sequence].unique().long()] = 0  # every window would follow the sink
        act += max(rows[layer, head], 1e-9) * lift[real.start : real.stop]
    total = torch.cat([act.new_zeros(1), act.cumsum(0)])
    start = real.start + int((total[size:] - total[:-size]).argmax())
    return range(start, start + size)


def _uniform_received(intervals: Intervals, sequence: int, S: int) -> torch.Tensor:
    """[S]: the column mass if every row spread its weight evenly over the keys it may attend."""
    start, stop = intervals.start[sequence].long(), intervals.stop[sequence].long()
    share = torch.where(stop > start, 1 / (stop - start).clamp(min=1).double(), 0)
    edges = torch.zeros(S + 1, dtype=torch.float64)
    return edges.index_add_(0, start, share).index_add_(0, stop, -share).cumsum(0)[:-1]


def window_mask(intervals: Intervals, window: range, *, sequence: int = 0) -> Intervals:
    """Who may attend whom within the window, its first token at position 0."""
    start, stop, first = (bound[sequence : sequence + 1, window.start : window.stop] for bound in intervals[:3])
    start, stop, first = ((bound - window.start).clamp(0, len(window)) for bound in (start, stop, first))
    return Intervals(start, stop, first, intervals.offset)


def edges_above_null(A: np.ndarray, limit: int = EDGES, *, mask: Intervals | None = None) -> list[Edge]:
    """The edges i ≠ j of A [W, W] that exceed their offset-matched null most, the largest first, at most 200.

    The null of A_ij is the mean of A over the entries at the same distance i − j that the mask allows.
    """
    lift = A - offset_null(torch.from_numpy(A), mask=mask).numpy()
    np.fill_diagonal(lift, 0)
    order = np.argsort(-lift, axis=None, kind="stable")[: min(limit, EDGES)]
    edges = zip(*np.unravel_index(order, lift.shape), strict=True)
    return [Edge(int(i), int(j), float(lift[i, j])) for i, j in edges if lift[i, j] > EPSILON]


def telling_edge(edges: list[Edge], first: torch.Tensor, window: range) -> Edge:
    """The edge furthest above its null whose key is not the first of its sequence; (0, 0) if there is none."""
    sinks = set(first.tolist())
    return next((edge for edge in edges if window.start + edge.j not in sinks), Edge(0, 0, 0.0))

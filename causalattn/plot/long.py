"""Figures of a text longer than the window: one head's whole map in cells, and its largest weights."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..attention import attention_map, attention_topk
from ..integrations.transformers.attention import AttentionCall
from .drawing import ATTENTION, BLUE, INK, ORANGE, Drawing, sheet
from .window import prettify

CELLS = 128
LARGEST = 20
DECADES = 4  # of colours, or down to a tenth of an even weight
NOTHING = "#DDE0E4"


class Weight(NamedTuple):
    """A_ij of query i and key j, and the weight of each key if row i were spread evenly over those it may attend."""

    i: int
    j: int
    value: float
    even: float


def largest_weights(call: AttentionCall, limit: int = LARGEST) -> list[Weight]:
    """The largest A_ij, i ≠ j, of one sequence's one head, without the column of the row's first real token.

    Equal ones stand in the order of i, then j.
    """
    # a row holds at most limit of them, beside the two left out
    values, keys = (x[0, 0].cpu() for x in attention_topk(call.q, call.k, limit + 2, **call.options()))
    start, stop, first = (bound[0].cpu() for bound in call.intervals[:3])
    position = call.intervals.offset + torch.arange(len(keys))
    left_out = (keys < 0) | (keys == first[:, None]) | (keys == position[:, None])
    order = values.masked_fill_(left_out, 0).flatten().sort(descending=True, stable=True).indices[:limit].tolist()
    places = [divmod(n, keys.shape[1]) for n in order]
    found = [(i, int(keys[i, n]), float(values[i, n])) for i, n in places if values[i, n] > 0]
    return [Weight(i, j, value, 1 / int(stop[i] - start[i])) for i, j, value in found]


def draw_map(call: AttentionCall, window: range, *, head: str) -> Drawing:
    """One sequence's one head as a whole: mean and maximum of A over at most 128 × 128 cells, the window framed."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator

    pooled = attention_map(call.q, call.k, CELLS, **call.options())
    shown = {"mean of A over each cell": pooled.mean, "maximum of A in each cell": pooled.max}
    T, C = call.q.shape[2], pooled.max.shape[2]
    edges = [c * T // C for c in range(C + 1)]
    figure = sheet(13.2, 6.6, f"{head}: the whole text, {T} tokens in {C} × {C} cells")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, values) in zip(panels, shown.items(), strict=True):
        cells = np.ma.masked_equal(values[0, 0].cpu().numpy(), 0)
        top = float(values.max()) or 1
        low = min(top / 10**DECADES, 0.1 / T)
        image = axes.pcolormesh(edges, edges, cells, cmap=ATTENTION, norm=LogNorm(low, top))
        axes.set(xlabel="key j", xlim=(0, T), ylim=(T, 0), aspect="equal", facecolor=NOTHING)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        corner = (window.start, window.start)
        axes.add_patch(
            Rectangle(corner, len(window), len(window), fill=False, edgecolor=ORANGE, linewidth=1.4, clip_on=False)
        )
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, extend="min", ticks=LogLocator(10))
        bar.ax.axhline(1 / T, color=INK, linewidth=1.2)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    panels[0].set_ylabel("query i")
    side = f"{T // C}" if T % C == 0 else f"{T / C:.1f}"
    caption = (
        f"All of {head}, in cells of {side} × {side} weights A_ij, each panel on its own logarithmic scale; grey: "
        f"no weight. The line in a scale is 1/{T} = {1 / T:.2g}, each weight of a row spread evenly over all tokens. "
        f"Framed: tokens {window.start} to {window.stop - 1}, the window of the figures that name tokens."
    )
    return Drawing("map", figure, caption)


def draw_top_edges(weights: Sequence[Weight], tokens: Sequence[str], *, head: str) -> Drawing:
    """The largest weights of a whole text as bars, from the largest down; tokens are all of it."""
    from matplotlib.patches import Patch

    figure = sheet(10.5, 1.7 + 0.27 * max(4, len(weights)), f"{head}: largest weights of the whole text")
    axes = figure.subplots()
    places = range(len(weights))
    colours = [BLUE if w.j < w.i else ORANGE for w in weights]
    axes.barh(places, [w.value for w in weights], color=colours, height=0.72)
    labels = [f"{_name(tokens, w.i)} → {_name(tokens, w.j)}" for w in weights]
    axes.set_yticks(places, labels, fontsize=8, parse_math=False)
    for place, weight in zip(places, weights, strict=True):
        axes.text(weight.value, place, f" {weight.value:.3f}", va="center", fontsize=7.5, color=INK)
    axes.set(xlim=(0, 1.08 * max((w.value for w in weights), default=1)), ylim=(max(4, len(weights)) - 0.4, -0.6))
    axes.set_xlabel("A_ij", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)
    kinds = ((ORANGE, "query before key: looks ahead"), (BLUE, "query after key: looks back"))
    handles = [Patch(color=colour, label=text) for colour, text in kinds if colour in colours]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    even = max((w.even for w in weights), default=0)
    caption = (
        f"The {len(weights)} largest of all weights A_ij of {head}, “query”@i → “key”@j, without the first token's "
        f"column and the diagonal. Spread evenly, none of these rows would give a key more than {even:.2g}. "
        "A weight is no effect."
    )
    return Drawing("top-edges", figure, caption)


def _name(tokens: Sequence[str], n: int) -> str:
    return f"“{prettify(tokens[n])[:18]}”@{n}"

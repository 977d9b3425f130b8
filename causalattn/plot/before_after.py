"""Attention before and under interventions, the rows intervened on marked."""

from typing import TYPE_CHECKING

from ..before_after import BeforeAfter
from .drawing import ATTENTION, DIVERGING, ORANGE, Drawing, heatmap, sheet, token_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 4.4


def draw_before_after(result: BeforeAfter) -> Drawing:
    """The original map, the map under each plan and, of a single plan, their difference."""
    single = len(result.under) == 1
    panels = len(result.under) + 1 + single
    figure = sheet(PANEL * panels, PANEL + 0.6, f"Layer {result.layer}, mean over heads, before and under intervention")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    maps = [result.attention, *(each.attention for each in result.under)]
    high = max(float(each.max()) for each in maps)
    titles = ["original", *(each.plan for each in result.under)]
    rows = [[], *(each.rows for each in result.under)]
    for ax, A, title, marked in zip(axes, maps, titles, rows, strict=False):
        heatmap(ax, A.numpy(), _short(title), ATTENTION, 0, high)
        _mark(ax, marked, result.window)
    if single:
        change = (maps[1] - maps[0]).numpy()
        bound = max(abs(change).max(), 1e-9)
        heatmap(axes[-1], change, "difference", DIVERGING, -bound, bound)
        _mark(axes[-1], rows[1], result.window)
    tokens = result.tokens[result.window.start : result.window.stop]
    for ax in axes:
        token_ticks(ax, "x", tokens, result.window.start)
        ax.set_xlabel("key j", fontsize=9)
    token_ticks(axes[0], "y", tokens, result.window.start)
    axes[0].set_ylabel("query i", fontsize=9)
    for ax in axes[1:]:
        ax.set_yticks([])
    caption = (
        f"Mean attention of layer {result.layer}, original and under {' and under '.join(titles[1:])}; rows intervened "
        "on are boxed. Layers before it run under the same plan, where it names no layer."
    )
    return Drawing("before-after", figure, caption)


def _mark(axes: "Axes", rows: list[int], window: range) -> None:
    from matplotlib.patches import Rectangle

    for row in rows:
        if row in window:
            place = (-0.5, row - window.start - 0.5)
            axes.add_patch(Rectangle(place, len(window), 1, fill=False, edgecolor=ORANGE, linewidth=1.6))


def _short(title: str, longest: int = 48) -> str:
    return title if len(title) <= longest else title[: longest - 1] + "…"

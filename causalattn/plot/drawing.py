"""What every figure is made of: sheet, colours, heatmap and token labels."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .window import prettify

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8F98", "#22262B"
ATTENTION, DIVERGING = "Blues", "RdBu_r"


class Drawing(NamedTuple):
    """A figure, its file name without suffix, and the sentence to print beneath it."""

    name: str
    figure: "Figure"
    caption: str

    def png(self, *, dpi: int = 150) -> bytes:
        """The figure as PNG, dpi dots an inch."""
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # a token in a script that the font lacks is drawn as a box
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def sheet(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return figure


def heatmap(axes: "Axes", values: np.ndarray, title: str, colours: str, low: float, high: float) -> None:
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def token_ticks(axes: "Axes", which: str, tokens: Sequence[str], first: int) -> None:
    """Every token's label, or of many every n-th with its position."""
    step = 1 if len(tokens) <= 40 else math.ceil(len(tokens) / 32)
    at = range(0, len(tokens), step)
    labels = [prettify(tokens[n])[:14] + (f"  {first + n}" if step > 1 else "") for n in at]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(at), labels, fontsize=8 if len(at) <= 24 else 7, parse_math=False)
    if which == "x":
        for label in axis.get_ticklabels():
            label.set(rotation=90 if len(at) > 16 else 45, ha="center" if len(at) > 16 else "right")
            label.set_rotation_mode("default" if len(at) > 16 else "anchor")

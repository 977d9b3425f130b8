"""Images retrieved from a classical and a modern Hopfield network, their energies step by step, and their basins."""

from typing import TYPE_CHECKING

from ..memory_demo import MemoryDemo, verdict
from .drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = {"classical": ORANGE, "modern": BLUE}
# inches
IMAGES_WIDTH, BELOW = 7.2, 3.0


def draw_memory(result: MemoryDemo) -> Drawing:
    """An image a column, as stored, damaged and retrieved; below them energies and the share retrieved."""
    N = len(result.names)
    above = 4 * (min(1.0, IMAGES_WIDTH / len(result.recalls)) + 0.3) + 0.4
    figure = sheet(8.2, above + BELOW, f"{N} images in a classical and a modern Hopfield network")
    top, bottom = figure.subfigures(2, 1, height_ratios=(above, BELOW))
    _draw_images(top, result)
    left, middle, right = bottom.subplots(1, 3, width_ratios=(1, 1, 1.35))
    _draw_energies(left, result, "classical")
    _draw_energies(middle, result, "modern")
    _draw_basins(right, result)
    caption = (
        f"{' '.join(verdict(result))} A classical step turns each pixel once, in random order; a modern one is one "
        f"update at β = {result.beta:g}. Energies are one line an image, each network on its own scale. Basins: "
        f"{result.trials} retrievals an image and percentage, thin lines single images, thick lines their mean."
    )
    return Drawing("hopfield", figure, caption)


def _draw_images(figure: "SubFigure", result: MemoryDemo) -> None:
    panels = figure.subplots(4, len(result.recalls), squeeze=False)
    for column, recall in zip(panels.T, result.recalls, strict=True):
        hidden = recall is result.recalls[-1]
        column[0].set_title(f"half of\n{recall.name}" if hidden else recall.name, fontsize=8.5)
        rows = (
            (recall.stored, None),
            (recall.damaged, recall.wrong),
            (recall.classical.state, recall.classical.wrong),
            (recall.modern.state, recall.modern.wrong),
        )
        for axes, (image, wrong) in zip(column, rows, strict=True):
            axes.imshow(image.numpy(), cmap="Greys", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=GREY, linewidth=0.6)
            if wrong is not None:
                axes.set_xlabel(f"{wrong} wrong", fontsize=7, color=INK if wrong else GREY, labelpad=2)
    for axes, name in zip(panels[:, 0], ("stored", "damaged", "classical", "modern"), strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9.5, color=COLOURS.get(name, INK))


def _draw_energies(axes: "Axes", result: MemoryDemo, which: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for recall in result.recalls:
        energies = getattr(recall, which).energies
        axes.plot(range(len(energies)), energies, "o-", color=COLOURS[which], alpha=0.7, markersize=3, linewidth=1.1)
    axes.set_title(f"{which}: energy", fontsize=10, color=COLOURS[which])
    axes.set_xlabel("after step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)


def _draw_basins(axes: "Axes", result: MemoryDemo) -> None:
    percent = [basin.percent for basin in result.basins]
    for which, colour in COLOURS.items():
        shares = [getattr(basin, which) for basin in result.basins]
        for image in zip(*shares, strict=True):
            axes.plot(percent, [100 * share for share in image], color=colour, alpha=0.35, linewidth=0.8)
        means = [100 * sum(each) / len(each) for each in shares]
        axes.plot(percent, means, "o-", color=colour, label=which, markersize=4, linewidth=2)
    axes.set_title("basins", fontsize=10, loc="left")
    axes.set_ylabel("% retrieved", fontsize=9, labelpad=2)
    axes.set_xlabel("% of pixels flipped (thin: single images)", fontsize=9)
    axes.set(ylim=(-4, 104))
    # above the axes: within them lines may run anywhere
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1.03, 0.98))
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.tick_params(labelsize=8)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

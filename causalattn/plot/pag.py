"""A partial ancestral graph: tokens on a circle, on a line or anywhere, and the mark at each end of each edge."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..discovery.pag import PAG, Mark
from .drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet
from .pag_layout import TEXT, Layout, Name, circle, free, line, path, text_width
from .window import prettify

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# inches: half a token's width, the length of an arrow head and half its width, a circle's radius
TOKEN, HEAD, HALF, RING = 0.045, 0.12, 0.05, 0.044
# inches of height
TITLE, LEGEND = 0.42, 0.64
STUB = TOKEN + HEAD + 0.03
LONGEST = 24
# points, and the share of its colour that is left of what is not highlighted
WIDTH, THINNEST, WIDEST = 1.3, 0.5, 3.2
FAINT = 0.25
COLOURS = {
    "-->": (BLUE, "a → b: a is a cause of b"),
    "<->": (ORANGE, "a ↔ b: a hidden common cause"),
    "o": (GREY, "o: either mark is possible"),
    "---": (INK, "a — b: selected on"),
}


def draw_pag(
    pag: PAG,
    *,
    positions: str | Sequence[Sequence[float]] = "circle",
    ax: "Axes | None" = None,
    strengths: np.ndarray | None = None,
    highlight: Sequence[int] = (),
    title: str | None = None,
) -> Drawing:
    """Draw a graph with the mark at both ends of every edge: arrow head, circle, or none for a tail.

    A token is as long as its edges need to end side by side. Blue is a → b, orange a ↔ b, grey has a circle.

    Args:
        pag: the graph; up to 40 tokens or so can be read.
        positions: "circle", clockwise from the top; "line", left to right, as the text runs; or points [T, 2], with
            straight edges and names beside, whose room is yours to leave.
        ax: where to draw; by default a figure of its own, as large as the graph needs.
        strengths: [T, T]; an edge is as wide as the larger absolute value of its two, relative to the largest edge.
        highlight: tokens to draw in bold, other edges than those among them faint.
        title: of the figure or of ax.

    Raises:
        ValueError: positions, strengths or highlight do not fit the graph.

    Example:
        >>> pag = PAG.from_edges([(0, 1, "o->"), (2, 1, "-->")], ["storm", "sank", "ship"])
        >>> drawing = draw_pag(pag)
        >>> drawing.name, drawing.caption.partition(";")[0]
        ('pag', '2 edges among 3 tokens')
    """
    labels = [_label(name) for name in pag.names]
    layout = _layout(pag, labels, positions)
    widths = _widths(pag, strengths)
    chosen = _chosen(pag, highlight)
    count = len(widths)
    title = f"{count} edge{'s' * (count != 1)} among {len(labels)} tokens" if title is None else title
    low, high = _extent(pag, layout, labels)
    ax, scale = _place(ax, title, low, high)
    # the strongest in front
    for (a, b), width in sorted(widths.items(), key=lambda each: each[1]):
        faint = chosen and not {a, b} <= chosen
        share = FAINT if faint else 1.0 if strengths is None else 0.4 + 0.6 * width / WIDEST
        _draw_edge(ax, pag, layout, (a, b), width * scale, _tint(_colour(pag, a, b), share), order=0 if faint else 1)
    for a, (bar, name) in enumerate(zip(layout.bars, layout.names, strict=True)):
        _draw_token(ax, a, bar, name, labels[a], scale, bold=a in chosen, faint=bool(chosen) and a not in chosen)
    _legend(ax, pag, scale)
    caption = (
        f"{count} edges among {len(labels)} tokens; if every test is right: an arrow head at b, b is no cause of a; no "
        "mark at a, a is a cause of b, or of what was selected on; a circle, the tests leave it open."
    )
    return Drawing("pag", ax.figure, caption + ("" if strengths is None else " Wider edges are stronger."))


def _place(ax: "Axes | None", title: str, low: np.ndarray, high: np.ndarray) -> tuple["Axes", float]:
    """Axes that hold these corners, and how many inches one of the drawing has on paper: 1 in a figure of its own."""
    wide, tall = high - low
    if ax is None:
        size, scale = (max(4.6, wide + 0.2), tall + TITLE), 1.0
        figure = sheet(*size, title)
        figure.set_layout_engine("none")
        ax = figure.add_axes((0.1 / size[0], 0, 1 - 0.2 / size[0], tall / size[1]))
    else:
        ax.set_title(title, fontsize=10, parse_math=False)
        box = ax.get_position()
        size = ax.figure.get_size_inches() * (box.width, box.height)
        scale = min(1.5, size[0] / wide, size[1] / tall)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()
    return ax, scale


def _label(name: str) -> str:
    """A name as one reads it, without the middle if it is long: what follows an @ tells repeated tokens apart."""
    text = prettify(name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 10]}…{text[-9:]}"


def _layout(pag: PAG, labels: list[str], positions: str | Sequence[Sequence[float]]) -> Layout:
    if isinstance(positions, str):
        if positions not in ("circle", "line"):
            raise ValueError(f'positions must be "circle", "line" or points, got {positions!r}')
        return (circle if positions == "circle" else line)(pag, labels)
    points = np.asarray(positions, dtype=float)
    if points.shape != (len(labels), 2) or not np.isfinite(points).all():
        raise ValueError(f"positions must be finite and of shape {[len(labels), 2]}, got {[*points.shape]}")
    return free(pag, points)


def _widths(pag: PAG, strengths: np.ndarray | None) -> dict[tuple[int, int], float]:
    """The width of each edge, in points."""
    edges = [(a, b) for a, b, _ in pag.edges()]
    if strengths is None:
        return dict.fromkeys(edges, WIDTH)
    values = np.abs(np.asarray(strengths, dtype=float))
    if values.shape != pag.marks.shape or not np.isfinite(values[pag.skeleton]).all():
        raise ValueError(f"strengths must be finite and of shape {[*pag.marks.shape]}, got {[*values.shape]}")
    values = np.maximum(values, values.T)
    top = max((values[edge] for edge in edges), default=0) or 1
    return {edge: THINNEST + (WIDEST - THINNEST) * float(values[edge]) / top for edge in edges}


def _tint(colour: str, share: float) -> tuple[float, ...]:
    """The share of a colour, the rest white: unlike a transparent one it hides what lies behind."""
    from matplotlib.colors import to_rgb

    return tuple(1 - share * (1 - part) for part in to_rgb(colour))


def _chosen(pag: PAG, highlight: Sequence[int]) -> set[int]:
    chosen = {int(a) for a in highlight}
    if not chosen <= {*range(len(pag.names))}:
        raise ValueError(f"highlight must lie in 0…{len(pag.names) - 1}, got {sorted(chosen)}")
    return chosen


def _colour(pag: PAG, a: int, b: int) -> str:
    marks = {int(pag.marks[a, b]), int(pag.marks[b, a])}
    kind = "o" if Mark.CIRCLE in marks else {(2,): "<->", (3,): "---"}.get((*marks,), "-->")
    return COLOURS[kind][0]


def _draw_edge(
    ax: "Axes", pag: PAG, layout: Layout, edge: tuple[int, int], width: float, colour: tuple[float, ...], *, order: int
) -> None:
    from matplotlib.patches import Circle, PathPatch, Polygon
    from matplotlib.path import Path

    a, b = edge
    codes = [Path.MOVETO, Path.LINETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    curve = PathPatch(Path(path(layout, a, b, STUB), codes), fill=False, edgecolor=colour, linewidth=width)
    curve.set(zorder=order, gid=f"edge {a} {b}", capstyle="butt")
    ax.add_patch(curve)
    for u, v in ((b, a), (a, b)):
        point, out = layout.ends[v, u]
        side = np.array([-out[1], out[0]])
        tip, foot = point + TOKEN * out, point + (TOKEN + HEAD) * out
        if pag.marks[u, v] == Mark.ARROW:
            mark = Polygon([tip, foot + HALF * side, foot - HALF * side], facecolor=colour, linewidth=0)
        elif pag.marks[u, v] == Mark.CIRCLE:
            mark = Circle(tip + (RING + 0.025) * out, RING, facecolor="white", edgecolor=colour, linewidth=1.1)
        else:
            continue
        mark.set(zorder=order + 0.5, gid=f"mark {u} {v}")
        ax.add_patch(mark)


def _draw_token(
    ax: "Axes", a: int, bar: np.ndarray, name: Name, label: str, scale: float, *, bold: bool, faint: bool
) -> None:
    from matplotlib.lines import Line2D

    colour = _tint(INK, 2 * FAINT if faint else 1)
    thick = 2 * TOKEN * 72 * scale * (1.25 if bold else 1)
    # a line without length is not drawn
    dot = {"marker": "o", "markersize": thick, "markeredgewidth": 0} if len(bar) == 1 else {}
    ax.add_line(
        Line2D(*bar.T, color=colour, linewidth=thick, solid_capstyle="round", zorder=3, gid=f"token {a}", **dot)
    )
    ax.text(
        name.x, name.y, label, rotation=name.rotation, rotation_mode="anchor", ha=name.ha, va=name.va, color=colour,
        fontsize=TEXT * scale, weight="bold" if bold else "normal", parse_math=False, gid=f"name {a}",
        bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3}, zorder=4,
    )  # fmt: skip


def _extent(pag: PAG, layout: Layout, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The corners of all that is drawn, names and legend included."""
    points = [*layout.bars, np.zeros((1, 2))]
    points += [path(layout, a, b, STUB)[[0, 1, 4, 5]] for a, b, _ in pag.edges()]
    for a, b, _ in pag.edges():
        curve = path(layout, a, b, STUB)[1:5]
        points.append((curve[0] + 3 * curve[1] + 3 * curve[2] + curve[3])[None] / 8)
    for name, label in zip(layout.names, labels, strict=True):
        turn = math.radians(name.rotation)
        along, across = np.array([math.cos(turn), math.sin(turn)]), np.array([-math.sin(turn), math.cos(turn)])
        width = text_width(label)
        start = {"left": 0, "center": -0.5, "right": -1}[name.ha] * width
        up = {"bottom": 0.5, "center": 0, "top": -0.5}[name.va] * 0.15
        middle = np.array([name.x, name.y]) + up * across
        points += [(middle + (start + s * width) * along + t * across)[None] for s in (0, 1) for t in (-0.08, 0.08)]
    every = np.concatenate(points)
    margin = TOKEN + 0.05
    return every.min(0) - margin - (0, LEGEND), every.max(0) + margin


def _legend(ax: "Axes", pag: PAG, scale: float) -> None:
    """The colours that occur."""
    from matplotlib.lines import Line2D

    used = {_colour(pag, a, b) for a, b, _ in pag.edges()}
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=text) for colour, text in COLOURS.values() if colour in used
    ]
    if handles:
        size = 8 * scale
        # what a mark says holds of the graph, and the graph hangs on its tests
        ax.legend(
            handles=handles, loc="lower center", ncols=2, fontsize=size, frameon=False, borderaxespad=0.3,
            title="if every test is right:", title_fontsize=size,
        )  # fmt: skip

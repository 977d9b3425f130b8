"""Where the tokens, names and edge ends of a graph lie, in inches: no two names and no two marks on one another."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..discovery.pag import PAG

# points
TEXT = 9
# inches: from one edge end to the next at a token, from token to token, a line of text, from a token to its name
STEP, GAP, LINE, PAD = 0.13, 0.12, 0.17, 0.16
SMALLEST_RADIUS = 0.95
WIDEST_LINE = 9.0


class Name(NamedTuple):
    """Where a name is anchored, and how."""

    x: float
    y: float
    rotation: float
    ha: str
    va: str


class Layout(NamedTuple):
    """bars[a] [n, 2], the line that is token a; ends[a, b], the point where edge a–b leaves a, and its direction."""

    bars: list[np.ndarray]
    names: list[Name]
    ends: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


def text_width(text: str) -> float:
    """How many inches wide a name is, or would be in bold."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        # a token in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        width, *_ = text_to_path.get_text_width_height_descent(text, FontProperties(size=TEXT, weight="bold"), False)
    # its letters may be drawn on whole pixels
    return (1.04 * width + 1) / 72


def others(pag: PAG, a: int) -> list[int]:
    """The tokens that a has edges with, in the order of ends along it in which edges cross least."""
    return sorted(pag.adjacent(a), key=lambda b: (b - a) % len(pag.names), reverse=True)


def circle(pag: PAG, labels: Sequence[str]) -> Layout:
    """Tokens clockwise from the top, each as long as its edges need, names outside."""
    ends = [others(pag, a) for a in range(len(labels))]
    room = np.array([max(LINE + 0.04, STEP * len(each)) + GAP for each in ends])
    radius = max(SMALLEST_RADIUS, room.sum() / (2 * math.pi))
    # from the middle of the first to the middle of each
    turn = 2 * math.pi * (np.cumsum(room) - room / 2 - room[:1] / 2) / max(room.sum(), STEP)
    level = [_outside(angle, radius, rotate=False) for angle in turn]
    names = level if _apart(level, labels) else [_outside(angle, radius, rotate=True) for angle in turn]
    bars, places = [], {}
    for a, angle in enumerate(turn):
        at = angle + _steps(len(ends[a])) / radius
        points = np.stack([np.sin(at), np.cos(at)], 1)
        bars.append(radius * (points if len(ends[a]) else np.array([[math.sin(angle), math.cos(angle)]])))
        places |= {(a, b): (radius * point, -point) for b, point in zip(ends[a], points, strict=True)}
    return Layout(bars, names, places)


def line(pag: PAG, labels: Sequence[str]) -> Layout:
    """Tokens from left to right, each as long as its edges need, names below, edges above."""
    ends = [others(pag, a) for a in range(len(labels))]
    room = np.array([max(LINE, STEP * len(each)) + GAP for each in ends])
    level = np.maximum(room, [text_width(label) + GAP for label in labels])
    flat = level.sum() <= WIDEST_LINE
    room = level if flat else room
    centre = np.cumsum(room) - room / 2
    bars, places = [], {}
    for a, x in enumerate(centre):
        points = np.stack([x + _steps(len(ends[a])), np.zeros(len(ends[a]))], 1)
        bars.append(points if len(ends[a]) else np.array([[x, 0.0]]))
        places |= {(a, b): (point, np.array([0.0, 1.0])) for b, point in zip(ends[a], points, strict=True)}
    names = [Name(x, -PAD, 0, "center", "top") if flat else Name(x, -PAD, 90, "right", "center") for x in centre]
    return Layout(bars, names, places)


def free(pag: PAG, positions: np.ndarray) -> Layout:
    """Tokens where positions [T, 2] say, the nearest two of them an inch apart, straight edges, names beside."""
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    apart[np.diag_indices(len(apart))] = np.inf
    nearest = apart.min(initial=np.inf)
    if not nearest > 0:
        a, b = np.argwhere(apart == 0)[0]
        raise ValueError(f"positions must be apart, got tokens {a} and {b} at the same one")
    points = (positions - positions.min(0, initial=np.inf)) / (nearest if np.isfinite(nearest) else 1)
    ways = {(a, b): points[b] - points[a] for a, b in np.argwhere(pag.skeleton).tolist()}
    places = {(a, b): (points[a], way / np.linalg.norm(way)) for (a, b), way in ways.items()}
    names = [_beside(x, y, [places[a, b][1] for b in pag.adjacent(a)]) for a, (x, y) in enumerate(points)]
    return Layout([point[None] for point in points], names, places)


def path(layout: Layout, a: int, b: int, stub: float) -> np.ndarray:
    """A cubic curve from a to b [6, 2], straight for the length of stub at both ends, where the marks are."""
    (start, out), (stop, back) = layout.ends[a, b], layout.ends[b, a]
    near, far = start + stub * out, stop + stub * back
    reach = 0.38 * np.linalg.norm(far - near)
    return np.array([start, near, near + reach * out, far + reach * back, far, stop])


def _steps(n: int) -> np.ndarray:
    return STEP * (np.arange(n) - (n - 1) / 2)


def _outside(angle: float, radius: float, *, rotate: bool) -> Name:
    """The name of a token on a circle: along its spoke, or level."""
    x, y = math.sin(angle), math.cos(angle)
    away = radius + PAD
    right = x >= -1e-9
    if rotate:
        turned = 90 - math.degrees(angle) + (0 if right else 180)
        return Name(away * x, away * y, turned, "left" if right else "right", "center")
    if abs(x) < 0.1:
        return Name(away * x, away * y, 0, "center", "bottom" if y > 0 else "top")
    return Name(away * x, away * y, 0, "left" if right else "right", "center")


def _beside(x: float, y: float, edges: Sequence[np.ndarray]) -> Name:
    """The name of a token on that of its sides which edges leave most room: below, above, right or left."""
    sides = [(0, -1, "center", "top"), (0, 1, "center", "bottom"), (1, 0, "left", "center"), (-1, 0, "right", "center")]
    right, up, ha, va = min(sides, key=lambda side: max((out @ side[:2] for out in edges), default=-1))
    return Name(x + PAD * right, y + PAD * up, 0, ha, va)


def _box(name: Name, label: str) -> tuple[float, float, float, float]:
    """About where a level name lies: left, bottom, right, top."""
    width = text_width(label)
    left = name.x - width * {"left": 0, "center": 0.5, "right": 1}[name.ha]
    bottom = name.y - LINE * {"bottom": 0, "center": 0.5, "top": 1}[name.va]
    return left, bottom, left + width, bottom + LINE


def _apart(names: Sequence[Name], labels: Sequence[str]) -> bool:
    boxes = np.array([_box(name, label) for name, label in zip(names, labels, strict=True)]).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    overlap = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1)
    return int(overlap.sum()) == len(boxes)

"""Figures of an analysis: attention in a window, one edge's outer product, scores with nulls, edges above null.

They are built by matplotlib's object interface, without pyplot or global state; nothing drawn grows with the text.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..analysis import Report, pick_heads, pick_sequence, window_probs
from ..integrations.transformers.attention import AttentionCall
from .drawing import ATTENTION, BLUE, DIVERGING, GREY, INK, ORANGE, Drawing, heatmap, sheet, token_ticks
from .long import Weight, draw_map, draw_top_edges, largest_weights
from .pag import draw_pag
from .window import (
    EDGES,
    WINDOW,
    Edge,
    choose_window,
    edges_above_null,
    prettify,
    real_tokens,
    strength,
    strongest_heads,
    telling_edge,
    window_mask,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "EDGES", "WINDOW", "Drawing", "Edge", "Weight", "choose_window", "draw_all", "draw_attention", "draw_edges",
    "draw_grid", "draw_map", "draw_outer_product", "draw_pag", "draw_scores", "draw_top_edges", "edges_above_null",
    "largest_weights", "prettify", "real_tokens", "strength", "strongest_heads", "telling_edge", "window_mask",
]  # fmt: skip

CELLS_WITH_VALUES = 20
PANELS = 8


def draw_attention(A: np.ndarray, tokens: Sequence[str], *, title: str, first: int = 0) -> Drawing:
    """The map A [W, W] and A − Aᵀ beside it; first is the position of the first token."""
    W = len(tokens)
    side = 4.6 if W <= CELLS_WITH_VALUES else 6.2
    figure = sheet(2 * side + 1.2, side + 0.5, title)
    left, right = figure.subplots(1, 2)
    heatmap(left, A, "A: row i attends key j", ATTENTION, 0, A.max() or 1)
    bound = np.abs(A - A.T).max() or 1
    heatmap(right, A - A.T, "A − Aᵀ", DIVERGING, -bound, bound)
    for axes in (left, right):
        token_ticks(axes, "x", tokens, first)
        token_ticks(axes, "y", tokens, first)
        axes.set(xlabel="key j", ylabel="query i")
    share = 1 - A.sum() / max(1, (A.sum(1) > 0).sum())
    outside = f" {share:.0%} of these rows' mass lies on keys outside the window." if share > 0.005 else ""
    caption = f"{title}. Right: red where i attends j more than j attends i, blue where less.{outside}"
    return Drawing("attention", figure, caption)


def draw_outer_product(
    q: np.ndarray,
    k: np.ndarray,
    A: np.ndarray,
    tokens: Sequence[str],
    edge: tuple[int, int],
    *,
    scale: float,
    head: str,
) -> Drawing:
    """The outer product q_i kᵀ_j of one edge, whose trace is q_i · k_j, and the posterior A it takes part in.

    q, k: [D], of the edge (i, j) within the window that A [W, W] and tokens cover.
    """
    i, j = edge
    row, key = prettify(tokens[i]), prettify(tokens[j])
    figure = sheet(11.4, 5.6, f"{head}: the outer product behind one attention weight")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    outer = np.outer(q, k)
    bound = np.abs(outer).max() or 1
    heatmap(left, outer, "", DIVERGING, -bound, bound)
    left.plot([-0.5, len(k) - 0.5], [-0.5, len(q) - 0.5], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    trace = float(q @ k)
    left.set_title(
        f"q_i ⊗ k_j,  i = “{row}”,  j = “{key}”\ntrace = q·k = {trace:.3f};  × {scale:.4g} = {trace * scale:.3f}",
        fontsize=10, parse_math=False,
    )  # fmt: skip
    left.set(xlabel="dimension of k_j  (dashed: the diagonal that the trace sums)", ylabel="dimension of q_i")
    if len(tokens) <= CELLS_WITH_VALUES:
        _posterior_matrix(right, A, tokens, edge)
    else:
        _posterior_row(right, A[i], tokens, i, j)
    caption = (
        f"The score of an edge is the trace of a rank-one matrix, tr(q_i k_jᵀ) = q_i·k_j. Normalised over the keys it "
        f"becomes A_ij = {A[i, j]:.3f}, the attention posterior of “{key}” for “{row}” in {head}."
    )
    return Drawing("outer-product", figure, caption)


def draw_scores(report: Report, *, sequence: int = 0) -> Drawing:
    """Every head's scores, each on the band mean ± 2 std of its permutation null; without the sink hollow."""
    rows = [row for row in report.rows(top=0) if row["sequence"] == sequence]
    causal = any(row["causal"] for row in rows)
    layers = report.layer_ids
    per_panel = max(1, 72 // max(map(len, report.head_ids)), math.ceil(len(layers) / PANELS))
    chunks = [layers[n : n + per_panel] for n in range(0, len(layers), per_panel)]
    kinds = ["unmasked", "masked"] if causal else ["masked"]
    figure = sheet(12.5, 0.9 + 2.7 * len(chunks) * len(kinds), "DAG score of every head beside its permutation null")
    panels = iter(figure.subplots(len(chunks) * len(kinds), 1, squeeze=False)[:, 0])
    for kind in kinds:
        for chunk in chunks:
            _score_panel(axes := next(panels), [row for row in rows if row["layer"] in chunk], kind)
            label = "mass below the diagonal" if not causal else f"{kind}: mass below the diagonal"
            axes.set_ylabel(label, fontsize=8)
    _score_legend(figure, causal)
    note = " The masked score of a causal layer is 1 − mean A_ii whatever it learnt." if causal else ""
    caption = (
        f"A point inside its band says no more than chance (mean ± 2 standard deviations of row permutations).{note}"
    )
    return Drawing("scores", figure, caption)


def draw_edges(edges: Sequence[Edge], tokens: Sequence[str], *, head: str, first: int = 0) -> Drawing:
    """Attention edges above null: arcs over the tokens, above the line looking back, below it looking ahead."""
    W = len(tokens)
    figure = sheet(12.5, 5.2, f"{head}: attention edges above null")
    axes = figure.subplots()
    top = edges[0][2] if edges else 1
    for i, j, lift in reversed(edges):
        _arc(axes, i, j, lift / top)
    ends = {end for i, j, _ in edges for end in (i, j)}
    axes.scatter(range(W), np.zeros(W), s=9, color=[INK if n in ends else "#C9CDD3" for n in range(W)], zorder=3)
    back, ahead = (max((s * (i - j) for i, j, _ in edges), default=0) / 2 for s in (1, -1))
    margin = 0.04 * max(back, ahead, 1)
    axes.set(xlim=(-1, W), ylim=(-max(ahead, 0) - 3 * margin, max(back, 0) + 3 * margin), yticks=[])
    token_ticks(axes, "x", tokens, first)
    for name in ("top", "left", "right"):
        axes.spines[name].set_visible(False)
    axes.text(0.003, 0.97, "query to the right: looks back", color=BLUE, fontsize=8, transform=axes.transAxes, va="top")
    if ahead > 0:
        axes.text(0.003, 0.03, "query to the left: looks ahead", color=ORANGE, fontsize=8, transform=axes.transAxes)
    least = edges[-1][2] if edges else 0
    caption = (
        f"{len(edges)} attention edges above null in {head}: A_ij exceeds its mean at the same distance i − j by at "
        f"least {least:.4f} (threshold), at most {edges[0][2] if edges else 0:.4f}. Width is the lift, not an effect."
    )
    axes.set_xlabel(caption, fontsize=8, wrap=True)
    return Drawing("edges", figure, caption)


def draw_grid(report: Report, *, sequence: int = 0) -> Drawing:
    """z of every head, layer × head: the DAG score against its null, and the same without the sink."""
    rows = [row for row in report.rows(top=0) if row["sequence"] == sequence]
    causal = any(row["causal"] for row in rows)
    columns = sorted({row["head"] for row in rows})
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    names = {
        "unmasked_z" if causal else "z": "unmasked scores" if causal else "DAG score",
        "sink_removed_z": "sink removed",
    }
    wide, high = 0.42 * len(columns) + 1.4, 0.36 * len(layers) + 1.5
    figure = sheet(
        min(16, max(9, 2 * wide)), min(16, max(3.2, high)), "z of the DAG score against its permutation null"
    )
    grids = {name: np.full((len(layers), len(columns)), np.nan) for name in names}
    for row in rows:
        for name, grid in grids.items():
            value = row["z"] if name == "unmasked_z" and not row["causal"] else row[name]
            grid[layers.index(row["layer"]), columns.index(row["head"])] = np.nan if value is None else value
    bound = max(4.0, max((float(np.nanmax(np.abs(g))) for g in grids.values() if np.isfinite(g).any()), default=4.0))
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        _z_heatmap(axes, grids[name], title, bound, layers, columns)
    caption = (
        "z = (score − null mean) / null std; |z| below 2 is within chance. Red: more mass on earlier keys than chance."
    )
    return Drawing("z-grid", figure, caption)


def draw_all(report: Report, calls: dict[int, AttentionCall], *, title: str = "", sequence: int = 0) -> list[Drawing]:
    """Every figure of a report; calls, from `capture`, holds the last analyzed layer and the strongest head's.

    A text longer than the window has two more, of the whole text.
    """
    window = choose_window(report, sequence=sequence)
    whole = report.tokens[sequence]
    tokens = whole[window.start : window.stop]
    last, heads = report.layer_ids[-1], report.head_ids[-1]
    mean = window_probs(pick_heads(calls[last], heads), window, sequence=sequence).numpy().mean(0)
    layer, head = strongest_heads(report, 1, sequence)[0]
    name = f"layer {layer}, head {head}"
    call = pick_sequence(pick_heads(calls[layer], [head]), sequence)
    A = window_probs(call, window)[0].numpy()
    intervals = report.intervals[report.layer_ids.index(layer)]
    edges = edges_above_null(A, mask=window_mask(intervals, window, sequence=sequence))
    i, j, _ = telling_edge(edges, intervals.first[sequence], window)
    q, k = (x[0, 0, window.start + n].float().cpu().numpy() for x, n in ((call.q, i), (call.k, j)))
    scale = len(q) ** -0.5 if call.scale is None else call.scale
    where = "" if len(window) == len(whole) else f", tokens {window.start} to {window.stop - 1}"
    heading = f"{title}layer {last}, mean over {len(heads)} heads{where}"
    drawings = [
        draw_attention(mean, tokens, title=heading, first=window.start),
        draw_outer_product(q, k, A, tokens, (i, j), scale=scale, head=name),
        draw_scores(report, sequence=sequence),
        draw_edges(edges[: 2 * len(tokens)], tokens, head=name, first=window.start),
        draw_grid(report, sequence=sequence),
    ]
    if len(window) < len(real_tokens(report, sequence)):
        drawings += [draw_map(call, window, head=name), draw_top_edges(largest_weights(call), whole, head=name)]
    return drawings


def _posterior_matrix(axes: "Axes", A: np.ndarray, tokens: Sequence[str], edge: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    top = A.max() or 1
    heatmap(axes, A, "posterior A_ij = exp(S_ij − lse_i)", ATTENTION, 0, top)
    for i, j in np.argwhere(A > 0):
        text = f"{A[i, j]:.2f}".lstrip("0") if A[i, j] < 0.995 else "1"
        axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if A[i, j] > 0.6 * top else INK)
    axes.add_patch(Rectangle((edge[1] - 0.5, edge[0] - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2))
    token_ticks(axes, "x", tokens, 0)
    token_ticks(axes, "y", tokens, 0)


def _posterior_row(axes: "Axes", row: np.ndarray, tokens: Sequence[str], i: int, j: int, n: int = 15) -> None:
    keys = np.argsort(-row, kind="stable")[:n]
    places = range(len(keys))
    axes.barh(places, row[keys], color=[ORANGE if key == j else BLUE for key in keys])
    axes.set_yticks(
        places, [f"{prettify(tokens[key])[:14]} ({key - i:+d})" for key in keys], fontsize=8, parse_math=False
    )
    for place, key in zip(places, keys, strict=True):
        axes.text(row[key], place, f" {row[key]:.3f}", va="center", fontsize=7, color=INK)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12 * row.max()), xlabel="A_ij")
    axes.set_title(f"posterior of “{prettify(tokens[i])}”: its {len(keys)} largest keys", fontsize=10, parse_math=False)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)


def _score_panel(axes: "Axes", rows: list[dict], kind: str) -> None:
    if kind == "unmasked":
        series = [("unmasked", "unmasked_null", "unmasked_null_std", 0.0, BLUE, BLUE)]
    else:
        series = [
            ("dag_score", "null", "null_std", -0.17, BLUE, BLUE),
            ("sink_removed", "sink_removed_null", "sink_removed_null_std", 0.17, ORANGE, "white"),
        ]
    x = np.arange(len(rows))
    step = math.ceil(len(rows) / 100)
    for score, null, std, shift, edge, face in series:
        value, mean, spread = (np.array([row[name] for row in rows], dtype=float) for name in (score, null, std))
        axes.bar(x + shift, 4 * spread, 0.3, mean - 2 * spread, color=edge, alpha=0.22, linewidth=0)
        axes.hlines(mean, x + shift - 0.15, x + shift + 0.15, color=edge, linewidth=1)
        axes.scatter(x + shift, value, s=16, facecolor=face, edgecolor=edge, linewidth=1, zorder=3)
    starts = [n for n in x if n == 0 or rows[n]["layer"] != rows[n - 1]["layer"]]
    for n, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        axes.axvline(n - 0.5, color="#D5D8DD", linewidth=0.8, zorder=0)
        axes.text((n + stop - 1) / 2, 1.02, f"layer {rows[n]['layer']}", transform=axes.get_xaxis_transform(),
                  ha="center", fontsize=8, color=INK)  # fmt: skip
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_xticks(x[::step], [row["head"] for row in rows[::step]], fontsize=6)
    axes.set_xlabel("head", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)


def _score_legend(figure: "Figure", causal: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dot = {"linestyle": "", "marker": "o", "markersize": 5}
    handles = [
        Line2D([], [], **dot, color=BLUE, label="DAG score"),
        Line2D([], [], **dot, markeredgecolor=ORANGE, markerfacecolor="white", label="sink removed"),
        Patch(color=GREY, alpha=0.4, label="null mean ± 2 std, in the colour of its score"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _arc(axes: "Axes", i: int, j: int, weight: float) -> None:
    from matplotlib.patches import Arc

    back = i > j
    axes.add_patch(
        Arc(((i + j) / 2, 0), abs(i - j), abs(i - j), theta1=0 if back else 180, theta2=180 if back else 360,
            color=BLUE if back else ORANGE, linewidth=0.5 + 2.5 * weight, alpha=0.35 + 0.6 * weight)
    )  # fmt: skip


def _z_heatmap(axes: "Axes", grid: np.ndarray, title: str, bound: float, layers: list[int], heads: list[int]) -> None:
    from matplotlib.colors import SymLogNorm

    image = axes.imshow(grid, cmap=DIVERGING, norm=SymLogNorm(2, vmin=-bound, vmax=bound), aspect="auto")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(len(heads)), heads, fontsize=7)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    if len(heads) <= 16 and len(layers) <= 24:
        for i, j in np.argwhere(np.isfinite(grid)):
            strong = abs(image.norm(grid[i, j]) - 0.5) > 0.27
            text = f"{grid[i, j]:.0f}" if abs(grid[i, j]) >= 9.95 else f"{grid[i, j]:.1f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if strong else INK)
    marks = [mark for mark in (2, 5, 10, 30, 100, 300, 1000) if mark <= bound]
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks([*(-mark for mark in marks), 0, *marks], labels=[*(f"−{mark}" for mark in marks), "0", *marks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)

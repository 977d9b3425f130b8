"""Drawn graphs by what they contain: every mark at its end, no name and no mark on another."""

import io
import math
import warnings
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from causalattn import plot
from causalattn.discovery import PAG
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE

SYMBOLS = {"-->": BLUE, "<--": BLUE, "<->": ORANGE, "---": INK, "o-o": GREY, "o->": GREY, "<-o": GREY, "o--": GREY,
           "--o": GREY}  # fmt: skip
SHAPES = {"o": Circle, ">": Polygon, "<": Polygon}
WORDS = ["I", "storm", "intensified", "the", "antidisestablishmentarianism", "嵐が強まった", "$x$", ".", "sank"]


def random_pag(T, edges, seed=0, words=WORDS):
    rng = np.random.default_rng(seed)
    pairs = [*combinations(range(T), 2)]
    chosen = rng.permutation(len(pairs))[:edges]
    kinds = rng.choice([*SYMBOLS], len(chosen))
    drawn = [(*pairs[n], str(kind)) for n, kind in zip(chosen, kinds, strict=True)]
    return PAG.from_edges(drawn, [f"{words[n % len(words)]}@{n}" for n in range(T)])


def parts(drawing):
    """What was drawn, by what it stands for."""
    ax = drawing.figure.axes[0]
    return {artist.get_gid(): artist for artist in (*ax.patches, *ax.lines, *ax.texts) if artist.get_gid()}


def middle(patch):
    return np.array(patch.center) if isinstance(patch, Circle) else patch.get_xy()[:3].mean(0)


def corners(text, renderer):
    """The corners of a name as it is drawn, turned about its anchor."""
    turn = math.radians(text.get_rotation())
    text.set_rotation(0)
    left, bottom, right, top = text.get_window_extent(renderer).extents
    text.set_rotation(math.degrees(turn))
    anchor = text.get_transform().transform(text.get_position())
    level = np.array([(left, bottom), (right, bottom), (right, top), (left, top)]) - anchor
    return anchor + level @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])


def overlap(one, other):
    """Whether two rectangles share a point: no side of either has the other beyond it."""
    for box in (one, other):
        for side in (box[1] - box[0], box[2] - box[1]):
            a, b = one @ side, other @ side
            if a.max() <= b.min() or b.max() <= a.min():
                return False
    return True


def assert_names_apart(figure):
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    names = [text for ax in figure.axes for text in ax.texts if text.get_gid()]
    boxes = [corners(text, canvas.get_renderer()) for text in names]
    for (one, box), (other, around) in combinations(zip(names, boxes, strict=True), 2):
        assert not overlap(box, around), (one.get_text(), other.get_text())
    size = figure.bbox.size
    assert all((box >= 0).all() and (box <= size).all() for box in boxes)


@pytest.mark.parametrize("positions", ["circle", "line", [[0, 0], [2, 1], [5, 0]]])
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_each_end_has_its_mark(symbol, positions):
    drawing = plot.draw_pag(PAG.from_edges([(1, 2, symbol)], ["z", "a", "b"]), positions=positions)
    drawn = parts(drawing)
    tokens = [drawn[f"token {n}"].get_xydata().mean(0) for n in range(3)]
    for u, v, letter in ((2, 1, symbol[0]), (1, 2, symbol[2])):
        mark = drawn.get(f"mark {u} {v}")
        if letter == "-":
            assert mark is None
            continue
        assert type(mark) is SHAPES[letter] and np.linalg.norm(middle(mark) - tokens[v]) < 0.2
        if letter in "<>":
            tip, *feet = mark.get_xy()[:3]
            assert np.linalg.norm(tip - tokens[v]) < min(np.linalg.norm(foot - tokens[v]) for foot in feet)
    edge = drawn["edge 1 2"]
    assert np.allclose(edge.get_edgecolor()[:3], to_rgb(SYMBOLS[symbol]))
    ends = edge.get_path().vertices[[0, -1]]
    assert np.allclose(ends, [tokens[1], tokens[2]])


@pytest.mark.parametrize("positions", ["circle", "line"])
@pytest.mark.parametrize(
    ("T", "edges"), [(1, 0), (2, 1), (5, 8), (5, 0), (9, 14), (12, 66), (16, 20), (30, 45), (40, 90)]
)
def test_names_are_apart_and_within_the_figure(T, edges, positions):
    assert_names_apart(plot.draw_pag(random_pag(T, edges), positions=positions).figure)


@pytest.mark.parametrize("T", [3, 8, 13, 20])
def test_long_names_are_apart(T):
    pag = random_pag(T, T, words=["antidisestablishmentarianism", "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW"])
    for positions in ("circle", "line"):
        assert_names_apart(plot.draw_pag(pag, positions=positions).figure)


@given(
    T=st.integers(2, 14), share=st.floats(0, 1), seed=st.integers(0, 99), positions=st.sampled_from(["circle", "line"])
)
def test_marks_are_apart(T, share, seed, positions):
    pag = random_pag(T, round(share * T * (T - 1) / 2), seed)
    drawn = parts(plot.draw_pag(pag, positions=positions))
    marks = {gid: middle(patch) for gid, patch in drawn.items() if gid.startswith("mark")}
    expected = {f"mark {a} {b}" for a, b in np.argwhere((pag.marks == 1) | (pag.marks == 2)).tolist()}
    assert marks.keys() == expected
    # an arrow head is 0.1 inches wide
    assert all(np.linalg.norm(one - other) > 0.1 for one, other in combinations(marks.values(), 2))


@pytest.mark.parametrize("positions", ["circle", "line"])
def test_edges_of_one_token_leave_it_in_the_order_in_which_they_do_not_cross(positions):
    pag = PAG.from_edges([(0, 2, "o-o"), (1, 2, "o-o"), (2, 3, "o-o"), (2, 4, "o-o")], "abcde")
    drawn = parts(plot.draw_pag(pag, positions=positions))
    along = drawn["token 2"].get_xydata()
    ends = {edge: drawn[f"edge {edge}"].get_path().vertices for edge in ("1 2", "0 2", "2 4", "2 3")}
    assert np.allclose(along, [ends["1 2"][-1], ends["0 2"][-1], ends["2 4"][0], ends["2 3"][0]])


def test_a_figure_is_drawn_and_says_what_marks_mean():
    drawing = plot.draw_pag(random_pag(12, 20))
    pixels = image.imread(io.BytesIO(drawing.png(dpi=60)))
    assert drawing.name == "pag" and pixels[..., :3].std() > 0.01
    assert drawing.caption.startswith("20 edges among 12 tokens; if every test is right: an arrow head at b, b is no")
    assert "causal graph" not in drawing.caption
    labels = [text.get_text() for text in drawing.figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "a → b: a is a cause of b" and len(labels) == 4


def test_names_are_prettified_and_long_ones_cut_in_the_middle():
    pag = PAG(np.zeros((3, 3)), ["Ġstorm", "$x$", "antidisestablishmentarianism@17"])
    drawn = parts(plot.draw_pag(pag))
    assert [drawn[f"name {n}"].get_text() for n in range(3)] == ["storm", "$x$", "antidisestabli…ianism@17"]


def test_strong_edges_are_wide():
    pag = PAG.from_edges([(0, 1, "-->"), (1, 2, "-->"), (0, 2, "-->")], "abc")
    strengths = np.array([[9, -0.5, 0], [0, 9, 0.1], [0.25, 0, 9]])
    drawing = plot.draw_pag(pag, strengths=strengths)
    drawn = parts(drawing)
    widths = {edge: drawn[f"edge {edge}"].get_linewidth() for edge in ("0 1", "1 2", "0 2")}
    assert widths["0 1"] == pytest.approx(3.2) and widths["0 2"] == pytest.approx(1.85)
    assert widths["1 2"] == pytest.approx(0.5 + 2.7 * 0.2) and drawing.caption.endswith("Wider edges are stronger.")
    faint, strong = (drawn[f"edge {edge}"].get_edgecolor()[:3] for edge in ("1 2", "0 1"))
    assert np.allclose(strong, to_rgb(BLUE)) and min(faint) > min(strong)
    assert len({parts(plot.draw_pag(pag))[f"edge {edge}"].get_linewidth() for edge in widths}) == 1
    assert parts(plot.draw_pag(pag, strengths=0 * strengths))["edge 0 1"].get_linewidth() == 0.5


def test_what_is_highlighted_stands_out():
    pag = PAG.from_edges([(0, 1, "-->"), (1, 2, "-->")], "abc")
    drawn = parts(plot.draw_pag(pag, highlight=[0, 1]))
    assert [drawn[f"name {n}"].get_weight() for n in range(3)] == ["bold", "bold", "normal"]
    assert np.allclose(drawn["edge 0 1"].get_edgecolor()[:3], to_rgb(BLUE))
    assert min(drawn["edge 1 2"].get_edgecolor()[:3]) > 0.7
    assert drawn["edge 0 1"].get_zorder() > drawn["edge 1 2"].get_zorder()


@pytest.mark.parametrize("size", [(2.0, 2.0), (12.0, 3.0)])
def test_a_graph_fits_the_axes_it_is_given(size):
    figure = Figure(figsize=size)
    ax = figure.subplots()
    drawing = plot.draw_pag(random_pag(16, 24), ax=ax, title="$x$")
    assert drawing.figure is figure and ax.get_title() == "$x$" and len(figure.axes) == 1
    assert_names_apart(figure)


def test_tokens_may_stand_anywhere():
    points = np.array([[0.0, 0.0], [0.002, 0.0], [0.0, 0.004]])
    drawing = plot.draw_pag(PAG.from_edges([(0, 1, "o->"), (0, 2, "<->")], "abc"), positions=points)
    drawn = parts(drawing)
    at = np.array([drawn[f"token {n}"].get_xydata()[0] for n in range(3)])
    assert np.allclose(at, points * 500)
    # away from the edges up and to the right
    name = np.array(drawn["name 0"].get_position())
    assert name[0] == pytest.approx(0) and name[1] < 0
    assert_names_apart(drawing.figure)


def test_a_graph_without_tokens_is_drawn_as_none():
    for positions in ("circle", "line", np.zeros((0, 2))):
        drawing = plot.draw_pag(PAG(np.zeros((0, 0))), positions=positions)
        assert drawing.caption.startswith("0 edges among 0 tokens") and drawing.png(dpi=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "star"}, 'positions must be "circle", "line" or points, got \'star\''),
        ({"positions": [[0, 0]]}, r"positions must be finite and of shape \[2, 2\], got \[1, 2\]"),
        ({"positions": [[0, 0], [0, np.nan]]}, "positions must be finite"),
        ({"positions": [[1, 1], [1, 1]]}, "positions must be apart, got tokens 0 and 1 at the same one"),
        ({"strengths": np.ones((3, 3))}, r"strengths must be finite and of shape \[2, 2\], got \[3, 3\]"),
        ({"strengths": np.full((2, 2), np.inf)}, "strengths must be finite"),
        ({"highlight": [2]}, r"highlight must lie in 0…1, got \[2\]"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot.draw_pag(PAG.from_edges([(0, 1, "-->")], "ab"), **options)

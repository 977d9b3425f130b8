"""Windows against the whole matrices in float64, and figures by what they contain."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.colors import LogNorm
from matplotlib.patches import Arc
from tiny_models import PADDINGS, VOCAB, text_inputs, tiny, transformers

from causalattn import plot
from causalattn.analysis import analyze, capture, pick_heads, pick_sequence, window_probs
from causalattn.masks import causal, chunked

EPS = np.finfo(np.float32).eps
T = 19


def whole_map(call, sequence):
    """A [H, T, T] float64 by its definition."""
    T = call.q.shape[2]
    q, k = (x[sequence].double().cpu().numpy() for x in (call.q, call.k))
    k = k.repeat(len(q) // len(k), 0)
    scores = q @ k.transpose(0, 2, 1) * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = call.softcap * np.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.expand(call.q.shape[0], len(q), T, T)[sequence].double().cpu().numpy()
    seen = call.intervals.to_dense(T).expand(call.q.shape[0], T, T)[sequence].cpu().numpy()
    weights = np.where(seen, np.exp(scores), 0)
    extra = 0 if call.sink is None else np.exp(call.sink.double().cpu().numpy())[:, None, None]
    total = weights.sum(-1, keepdims=True) + extra
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def rounding(call):
    """How far off a probability may be: as its float32 score is, whose error grows with q and k."""
    return 2 * EPS * (1 + float(call.q.norm(dim=-1).max() * call.k.norm(dim=-1).max()) * (call.scale or 1))


@pytest.fixture(scope="module")
def long_text():
    """A report and the captured layers of 300 tokens through a tiny BERT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    inputs = {"input_ids": torch.randint(VOCAB, (1, 300))}
    tokens = [f"word{i}" for i in range(300)]
    return analyze(model, inputs, tokens=tokens), capture(model, inputs)


@pytest.fixture(scope="module")
def drawings(long_text):
    return {drawing.name: drawing for drawing in plot.draw_all(*long_text)}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_a_window_holds_the_values_of_the_whole_map(family, padding):
    model, inputs = tiny(family), text_inputs(padding)
    window = range(4, 15)
    for call in capture(model, inputs).values():
        expected = whole_map(call, 1)[:, 4:15, 4:15]
        ours = window_probs(call, window, sequence=1)
        assert ours.dtype == torch.float32 and np.abs(ours.numpy() - expected).max() <= rounding(call)


def test_a_window_is_no_softmax_over_the_window():
    call = capture(tiny("bert"), text_inputs())[0]
    assert (window_probs(call, range(4, 9)).sum(-1) < 0.9).any()


def test_a_window_of_an_unknown_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence must be from 0 to 1, got 2"):
        window_probs(capture(tiny("bert"), text_inputs())[0], range(4), sequence=2)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_window_is_where_the_strongest_heads_act(family):
    model, inputs = tiny(family), text_inputs()
    report, calls = analyze(model, inputs), capture(model, inputs)
    rows = {(row["layer"], row["head"]): row for row in report.rows() if row["sequence"] == 0}
    z = {head: abs(row["unmasked_z" if row["causal"] else "sink_removed_z"]) for head, row in rows.items()}
    act = np.zeros(T)
    for layer, head in sorted(z, key=z.get, reverse=True)[:5]:
        A = whole_map(calls[layer], 0)[head]
        seen = calls[layer].intervals.to_dense(T)[0].cpu().numpy()
        lift = np.maximum((A - seen / seen.sum(-1, keepdims=True)).sum(0), 0)
        lift[0] = 0
        act += z[layer, head] * lift
    best = int(np.argmax([act[n : n + 6].sum() for n in range(T - 5)]))
    assert plot.choose_window(report, size=6) == range(best, best + 6)
    assert plot.choose_window(report) == range(T)


def test_the_window_stays_within_the_real_tokens():
    report = analyze(tiny("bert"), text_inputs("left"))
    assert plot.choose_window(report, sequence=1) == range(6, T)
    window = plot.choose_window(report, size=5, sequence=1)
    assert len(window) == 5 and window.start >= 6


@pytest.mark.parametrize("mask", [None, causal(), chunked(7)], ids=["full", "causal", "chunked"])
def test_edges_exceed_the_mean_at_their_distance(mask):
    rng = np.random.default_rng(0)
    seen = np.ones((T, T), bool) if mask is None else mask.to_dense(T, T)[0].numpy()
    A = np.where(seen, rng.exponential(size=(T, T)), 0).astype(np.float32)
    A /= A.sum(-1, keepdims=True)
    expected = {}
    for i, j in np.argwhere(seen):
        alike = [A[a, b] for a, b in np.argwhere(seen) if a - b == i - j]
        if i != j and A[i, j] - np.mean(alike) > plot.window.EPSILON:
            expected[i, j] = A[i, j] - np.mean(alike, dtype=np.float64)
    edges = plot.edges_above_null(A, mask=None if mask is None else mask.resolve(T, T))
    assert {(e.i, e.j) for e in edges} == set(sorted(expected, key=expected.get, reverse=True)[: plot.EDGES])
    assert [e.lift for e in edges] == sorted((e.lift for e in edges), reverse=True)
    assert all(abs(e.lift - expected[e.i, e.j]) <= 2 * EPS for e in edges)
    assert plot.edges_above_null(A, 3) == plot.edges_above_null(A)[:3]


def test_the_mask_of_a_window_is_that_part_of_the_mask():
    intervals = (causal() & chunked(7)).resolve(T, T)
    ours = plot.window_mask(intervals, range(4, 15)).to_dense(11)
    assert torch.equal(ours, intervals.to_dense(T)[:, 4:15, 4:15])


def test_the_telling_edge_has_no_sink_for_its_key():
    edges = [plot.Edge(3, 0, 0.9), plot.Edge(2, 1, 0.5)]
    assert plot.telling_edge(edges, torch.tensor([0, 0]), range(4)) == (2, 1, 0.5)
    assert plot.telling_edge(edges, torch.tensor([5]), range(5, 9)) == (2, 1, 0.5)
    assert plot.telling_edge([], torch.tensor([0]), range(4)) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("token", "text"), [("Ġship", "ship"), ("▁ship", "ship"), ("##ed", "##ed"), ("Ċ", "⏎"), ("Ġ", "␣")]
)
def test_tokens_are_prettified(token, text):
    assert plot.prettify(token) == text


def test_all_figures_are_drawn_and_none_is_blank(drawings):
    assert list(drawings) == ["attention", "outer-product", "scores", "edges", "z-grid", "map", "top-edges"]
    for drawing in drawings.values():
        pixels = image.imread(io.BytesIO(drawing.png(dpi=60)))
        assert pixels[..., :3].std() > 0.01 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_a_long_text_is_drawn_as_a_window_of_128_tokens(long_text, drawings):
    window = plot.choose_window(long_text[0])
    assert len(window) == 128
    left, right = drawings["attention"].figure.axes[:2]
    A, difference = (axes.images[0].get_array() for axes in (left, right))
    expected = window_probs(long_text[1][1], window).numpy().mean(0)
    assert A.shape == (128, 128) and np.array_equal(A, expected) and np.array_equal(difference, expected - expected.T)
    assert right.images[0].get_clim()[0] == -right.images[0].get_clim()[1]
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == [f"word{n}  {n}" for n in window][::4]
    assert f"tokens {window.start} to {window.stop - 1}" in drawings["attention"].caption


def test_a_short_text_has_a_label_for_every_token():
    tokens = ["Because", "Ġthe", "$x$", "##ed", "<b>"]
    A = np.full((5, 5), 0.2, np.float32)
    for drawing in (
        plot.draw_attention(A, tokens, title="t"),
        plot.draw_edges([plot.Edge(2, 1, 0.1)], tokens, head="h"),
    ):
        labels = [label.get_text() for label in drawing.figure.axes[0].get_xticklabels()]
        assert labels == ["Because", "the", "$x$", "##ed", "<b>"]
        assert drawing.png(dpi=40)


@pytest.mark.parametrize("size", [6, 30])
def test_the_outer_product_has_q_dot_k_for_its_trace(size):
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 8))
    A = rng.dirichlet(np.ones(size), size).astype(np.float32)
    drawing = plot.draw_outer_product(
        q, k, A, [f"w{n}" for n in range(size)], (2, 1), scale=0.5, head="layer 0, head 0"
    )
    left, right = drawing.figure.axes[:2]
    assert np.trace(left.images[0].get_array()) == pytest.approx(q @ k)
    assert f"trace = q·k = {q @ k:.3f}" in left.get_title() and f"= {q @ k / 2:.3f}" in left.get_title()
    assert len(right.texts) == (size * size if size == 6 else 15)
    assert f"A_ij = {A[2, 1]:.3f}" in drawing.caption


def test_edges_are_arcs_with_their_threshold_in_the_caption(drawings):
    arcs = [patch for patch in drawings["edges"].figure.axes[0].patches if isinstance(patch, Arc)]
    caption = drawings["edges"].caption
    assert len(arcs) == plot.EDGES and caption.startswith("200 attention edges above null")
    assert "causal graph" not in caption and "threshold" in drawings["edges"].figure.axes[0].get_xlabel()


def test_no_edge_above_null_is_drawn_as_none():
    drawing = plot.draw_edges([], ["a", "b"], head="h")
    assert drawing.caption.startswith("0 attention edges") and drawing.png(dpi=40)


@pytest.mark.parametrize(("family", "panels"), [("bert", 1), ("gpt2", 2)])
def test_every_head_has_its_score_and_its_z(family, panels):
    report = analyze(tiny(family), text_inputs())
    rows = [row for row in report.rows() if row["sequence"] == 0]
    figure = plot.draw_scores(report).figure
    assert len(figure.axes) == panels
    points = [
        np.asarray(c.get_offsets())[:, 1] for c in figure.axes[-1].collections if len(c.get_offsets()) == len(rows)
    ]
    assert points[0] == pytest.approx([row["dag_score"] for row in rows])
    assert points[1] == pytest.approx([row["sink_removed"] for row in rows])
    grid = np.asarray(plot.draw_grid(report).figure.axes[0].images[0].get_array())
    assert grid.ravel() == pytest.approx([row["unmasked_z" if row["causal"] else "z"] for row in rows])


def test_figures_without_nulls_show_no_z():
    model, inputs = tiny("bert"), text_inputs()
    drawings = plot.draw_all(analyze(model, inputs, null=False, tokens=[["t"] * T] * 2), capture(model, inputs))
    assert all(drawing.png(dpi=40) for drawing in drawings)
    assert np.ma.getmaskarray(drawings[-1].figure.axes[0].images[0].get_array()).all()


def strongest(report, calls, sequence=0):
    """The call of the strongest head alone, its map in float64 and the name of the head."""
    layer, head = plot.strongest_heads(report, 1, sequence)[0]
    call = pick_sequence(pick_heads(calls[layer], [head]), sequence)
    return call, whole_map(calls[layer], sequence)[head], f"layer {layer}, head {head}"


@pytest.fixture(scope="module")
def long_causal():
    """A report and the captured layer of two texts through a tiny GPT-2: 300 tokens, and 170 behind padding."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 300}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    real = torch.ones(2, 300, dtype=torch.long)
    real[1, :130] = 0
    inputs = {"input_ids": torch.randint(VOCAB, (2, 300)), "attention_mask": real}
    return analyze(model, inputs), capture(model, inputs)


@pytest.mark.parametrize(("text", "sequence"), [("long_text", 0), ("long_causal", 0), ("long_causal", 1)])
def test_the_map_is_that_of_the_whole_text_in_cells(text, sequence, request):
    report, calls = request.getfixturevalue(text)
    call, A, name = strongest(report, calls, sequence)
    window = plot.choose_window(report, sequence=sequence)
    drawing = plot.draw_map(call, window, head=name)
    edges = [c * 300 // 128 for c in range(129)]
    cells = [[A[a:b, c:d] for c, d in pairwise(edges)] for a, b in pairwise(edges)]
    for axes, pool in zip(drawing.figure.axes[:2], (np.mean, np.max), strict=True):
        mesh, frame = axes.collections[0], axes.patches[0]
        expected = np.array([[pool(cell) for cell in row] for row in cells])
        shown = mesh.get_array()
        assert shown.shape == (128, 128)
        assert np.abs(shown.filled(0) - expected).max() <= rounding(call)
        assert np.array_equal(np.ma.getmaskarray(shown), expected == 0)
        assert np.array_equal(mesh.get_coordinates()[0, :, 0], edges)
        assert isinstance(mesh.norm, LogNorm) and mesh.norm.vmax == shown.max() and mesh.norm.vmin < 1 / 300
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((window.start,) * 2, 128, 128)
        assert axes.get_xlim() == (0, 300) and axes.get_ylim() == (300, 0)
    assert f"tokens {window.start} to {window.stop - 1}" in drawing.caption and "1/300" in drawing.caption


@pytest.mark.parametrize(("text", "sequence"), [("long_text", 0), ("long_causal", 0), ("long_causal", 1)])
def test_the_largest_weights_are_those_of_the_whole_map(text, sequence, request):
    report, calls = request.getfixturevalue(text)
    call, A, _ = strongest(report, calls, sequence)
    seen = call.intervals.to_dense(300)[0].numpy()
    left_out = A.copy()
    left_out[:, 130 if sequence else 0] = 0
    np.fill_diagonal(left_out, 0)
    found = plot.largest_weights(call)
    assert [w.value for w in found] == sorted((w.value for w in found), reverse=True)
    assert np.abs([w.value for w in found] - np.sort(left_out, axis=None)[:-21:-1]).max() <= rounding(call)
    assert all(abs(left_out[w.i, w.j] - w.value) <= rounding(call) for w in found)
    assert len({(w.i, w.j) for w in found}) == 20
    assert [w.even for w in found] == [1 / seen[w.i].sum() for w in found]
    assert plot.largest_weights(call, 3) == found[:3]


def test_the_largest_weights_leave_out_the_sink_the_diagonal_and_what_is_not_there():
    model = tiny("gpt2")
    call = pick_heads(capture(model, {"input_ids": text_inputs()["input_ids"][:1, :4]})[0], [0])
    found = plot.largest_weights(call)
    assert {(w.i, w.j) for w in found} == {(2, 1), (3, 1), (3, 2)} and {w.even for w in found} == {1 / 3, 1 / 4}
    call = call._replace(q=call.q * 0)
    assert [(w.i, w.j) for w in plot.largest_weights(call)] == [(2, 1), (3, 1), (3, 2)]


def test_the_largest_weights_are_bars_with_their_tokens(long_text, drawings):
    call, _, name = strongest(*long_text)
    found = plot.largest_weights(call)
    axes = drawings["top-edges"].figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [w.value for w in found]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"“word{w.i}”@{w.i} → “word{w.j}”@{w.j}" for w in found] and len(labels) == 20
    assert [text.get_text() for text in axes.texts] == [f" {w.value:.3f}" for w in found]
    caption = drawings["top-edges"].caption
    assert name in caption and "no effect" in caption and f"more than {1 / 300:.2g}" in caption
    assert "causal graph" not in caption


def test_no_weight_at_all_is_drawn_as_none():
    drawing = plot.draw_top_edges([], [], head="h")
    assert drawing.caption.startswith("The 0 largest") and drawing.png(dpi=40)


def test_only_a_text_longer_than_the_window_has_its_whole_drawn(long_causal):
    report, calls = long_causal
    names = [{drawing.name for drawing in plot.draw_all(report, calls, sequence=n)} for n in (0, 1)]
    assert all({"map", "top-edges"} <= found for found in names)
    model, inputs = tiny("bert"), text_inputs()
    found = {drawing.name for drawing in plot.draw_all(analyze(model, inputs), capture(model, inputs))}
    assert found == {"attention", "outer-product", "scores", "edges", "z-grid"}


def test_padding_does_not_make_a_text_long():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes)).eval()
    real = (torch.arange(200) < 128).long()[None]
    inputs = {"input_ids": torch.randint(VOCAB, (1, 200)), "attention_mask": real}
    report = analyze(model, inputs)
    assert plot.real_tokens(report) == range(128) and len(plot.draw_all(report, capture(model, inputs))) == 5

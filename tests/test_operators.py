"""What every operator promises whatever it computes: bits of a sequence, one graph for every length, no waiting."""

from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, PATHS, make_qkv

import causalattn as ca

REPEATS = 100


class Operator(NamedTuple):
    """axes of each result: "row" [B, H, T, …], "key" [B, H, S, …], "keys" [B, H, …, S], "map" [B, H, T, S] or "head".

    Empty where results move with the length, as cells do, or take no mask.
    """

    run: callable
    axes: str


def rows_of(q, k, v, options):
    # on the device, as a capture needs
    return (ca.attention_rows(q, k, torch.tensor([0, 3, 3, 1], device=q.device), **options),)


def gradients(results, inputs):
    loss = sum(torch.where(x.isfinite(), x, 0).square().sum() for x in results)
    return torch.autograd.grad(loss, inputs)


def rows_gradients(q, k, v, options):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    return gradients(rows_of(*leaves, v, options), leaves)


def attention_gradients(q, k, v, options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return gradients(ca.attention(*leaves, **options)[:2], leaves)


def statistics_gradients(q, k, v, options):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    stats = ca.attention_stats(*leaves, want=["lse", "entropy", "sum_sq", "distance", "received", "diag"], **options)
    return gradients([x for x in stats if x is not None], leaves)


def pair_gradients(q, k, v, options):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    return gradients(ca.asymmetry(*leaves, **options)[:3], leaves)


def linear_gradients(q, k, v, options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, state = ca.linear_attention(*leaves, **options)
    return gradients([out, *state], leaves)


def edge_effects_of(measure, **edit):
    def run(q, k, v, options):
        readout = v.repeat_interleave(q.shape[1] // v.shape[1], 1) if measure == "readout" else None
        row, column, top, _ = ca.edge_effects(q, k, v, measure=measure, readout=readout, n=5, **edit, **options)
        return row, column, *top

    return run


ROWS = ["lse", "max", "mass", "entropy", "sum_sq", "below", "diag", "distance", "columns"]
OPERATORS = {
    "attention": Operator(lambda q, k, v, options: ca.attention(q, k, v, **options)[:2], "row row"),
    "probabilities": Operator(
        lambda q, k, v, options: (ca.attention(q, k, v, return_probs=True, **options).probs,), "map"
    ),
    "attention_map": Operator(lambda q, k, v, options: ca.attention_map(q, k, 8, **options)[:2], ""),
    "attention_rows": Operator(rows_of, "keys"),
    "attention_topk": Operator(lambda q, k, v, options: ca.attention_topk(q, k, 5, **options), "row row"),
    "attention_topk past 64": Operator(lambda q, k, v, options: ca.attention_topk(q, k, 70, **options), "row row"),
    "attention_covariance": Operator(lambda q, k, v, options: (ca.attention_covariance(q, k, **options),), "map"),
    "attention_correlation": Operator(
        lambda q, k, v, options: (ca.attention_correlation(q, k, center=True, dtype=torch.float32, **options),), "map"
    ),
    "covariance of outputs": Operator(
        lambda q, k, v, options: (ca.attention_covariance(q, k, v=v, dtype=torch.float32, **options),), "map"
    ),
    "row statistics": Operator(
        lambda q, k, v, options: [x for x in ca.attention_stats(q, k, want=ROWS, **options) if x is not None],
        " ".join("row" for _ in ROWS),
    ),
    "received": Operator(
        lambda q, k, v, options: ca.attention_stats(q, k, want=("received", "received_mean"), **options)[9:11],
        "key key",
    ),
    "dag_score": Operator(lambda q, k, v, options: (ca.dag_score(q, k, **options),), "head"),
    "linear_attention": Operator(lambda q, k, v, options: ca.linear_attention(q, k, v, **options)[:1], ""),
    "asymmetry": Operator(lambda q, k, v, options: ca.asymmetry(q, k, **options), "head head head head row"),
    "edge_effects": Operator(edge_effects_of("norm"), "row key row row"),
    "edge_effects, kl": Operator(edge_effects_of("kl", kind="soft", strength=2.0), "row key row row"),
    "edge_effects, readout": Operator(edge_effects_of("readout", kind="hard"), "row key row row"),
    "map of edge_effects": Operator(
        lambda q, k, v, options: (ca.edge_effects(q, k, v, want="map", cells=8, **options).map,), ""
    ),
    "gradients of rows": Operator(rows_gradients, "row key"),
    "gradients of attention": Operator(attention_gradients, "row key key"),
    "gradients of linear_attention": Operator(linear_gradients, ""),
    "gradients of statistics": Operator(statistics_gradients, "row key"),
    "gradients of asymmetry": Operator(pair_gradients, "row key"),
}

# what a sequence that begins later gives too, row by row
SHIFTED = [name for name in OPERATORS if OPERATORS[name].axes not in ("", "keys", "map")]
SHIFTED.remove("gradients of rows")


def cut(x, axes, T):
    if axes == "map":
        return x[:, :, :T, :T]
    if axes == "keys":
        return x[..., :T]
    return x if axes == "head" else x[:, :, :T]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if OPERATORS[name].axes])
def test_bits_depend_on_neither_batch_nor_right_padding(backend, name):
    q, k, v = make_qkv(6, 4, 2, 70, 70, 16, seed=1)
    run, axes = OPERATORS[name]
    lengths = [70, 51, 64, 17, 4, 5]
    together = run(q, k, v, {"mask": ca.causal() & ca.padding(lengths), "backend": backend})
    for b, T in enumerate(lengths):
        alone = [x[b : b + 1, :, :T] for x in (q, k, v)]
        for x, y, axis in zip(together, run(*alone, {"causal": True, "backend": backend}), axes.split(), strict=True):
            assert torch.equal(cut(x[b : b + 1], axis, T), cut(y, axis, T))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("repeats", [5, pytest.param(REPEATS, marks=pytest.mark.full)])
def test_every_run_gives_the_same_bits(backend, name, repeats):
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16, seed=2)
    first = OPERATORS[name].run(q, k, v, {"causal": True, "backend": backend})
    for _ in range(repeats - 1):
        again = OPERATORS[name].run(q, k, v, {"causal": True, "backend": backend})
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", SHIFTED)
def test_left_padding_and_packing_change_no_more_than_roundings(backend, name):
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16, seed=3)
    run, axes = OPERATORS[name]
    alone = run(q, k, v, {"causal": True, "backend": backend})
    gap = [torch.randn_like(x[:, :, :30]) for x in (q, k, v)]
    longer = [torch.cat([a, b], 2) for a, b in zip(gap, (q, k, v), strict=True)]
    left = run(*longer, {"mask": ca.causal() & ca.padding([40], side="left"), "backend": backend})
    packed = run(*longer, {"mask": ca.causal() & ca.packed([0, 30, 70]), "backend": backend})
    for x, y, z, axis in zip(alone, left, packed, axes.split(), strict=True):
        if x.dtype == torch.int32:
            # keys are counted from where the sequence begins
            assert torch.equal(torch.where(x < 0, x, x + 30), y[:, :, 30:])
            continue
        close = {"rtol": 1e-4, "atol": 1e-5 * x.abs().max().item()}
        torch.testing.assert_close(y if axis == "head" else y[:, :, 30:], x, **close)
        # a head's statistic, and so its gradient, is of both segments
        if axis != "head" and name != "gradients of asymmetry":
            torch.testing.assert_close(z[:, :, 30:], x, **close)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "gradients" not in name])
def test_one_graph_serves_every_length(name):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: tuple(OPERATORS[name].run(q, k, v, {"causal": True})), backend=count, fullgraph=True
    )
    for T in range(10, 90, 4):
        q, k, v = make_qkv(1, 2, 1, T, T, 16, strided=False)
        results = OPERATORS[name].run(q, k, v, {"causal": True})
        assert all(torch.equal(x, y) for x, y in zip(compiled(q, k, v), results, strict=True))
    assert len(graphs) <= 2


# a capture fails on whatever waits for the device
if DEVICE == "cuda":

    @pytest.mark.parametrize("name", OPERATORS)
    def test_a_cuda_graph_replays_on_new_inputs(name):
        q, k, v = make_qkv(1, 2, 1, 70, 70, 16, strided=False)
        run = OPERATORS[name].run
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(q, k, v, {"causal": True})
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(q, k, v, {"causal": True})
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, run(q, k, v, {"causal": True}), strict=True))

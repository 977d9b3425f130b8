"""Gradients of the statistics on every path: gradcheck, float64 autograd of the formula, and what must not leak."""

import sys

import pytest
import torch
from helpers import (
    DEVICE,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    grown_memory,
    make_mask,
    make_qkv,
)
from hypothesis import given
from hypothesis import strategies as st
from statistics_gradients import GROUPS, RECTANGULAR, ROWS, SQUARE, check, leaves, loss, make_extras, measured, shapes

import causalattn as ca
from causalattn.statistics import chosen, pairs, received, rows
from causalattn.statistics.backward import Upstream, statistics_backward


@pytest.mark.parametrize("mask", ["full", "causal", "window", "padded_right", "padded_left", "packed_causal"])
def test_gradcheck(mask):
    B = 2 if mask.startswith("padded") else 1
    q, k, _ = make_qkv(B, 2, 1, 6, 6, 3, dtype=torch.float64)
    extras = make_extras((B, 2, 1, 6, 6), 0) if mask in ("full", "packed_causal") else {}
    q, k, options, inputs = leaves(q, k, torch.float64, **extras)
    names = [name for name in ("bias", "sink") if name in options]

    def statistics(q, k, *tensors):
        chosen_mask = make_mask(mask, B, 6)
        options_ = options | dict(zip(names, tensors, strict=True))
        return tuple(measured(q, k, chosen_mask, SQUARE, "torch", **options_).values())

    assert torch.autograd.gradcheck(statistics, inputs, fast_mode=True)


@pytest.mark.parametrize("name", SQUARE)
def test_gradcheck_of_each_statistic(name):
    q, k, _ = make_qkv(1, 2, 1, 4, 4, 2, dtype=torch.float64)
    sink = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)

    def statistic(q, k, sink):
        return measured(q, k, ca.sliding_window(2, right=1), (name,), "torch", sink=sink)[name]

    assert torch.autograd.gradcheck(statistic, (q.requires_grad_(), k.requires_grad_(), sink), fast_mode=True)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(SQUARE_MASKS)), want=GROUPS, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, want, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, make_mask(name, shape[0], shape[4]), want, seed)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=False), name=st.sampled_from(["full", "causal", "window", "padded_left"]), seed=SEEDS)
def test_more_or_fewer_keys_than_queries(backend, shape, name, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, make_mask(name, shape[0], shape[4]), RECTANGULAR, seed)


@pytest.mark.parametrize("backend", PATHS)
@given(
    shape=shapes(),
    bias=st.sampled_from([None, (1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0)]),
    softcap=st.sampled_from([None, 0.7]),
    sink=st.sampled_from([None, -1.0, 3.0]),
    slopes=st.booleans(),
    want=GROUPS,
    seed=SEEDS,
)
def test_bias_slopes_softcap_and_sink(backend, shape, bias, softcap, sink, slopes, want, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    extras = make_extras(shape, seed, bias, sink, softcap, slopes)
    lengths = [shape[4]] * (shape[0] - 1) + [shape[4] // 2]
    check(backend, q, k, ca.causal() & ca.padding(lengths), want, seed, **extras)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", SQUARE)
def test_each_statistic_by_itself(backend, name):
    q, k, _ = make_qkv(1, 2, 1, 35, 35, 16)
    check(backend, q, k, ca.causal(), (name,), sink=torch.tensor([1.0, -1.0], device=DEVICE))


@pytest.mark.parametrize("mask", [ca.full(), ca.causal(), ca.sliding_window(540)], ids=["full", "causal", "window"])
def test_more_than_one_tile_of_the_torch_path(mask):
    q, k, _ = make_qkv(1, 2, 1, 1030, 1030, 16)
    check("torch", q, k, mask, SQUARE)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), seed=SEEDS)
def test_gradient_of_lse_is_attention_to_the_keys(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    attended = ca.attention(q, k, k, causal=True, backend=backend).out * shape[5] ** -0.5
    q, k, _, inputs = leaves(q, k)
    grad = torch.autograd.grad(ca.attention_stats(q, k, want="lse", causal=True, backend=backend).lse.sum(), inputs)[0]
    assert (grad - attended).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), want=GROUPS, seed=SEEDS)
def test_one_vector_added_to_every_key_changes_nothing_but_lse(backend, shape, want, seed):
    q, k, _, _ = leaves(*make_qkv(*shape, seed=seed)[:2])
    stats = measured(q, k, ca.full(), [name for name in want if name != "lse"], backend)
    (grad,) = torch.autograd.grad(loss(stats), [k])
    assert grad.sum(2).abs().max() < 1e-4 * max(1, grad.abs().max())


@pytest.mark.parametrize(("backend", "T"), [*((path, 33) for path in PATHS), ("torch", 1100)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_leaks(backend, T, side):
    mask = ca.padding([T, T - 13], side=side)
    mask = mask if side == "right" else mask & ca.causal()
    q, k, _ = make_qkv(2, 2, 1, T, T, 16)
    inside = mask.to_dense(T, T, device=DEVICE).any(1)[:, None, :, None]

    def gradients(fill):
        a, b, options, inputs = leaves(*(x.masked_fill(~inside, fill) for x in (q, k)), softcap=3.0)
        return torch.autograd.grad(loss(measured(a, b, mask, SQUARE, backend, **options)), inputs)

    for clean, after in zip(gradients(0.0), gradients(torch.nan), strict=True):
        assert torch.equal(clean, after)
        assert (after.masked_select(~inside) == 0).all()


@pytest.mark.parametrize("backend", PATHS)
def test_upstream_gradients_of_empty_rows_and_unseen_keys_never_leak(backend):
    want = (*ROWS, "diag", "received")
    q, k, options, inputs = leaves(*make_qkv(1, 2, 1, 33, 33, 16)[:2], sink=torch.zeros(2, device=DEVICE))
    stats = ca.attention_stats(q, k, mask=ca.padding([20]), want=want, backend=backend, **options)
    outputs = [getattr(stats, name) for name in want]
    upstream = [torch.ones_like(x) for x in outputs]
    clean = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
    for x in upstream:
        x[..., 20:] = torch.nan
    for before, after in zip(clean, torch.autograd.grad(outputs, inputs, upstream), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend):
    q, k, _ = make_qkv(3, 4, 2, 70, 70, 16)

    def gradients(q, k, mask):
        q, k, _, inputs = leaves(q, k)
        # the last key is another one after padding
        stats = measured(q, k, mask, [name for name in SQUARE if name != "columns"], backend)
        return torch.autograd.grad(sum(x.sin().sum() for x in stats.values()), inputs)

    mask = ca.causal() & ca.padding([70, 51, 70])
    whole, again = (gradients(q, k, mask) for _ in range(2))
    alone = gradients(q[1:2, :, :51], k[1:2, :, :51], ca.causal())
    for a, b, c in zip(whole, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2, :, :51], c)
        assert (a[1, :, 51:] == 0).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0)])
def test_empty(backend, B, T, S):
    q, k = torch.zeros(B, 2, T, 16, device=DEVICE), torch.zeros(B, 1, S, 16, device=DEVICE)
    extras = {"sink": torch.zeros(2, device=DEVICE), "bias": torch.zeros(1, 2, T, S, device=DEVICE)}
    q, k, options, inputs = leaves(q, k, **extras)
    stats = ca.attention_stats(q, k, want=RECTANGULAR, columns=(), backend=backend, **options)
    values = [x.nan_to_num(neginf=0).sum() for x in stats if x is not None]
    for x, grad in zip(inputs, torch.autograd.grad(sum(values), inputs), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("value", [200.0, -200.0])
def test_a_sink_far_from_the_scores(backend, value):
    q, k, _ = make_qkv(1, 2, 1, 33, 33, 16)
    q, k, options, inputs = leaves(q, k, sink=torch.full((2,), value, device=DEVICE))
    stats = ca.attention_stats(q, k, want=ROWS, backend=backend, **options)
    *_, grad = torch.autograd.grad(stats.lse.sum(), inputs)
    assert torch.equal(grad, torch.full_like(grad, 33.0 if value > 0 else 0.0))


@pytest.mark.parametrize("backend", PATHS)
def test_a_forbidding_bias_is_a_mask(backend):
    q, k, _ = make_qkv(1, 2, 1, 33, 33, 16)
    bias = torch.zeros(33, 33, device=DEVICE).masked_fill(~ca.causal().to_dense(33, 33, device=DEVICE)[0], -torch.inf)
    results = []
    for options in ({"mask": ca.causal()}, {"mask": ca.full(), "bias": bias}):
        a, b, _, inputs = leaves(q, k)
        want = [name for name in SQUARE if name != "received_mean"]
        results.append(torch.autograd.grad(loss(measured(a, b, want=want, backend=backend, **options)), inputs))
    for x, y in zip(*results, strict=True):
        assert (x - y).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
def test_scores_of_ten_thousand(backend):
    q, k, _ = make_qkv(1, 1, 1, 40, 40, 16, scale=100.0)
    check(backend, q, k, ca.causal(), ("lse",))
    # rows are one-hot: what is left of the other gradients is the rounding of scores, which is far below q's size
    q, k, _, inputs = leaves(q, k)
    for grad in torch.autograd.grad(loss(measured(q, k, ca.causal(), SQUARE[1:], backend)), inputs):
        assert grad.abs().max() < 10


@pytest.mark.parametrize("backend", PATHS)
def test_a_symmetric_map_has_gradient_zero(backend):
    q, k, _, inputs = leaves(*(torch.zeros(1, 1, 9, 16, device=DEVICE) for _ in range(2)))
    result = ca.asymmetry(q, k, backend=backend)
    total = result.frobenius.sum() + result.ratio.sum() + result.l1.sum()
    assert all((grad == 0).all() for grad in torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("backend", PATHS)
def test_a_bias_gradient_that_takes_several_workspaces(backend, monkeypatch):
    if backend == "triton":
        from causalattn.kernels import _primitives

        monkeypatch.setattr(_primitives, "WORKSPACE", 20 * 33 * 2)
    q, k, _ = make_qkv(1, 2, 1, 33, 33, 16)
    for axes in ((0, 1, 1, 1), (0, 0, 0, 1)):
        check(backend, q, k, ca.causal(), (*ROWS, "l1"), **make_extras((1, 2, 1, 33, 33), 0, axes))


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)

    class Shifted(ca.Mask):
        def resolve(self, *args, **kwargs):
            right = super().resolve(*args, **kwargs)
            shifted = right._replace(stop=(right.stop + 1).clamp(max=33))
            return right if sys._getframe(1).f_code.co_name == "check" else shifted

    check(backend, q, k, ca.causal(), ("entropy",))
    with pytest.raises(AssertionError, match="error"):
        check(backend, q, k, Shifted(ca.causal().rules), ("entropy",))


MEMORY = """
q, k = (x.requires_grad_() for x in torch.randn(2, 1, 1, 6144, 32).unbind())
want = [name for name in ca.AttentionStats._fields if name != "max"]
def run(T):
    stats = ca.attention_stats(q[:, :, :T], k[:, :, :T], want=want)
    sum(x.sum() for x in (*stats[2:-1], *stats.asymmetry[:3]) if x is not None).backward()
"""


# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_is_linear():
        (grown,) = grown_memory(MEMORY, 6144)
        assert 1024 * grown < 0.4 * 4 * 6144**2


def contract_arguments():
    q, k, options, _ = leaves(*make_qkv(2, 4, 2, 20, 20, 16)[:2], **make_extras((2, 4, 2, 20, 20), 0))
    start, stop, first, offset = (ca.causal() & ca.padding([20, 7])).resolve(20, 20, device=DEVICE)
    bias, slopes, sink = options["bias"], options["alibi_slopes"][None], options["sink"]
    return (q, k, start, stop, offset, bias, slopes, 0.2, 5.0, sink), first


def test_operator_contracts():
    logits, first = contract_arguments()
    names = " ".join(rows.ROWS)
    packed = rows.row_statistics(*logits, names, "torch").detach()
    masked = (*logits, packed[-1].clone(), packed[1].clone())
    torch.library.opcheck(rows.row_statistics, (*logits, names, "torch"))
    torch.library.opcheck(received.received, (*masked, "torch"))
    torch.library.opcheck(pairs.pair_statistics, (*masked, "torch"))
    torch.library.opcheck(chosen.chosen_probs, (*masked, first[..., None], "torch"))
    masked = [x.detach() if isinstance(x, torch.Tensor) else x for x in masked]
    up = Upstream(*packed[:6], picked=packed[0][..., None], chosen=first[..., None], pairs=torch.randn(2, 2, 4))
    for bias_gradient in (True, False):
        torch.library.opcheck(statistics_backward, (*masked, *up, bias_gradient, "torch"))


@pytest.mark.parametrize("backend", PATHS)
def test_compiles_once_for_every_length(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def compiler(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=count, bw_compiler=count)(graph, inputs)

    def score(q, k):
        return ca.dag_score(q, k, causal=True, backend=backend).sum() + ca.asymmetry(q, k, backend=backend).ratio.sum()

    compiled = torch.compile(score, backend=compiler, fullgraph=True)
    for T in range(10, 30, 4):
        q, k, _, inputs = leaves(*make_qkv(1, 2, 1, T, T, 16, strided=False)[:2])
        eager = torch.autograd.grad(score(q, k), inputs)
        for x, y in zip(torch.autograd.grad(compiled(q, k), inputs), eager, strict=True):
            assert torch.equal(x, y)
    # a forward and a backward each
    assert len(graphs) <= 4


GOOD = torch.zeros(1, 2, 5, 16)


@pytest.mark.parametrize("want", ["max", "all", ["max", "lse"]])
@pytest.mark.parametrize("name", ["q", "k", "bias", "sink"])
def test_the_gradient_of_max_is_refused(want, name):
    tensors = {"q": GOOD, "k": GOOD, "bias": torch.zeros(5, 5), "sink": torch.zeros(2)}
    tensors[name] = tensors[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="max has no gradient"):
        ca.attention_stats(**tensors, want=want)
    with torch.no_grad():
        assert ca.attention_stats(**tensors, want=want).max is not None


def test_fields_without_a_gradient():
    q = GOOD.clone().requires_grad_()
    stats = ca.attention_stats(q, GOOD)
    assert [name for name in ca.AttentionStats._fields if getattr(stats, name) is not None] == [
        name for name in ca.AttentionStats._fields if getattr(ca.attention_stats(GOOD, GOOD), name) is not None
    ]
    assert stats.lse.requires_grad
    assert not stats.max.requires_grad
    result = ca.asymmetry(q, GOOD)
    assert [x.requires_grad for x in result] == [True, True, True, False, True]


def test_only_what_requires_grad_gets_one():
    for name in ("q", "k", "bias", "sink"):
        tensors = {"q": GOOD, "k": GOOD, "bias": torch.zeros(5, 5), "sink": torch.zeros(2)}
        tensors[name] = tensors[name].clone().requires_grad_()
        stats = ca.attention_stats(**tensors, want=("lse", "received", "diag"))
        (stats.lse.sum() + stats.received.sum() + stats.diag.sum()).backward()
        assert tensors[name].grad.shape == tensors[name].shape


def test_second_derivatives_are_refused():
    q = GOOD.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ca.attention_stats(q, GOOD, want="entropy").entropy.sum(), [q], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        grad.sum().backward()

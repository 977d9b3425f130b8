"""Gradients of attention: gradcheck on the torch path, both paths against float64, padding, bits, memory, graphs."""

import sys

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    MASKS,
    PATHS,
    SEEDS,
    assert_within_reference_error,
    grown_memory,
    make_mask,
    make_qkv,
    plain_attention,
    score_roundings,
    shapes,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from causalattn import attention, attention_rows, causal, padding, sliding_window

backward = sys.modules["causalattn.attention.backward"]


def upstream_of(shapes, seed):
    """One normal gradient a result, [B, H, T, ...]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


def gradients(results, upstream, inputs, filled):
    """Of Σ result·upstream over the rows that may attend something."""
    loss = sum(
        (x.masked_fill(~filled.view(*filled.shape, *(1,) * (x.ndim - 3)), 0) * g.to(x.dtype)).sum()
        for x, g in zip(results, upstream, strict=True)
    )
    return torch.autograd.grad(loss, inputs)


def longest(x):
    return x.float().norm(dim=-1).max().item()


def absolute_terms(q, k, v, upstream, filled, scale, compute):
    """The largest Σ|dS||k|, Σ|dS||q| and Σ A|dout|, of which dq, dk and dv are the signed sums."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    zero = q.new_zeros(*q.shape[:3], k.shape[2], requires_grad=True)
    results = compute(q, k, v, zero)
    dS = gradients(results, upstream, [zero], filled)[0].abs()
    A = results[2].detach() * filled[..., None]
    group = q.shape[1] // k.shape[1]
    of_q = dS @ k.abs().repeat_interleave(group, 1) * abs(scale)
    of_k = (dS.mT @ q.abs()).unflatten(1, (-1, group)).sum(2) * abs(scale)
    of_v = (A.mT @ upstream[0].double().abs()).unflatten(1, (-1, group)).sum(2)
    return [x.max().item() for x in (of_q, of_k, of_v)]


def check(backend, q, k, v, mask, seed=0, bias=None, sink=None, slopes=None, **logits):
    """Every gradient within twice that of eager torch's autograd, both against float64."""
    B, H, T, _ = q.shape
    seen = mask.resolve(T, k.shape[2], device=DEVICE).to_dense(k.shape[2])
    filled = seen.any(-1)[:, None].expand(B, H, T)
    upstream = upstream_of([(B, H, T, v.shape[3]), (B, H, T), (B, H, T, k.shape[2])], seed)
    tensors = [q, k, v, *(x for x in (bias, sink) if x is not None)]

    def run(dtype, compute):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
        named = dict(zip([n for n, x in (("bias", bias), ("sink", sink)) if x is not None], leaves[3:], strict=True))
        return gradients(compute(*leaves[:3], **named), upstream, leaves, filled)

    def plain(q, k, v, **named):
        # a row without keys sees everything here, and its results are left out
        return plain_attention(q, k, v, seen | ~seen.any(-1, keepdim=True), alibi_slopes=slopes, **logits, **named)

    def ours(q, k, v, **named):
        options = {"mask": mask, "return_probs": True, "backend": backend, "alibi_slopes": slopes}
        return attention(q, k, v, **options, **logits, **named)

    # dS = A (dP − δ) may cancel: a rounding of dP moves it by A times that of dout·v, and a gradient by what meets dS
    scale = logits.get("scale") or q.shape[-1] ** -0.5
    probs = attention(q, k, v, mask=mask, return_probs=True, bias=bias, sink=sink, alibi_slopes=slopes, **logits).probs
    meets = [scale * longest(k), scale * longest(q), 0.0, *(1.0 for _ in tensors[3:])]
    of_dp = longest(upstream[0]) * longest(v) * probs.max().item()

    def biased(q, k, v, zero):
        return plain(q, k, v, bias=zero if bias is None else zero + bias, **({} if sink is None else {"sink": sink}))

    terms = absolute_terms(q, k, v, upstream, filled, scale, biased) + [0.0 for _ in tensors[3:]]
    results = (run(None, ours), run(None, plain), run(torch.float64, plain))
    for got, rival, exact, met, sums in zip(*results, meets, terms, strict=True):
        largest = exact.abs().max().item() or 1.0
        roundings = score_roundings(q, k, scale) + of_dp * met / largest
        exact = to_numpy(exact)
        assert_within_reference_error(got, rival, exact, axis=None, roundings=roundings, terms=sums / largest)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "padded_left", "prefix"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": -0.7}], ids=["plain", "softcap"])
def test_gradcheck(mask, options):
    mask = make_mask(mask, 2, 7)
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 2, 1, 5, 7, 3, 4, dtype=torch.float64, strided=False))
    bias, sink = torch.randn(2, 1, 5, 1, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64)

    def results(q, k, v, bias, sink):
        result = attention(q, k, v, mask=mask, bias=bias, sink=sink, **options, return_probs=True)
        return result.out, result.lse.masked_fill(result.lse.isneginf(), 0), result.probs

    torch.autograd.gradcheck(results, (q, k, v, bias, sink.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), V=st.sampled_from([8, 59]), seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, V, seed):
    q, k, v = make_qkv(*shape, V, dtype, seed)
    check(backend, q, k, v, make_mask(name, shape.B, shape.S), seed)


@pytest.mark.parametrize("backend", PATHS)
@given(
    shape=shapes(),
    bias=st.sampled_from([None, (1, 1, 0, 0), (0, 0, 1, 1), (0, 1, 1, 0), (0, 0, 0, 1)]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    sink=st.sampled_from([None, -3.0, 40.0]),
    slopes=st.booleans(),
    seed=SEEDS,
)
def test_bias_slopes_softcap_and_sink(backend, shape, bias, softcap, sink, slopes, seed):
    q, k, v = make_qkv(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if bias is not None:
        sizes = (n if full else 1 for n, full in zip((shape.B, shape.H, shape.T, shape.S), bias, strict=True))
        bias = torch.randn(*sizes, generator=generator).to(DEVICE)
    sink = None if sink is None else torch.full((shape.H,), sink, device=DEVICE)
    slopes = torch.rand(shape.H, generator=generator).to(DEVICE) if slopes else None
    check(backend, q, k, v, causal(), seed, bias, sink, slopes, softcap=softcap, scale=0.3)


@pytest.mark.parametrize("backend", PATHS)
def test_more_than_one_tile_of_the_torch_path(backend):
    length = 600 if backend == "torch" else 150
    q, k, v = make_qkv(1, 2, 1, length, length + 40, 16)
    check(backend, q, k, v, sliding_window(length // 2), bias=torch.randn(1, 1, 1, length + 40, device=DEVICE))


@pytest.mark.parametrize("backend", PATHS)
def test_a_bias_gradient_comes_in_slices_of_bounded_size(backend, monkeypatch):
    if backend == "triton":
        from causalattn.kernels import _primitives

        monkeypatch.setattr(_primitives, "WORKSPACE", 2 * 2 * 40 * 16)
    q, k, v = make_qkv(2, 2, 1, 37, 40, 16)
    for shape in ((1, 2, 37, 40), (2, 1, 1, 40)):
        check(backend, q, k, v, causal(), bias=torch.randn(*shape, device=DEVICE))


@pytest.mark.parametrize("backend", PATHS)
def test_rows_have_the_gradients_of_probs(backend):
    q, k, v = make_qkv(1, 2, 1, 20, 30, 16)
    rows, upstream = [3, -1, 3], torch.randn(1, 2, 3, 30, device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    chosen = attention_rows(*leaves, rows, causal=True, backend=backend)
    got = torch.autograd.grad((chosen * upstream).sum(), leaves)
    probs = attention(*leaves, v, causal=True, return_probs=True, backend=backend).probs
    expected = torch.autograd.grad((probs[:, :, rows] * upstream).sum(), leaves)
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()


def padded_gradients(q, k, v, lengths, backend):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    result = attention(*leaves, mask=causal() & padding(lengths), softcap=5.0, backend=backend)
    real = torch.arange(q.shape[2], device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    loss = result.out.masked_fill(~real[:, None, :, None], 0).square().sum()
    loss = loss + result.lse.masked_fill(~real[:, None], 0).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("backend", "T", "real"), [*((path, 70, 21) for path in PATHS), ("torch", 1100, 530)])
def test_padding_never_leaks(backend, T, real):
    q, k, v = make_qkv(2, 2, 1, T, T, 16)
    clean = padded_gradients(q, k, v, [T, real], backend)
    q, k, v = q.clone(), k.clone(), v.clone()
    for x in (q, k, v):
        x[1, :, real:] = torch.nan
    for before, after in zip(clean, padded_gradients(q, k, v, [T, real], backend), strict=True):
        assert torch.equal(before, after)
        assert (after[1, :, real:] == 0).all()


@pytest.mark.parametrize("backend", PATHS)
def test_gradients_that_are_nan_on_padding_never_leak(backend):
    q, k, v = make_qkv(2, 2, 1, 40, 40, 16)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse, probs = attention(*leaves, mask=causal() & padding([40, 21]), return_probs=True, backend=backend)
    # where gives lse² a gradient of NaN at −∞, and so does entr where a probability is 0
    loss = torch.where(lse.isfinite(), lse.square(), 0).sum() + out.sum()
    for x in torch.autograd.grad(loss + torch.where(probs > 0, torch.special.entr(probs), 0).sum(), leaves):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend):
    q, k, v = make_qkv(3, 4, 2, 70, 70, 16)
    whole = padded_gradients(q, k, v, [70, 51, 70], backend)
    alone = padded_gradients(q[1:2, :, :51], k[1:2, :, :51], v[1:2, :, :51], [51], backend)
    for x, y, again in zip(whole, alone, padded_gradients(q, k, v, [70, 51, 70], backend), strict=True):
        assert torch.equal(x[1:2, :, :51], y)
        assert torch.equal(x, again)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0)])
def test_empty(backend, B, T, S):
    leaves = [torch.randn(B, 2, n, 16, device=DEVICE, requires_grad=True) for n in (T, S, S)]
    result = attention(*leaves, backend=backend)
    for x in torch.autograd.grad(result.out.sum(), leaves):
        assert (x == 0).all()


@pytest.mark.parametrize("backend", PATHS)
def test_only_one_result_is_used(backend):
    leaves = [x.detach().requires_grad_() for x in make_qkv(1, 2, 2, 20, 30, 16)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, backend=backend).lse.sum(), leaves)
    probs = attention(*leaves, backend=backend, return_probs=True).probs.detach()
    assert (dq - probs @ leaves[1] / 4).abs().max() < 1e-5
    assert (dk - probs.mT @ leaves[0] / 4).abs().max() < 1e-5
    assert (dv == 0).all()


def test_no_second_derivative():
    leaves = [x.detach().requires_grad_() for x in make_qkv(1, 1, 1, 4, 4, 16)]
    (dq,) = torch.autograd.grad(attention(*leaves).out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"causalattn.+attention_backward"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, v = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))

    def dv(mask):
        leaf = v.detach().requires_grad_()
        return torch.autograd.grad(attention(q, k, leaf, mask=mask, backend=backend).out.sum(), leaf)[0]

    exact = plain_attention(q.double(), k.double(), v.double(), right.to_dense(33))[2].sum(-2)[..., None]
    plain = plain_attention(q, k, v, right.to_dense(33))[2].sum(-2)[..., None]
    exact, plain = to_numpy(exact.expand(dv(right).shape)), plain.expand(dv(right).shape)
    assert_within_reference_error(dv(right), plain, exact, roundings=score_roundings(q, k))
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(dv(wrong), plain, exact, roundings=score_roundings(q, k))


MEMORY = """
def run(T):
    q, k, v = torch.randn(3, 1, 1, T, 32, requires_grad=True).unbind()
    out, lse, _ = ca.attention(q, k, v)
    (out.sum() + lse.sum()).backward()
"""


# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_is_linear():
        (grown,) = grown_memory(MEMORY, 6144)
        assert 1024 * grown < 0.25 * 4 * 6144**2


def test_operator_contract():
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 4, 2, 9, 20, 16))
    start, stop, _, offset = (causal() & padding([20, 7])).resolve(9, 20, device=DEVICE)
    bias, slopes = torch.randn(2, 1, 9, 20, device=DEVICE, requires_grad=True), torch.rand(1, 4, device=DEVICE)
    logits = (start, stop, offset, bias, slopes, 0.2, 5.0, torch.randn(4, device=DEVICE, requires_grad=True))
    forward = sys.modules["causalattn.attention.forward"].attend
    torch.library.opcheck(forward, (q, k, v, *logits, torch.float32, "torch"))
    out, lse, pivot, largest, probs = (x.detach() for x in forward(q, k, v, *logits, torch.float32, "torch"))
    upstream = (torch.randn_like(out), torch.randn_like(lse), torch.randn_like(probs))
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in (q, k, v, *logits)]
    torch.library.opcheck(backward.attend_backward, (*inputs, pivot, largest, out, *upstream, True, "torch"))


def test_compiles_once_for_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q, k, v):
        return attention(q, k, v, causal=True).out.square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for T in range(10, 50, 8):
        leaves = [x.requires_grad_() for x in make_qkv(1, 2, 1, T, T, 16, strided=False)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2

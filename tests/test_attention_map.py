"""attention_map on every path against the float64 specification."""

import itertools
import sys

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    EXTRAS,
    MASKS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    assert_within_reference_error,
    make_mask,
    make_options,
    make_qkv,
    plain_attention,
    score_roundings,
    shapes,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

from causalattn import attention_map, causal, padding, sliding_window
from causalattn.reference.attention import attention as reference_attention
from causalattn.reference.attention import attention_map as reference

# the package's own name attention is the function
map_module = sys.modules["causalattn.attention.map"]

CELLS = st.sampled_from([1, 2, 7, 33, 64, 512])


def check(backend, q, k, cells, mask, window=(0.25, 0.75), **options):
    """mean, max and a window within twice torch's error of float64."""
    T, S = q.shape[2], k.shape[2]
    seen = mask.resolve(T, S, device=DEVICE).to_dense(S)
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact = reference_attention(to_numpy(q), to_numpy(k), to_numpy(k), to_numpy(seen), **arrays)[2]
    result = attention_map(q, k, cells, mask=mask, backend=backend, **options)
    wide_q, wide_k = (y.to(result.mean.dtype) for y in (q, k))
    plain = plain_attention(wide_q, wide_k, wide_k, seen, **options)[2]
    # the pass over rows and the one over cells each round q·k
    roundings = 2 * score_roundings(q, k, options.get("scale"))
    for got, rival, target in zip(result[:2], reference(to_numpy(plain), cells), reference(exact, cells), strict=True):
        assert got.dtype == torch.promote_types(q.dtype, torch.float32)
        assert_within_reference_error(got, rival, target, axis=None, roundings=roundings)
    q0, q1, k0, k1 = (int(x * n) for n in (T, S) for x in window)
    part = result.window(q0, q1, k0, k1)
    rival, target = plain[:, :, q0:q1, k0:k1], exact[:, :, q0:q1, k0:k1]
    assert_within_reference_error(part, rival, target, axis=None, roundings=roundings)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), cells=CELLS, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, cells, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, cells, make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), cells=CELLS, seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, cells, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, cells, make_mask(name, shape.B, shape.S), window=(0.0, 1.0))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), cells=CELLS, extras=EXTRAS, seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, cells, extras, seed):
    q, k, _ = make_qkv(*shape, seed=seed, scale=2.0)
    check(backend, q, k, cells, causal(), **make_options(extras, shape, seed))


def test_float64_goes_through_the_torch_path():
    q, k, _ = make_qkv(2, 2, 1, 33, 50, 16, dtype=torch.float64)
    result = attention_map(q, k, 10, causal=True)
    exact = reference_attention(*map(to_numpy, (q, k, k)), to_numpy(causal().to_dense(33, 50)))[2]
    for got, expected in zip(result[:2], reference(exact, 10), strict=True):
        assert got.dtype == torch.float64
        np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(to_numpy(result.window(5, 20, 0, 50)), exact[:, :, 5:20], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("cells", [3, 100])
def test_more_than_one_tile_of_the_torch_path(backend, cells):
    q, k, _ = make_qkv(1, 2, 1, 1100, 2100, 16)
    check(backend, q, k, cells, sliding_window(900))


@pytest.mark.parametrize("backend", PATHS)
def test_up_to_cells_tokens_it_is_the_matrix(backend):
    q, k, _ = make_qkv(1, 2, 1, 20, 33, 16)
    result = attention_map(q, k, causal=True, backend=backend)
    assert torch.equal(result.mean, result.max)
    assert result.mean.shape == (1, 2, 20, 33)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), cells=CELLS, seed=SEEDS)
def test_cells_hold_all_of_the_mass(backend, shape, cells, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    mean = attention_map(q, k, cells, backend=backend).mean
    sizes = (
        np.diff([c * n // m for c in range(m + 1)]) for n, m in zip((shape.T, shape.S), mean.shape[2:], strict=True)
    )
    rows, keys = sizes
    total = (to_numpy(mean) * rows[:, None] * keys).sum((2, 3))
    assert np.abs(total - shape.T).max() < 1e-5 * shape.T


@pytest.mark.parametrize("backend", PATHS)
def test_padding_never_leaks(backend):
    q, k, _ = make_qkv(2, 2, 1, 50, 50, 16)
    options = {"mask": padding([50, 21]), "backend": backend}
    clean = attention_map(q, k, 7, **options)
    q, k = q.clone(), k.clone()
    q[1, :, 21:] = k[1, :, 21:] = torch.nan
    result = attention_map(q, k, 7, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean[:2], result[:2], strict=True))
    assert torch.equal(clean.window(3, 40, 10, 30), result.window(3, 40, 10, 30))


@pytest.mark.parametrize("backend", PATHS)
def test_a_nan_is_seen_in_the_cells_of_rows_that_may_attend_it_alone(backend):
    q, k, _ = make_qkv(1, 2, 2, 40, 40, 16)
    clean = attention_map(q, k, 4, causal=True, backend=backend)
    k = k.clone()
    k[:, :, 20] = torch.nan
    result = attention_map(q, k, 4, causal=True, backend=backend)
    for before, after in zip(clean[:2], result[:2], strict=True):
        assert torch.equal(before[:, :, :2], after[:, :, :2])
        assert after[:, :, 2:, :3].isnan().all()


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_the_run(backend):
    q, k, _ = make_qkv(3, 4, 2, 70, 70, 16)
    whole = attention_map(q, k, 9, causal=True, backend=backend)
    alone = attention_map(q[1:2], k[1:2], 9, causal=True, backend=backend)
    again = attention_map(q, k, 9, causal=True, backend=backend)
    for a, b, c in zip(whole[:2], alone[:2], again[:2], strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", PATHS)
def test_offsets_past_two_to_the_31(backend):
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    k = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    q, small, _ = make_qkv(1, 1, 1, 5, 3, 16, dtype=torch.float16)
    k.copy_(small)
    result, expected = (attention_map(q, keys, 2, backend=backend) for keys in (k, small))
    assert torch.equal(result.mean, expected.mean)
    assert torch.equal(result.window(0, 5, 0, 3), expected.window(0, 5, 0, 3))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0), (1, 0, 0)])
def test_empty(backend, B, T, S):
    q, k = (torch.zeros(B, 2, count, 16, device=DEVICE) for count in (T, S))
    result = attention_map(q, k, 2, backend=backend)
    assert result.mean.shape == result.max.shape == (B, 2, min(T, 2), min(S, 2))
    assert result.window(0, T, 0, S).shape == (B, 2, T, S)


def test_a_window_of_nothing():
    q, k, _ = make_qkv(1, 2, 1, 20, 20, 16)
    assert attention_map(q, k).window(4, 4, 3, 9).shape == (1, 2, 0, 6)


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    exact = reference_attention(*map(to_numpy, (q, k, k, right.to_dense(33))))[2]
    plain = reference(to_numpy(plain_attention(q, k, k, right.to_dense(33))[2]), 5)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    result = attention_map(q, k, 5, mask=wrong, backend=backend)
    for got, rival, target in zip(result[:2], plain, reference(exact, 5), strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_within_reference_error(got, rival, target, axis=None, roundings=score_roundings(q, k))


def test_operator_contract():
    q, k, _ = make_qkv(2, 4, 2, 9, 20, 16)
    start, stop, _, offset = (causal() & padding([20, 7])).resolve(9, 20, device=DEVICE)
    bias, slopes, sink = (torch.randn(shape, device=DEVICE) for shape in ((2, 1, 9, 20), (1, 4), (4,)))
    pivot, largest = torch.randn(2, 4, 9, device=DEVICE), torch.rand(2, 4, 9, device=DEVICE)
    arguments = (q, k, start, stop, offset, bias, slopes, 0.2, 5.0, sink, pivot, largest, 6, "torch")
    torch.library.opcheck(map_module.pool, arguments)


def test_compiles_once_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: attention_map(q, k, 8, causal=True)[:2], backend=count, fullgraph=True)
    for T in range(10, 50, 2):
        q, k, _ = make_qkv(1, 2, 1, T, T, 16, strided=False)
        for got, eager in zip(compiled(q, k), attention_map(q, k, 8, causal=True)[:2], strict=True):
            assert torch.equal(got, eager)
    assert len(graphs) <= 2


GOOD = torch.zeros(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("error", "match", "cells", "options"),
    [
        (ValueError, "cells must be at least 1, got 0", 0, {}),
        (TypeError, "cells must be an int, got float", 2.0, {}),
        (TypeError, "cells must be an int, got bool", True, {}),
        (ValueError, "softcap must be positive and finite, got -1", 2, {"softcap": -1.0}),
        (ValueError, r"bias must broadcast to \[2, 4, 5, 5\]", 2, {"bias": torch.zeros(5, 6)}),
        (ValueError, r"alibi_slopes must have shape \[4\]", 2, {"alibi_slopes": torch.ones(3)}),
        (TypeError, "mask must be a causalattn Mask", 2, {"mask": torch.ones(5, 5)}),
        (ValueError, "backend must be", 2, {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, match, cells, options):
    with pytest.raises(error, match=match):
        attention_map(GOOD, GOOD, cells, **options)


@pytest.mark.parametrize(
    ("match", "bounds"),
    [
        ("window must have its queries in 0…5, got -1…2", (-1, 2, 0, 5)),
        ("window must have its queries in 0…5, got 3…2", (3, 2, 0, 5)),
        ("window must have its keys in 0…5, got 0…6", (0, 5, 0, 6)),
    ],
)
def test_bad_windows_are_named(match, bounds):
    with pytest.raises(ValueError, match=match):
        attention_map(GOOD, GOOD).window(*bounds)


def pooling(count, cells):
    """[cells, count]: the mean over each cell as a matrix."""
    edges = [c * count // cells for c in range(cells + 1)]
    return torch.stack([
        torch.tensor([float(low <= i < high) / (high - low) for i in range(count)], dtype=torch.float64, device=DEVICE)
        for low, high in itertools.pairwise(edges)
    ])  # fmt: skip


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cells", [1, 7, 512])
def test_gradient_of_the_mean(backend, dtype, cells):
    B, H, T, S = 2, 4, 33, 40
    q, k, _ = make_qkv(B, H, 2, T, S, 16, dtype=dtype)
    options = {"sink": torch.full((H,), 0.5, device=DEVICE), "softcap": 3.0, "bias": torch.randn(1, H, 1, S).to(DEVICE)}
    mask = causal() & padding([S, 21])
    seen = mask.resolve(T, S, device=DEVICE).to_dense(S)
    R, C = min(cells, T), min(cells, S)
    upstream = torch.randn(B, H, R, C, device=DEVICE)

    def gradients(dtype, mean):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, options["sink"], options["bias"])]
        pooled = mean(*inputs[:2], softcap=3.0, sink=inputs[2], bias=inputs[3])
        return torch.autograd.grad((pooled * upstream.to(pooled.dtype)).sum(), inputs)

    def plain(q, k, **options):
        # a row without keys sees everything here, and is left out
        A = plain_attention(q, k, k, seen | ~seen.any(-1, keepdim=True), **options)[2]
        A = A.masked_fill(~seen.any(-1)[:, None, :, None], 0)
        return pooling(T, R).to(A.dtype) @ A @ pooling(S, C).to(A.dtype).T

    def ours(q, k, **options):
        return attention_map(q, k, cells, mask=mask, backend=backend, **options).mean

    results = (gradients(None, ours), gradients(None, plain), gradients(torch.float64, plain))
    for got, rival, exact in zip(*results, strict=True):
        assert_within_reference_error(got, rival, to_numpy(exact), axis=None, roundings=score_roundings(q, k))


def test_gradcheck_of_the_mean():
    q, k, _ = (x.requires_grad_() for x in make_qkv(1, 2, 1, 9, 11, 3, dtype=torch.float64, strided=False))
    torch.autograd.gradcheck(lambda q, k: attention_map(q, k, 4, mask=causal()).mean, (q, k), fast_mode=True)
    assert not attention_map(q, k, 4).max.requires_grad

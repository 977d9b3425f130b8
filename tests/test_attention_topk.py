"""attention_topk on every path against the float64 specification."""

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
    grown_memory,
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

from causalattn import attention_topk, causal, full, padding, sliding_window
from causalattn.attention.topk import select_largest
from causalattn.reference.attention import attention as reference_attention
from causalattn.reference.attention import attention_topk as reference
from causalattn.reference.attention import scores

COUNTS = st.sampled_from([1, 2, 7, 16, 33, 64, 65, 140])


def check(backend, q, k, n, mask, **options):
    """Values within twice torch's error of float64, and every key's float64 score that of its rank, to a rounding."""
    seen = mask.resolve(q.shape[2], k.shape[2], device=DEVICE).to_dense(k.shape[2])
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = (to_numpy(q), to_numpy(k))
    _, _, A = reference_attention(*inputs, inputs[1], to_numpy(seen), **arrays)
    x = scores(*inputs, to_numpy(seen), **{name: y for name, y in arrays.items() if name != "sink"})
    values, keys = reference(A, to_numpy(seen), n, x)
    result = attention_topk(q, k, n, mask=mask, backend=backend, **options)
    assert result.values.dtype == torch.promote_types(q.dtype, torch.float32)
    assert result.indices.dtype == torch.int32

    wide_q, wide_k = (y.to(result.values.dtype) for y in (q, k))
    plain = plain_attention(wide_q, wide_k, wide_k, seen, **options)[2].sort(-1, descending=True).values[..., :n]
    plain = torch.nn.functional.pad(plain, (0, n - plain.shape[-1]))
    roundings = score_roundings(q, k, options.get("scale"))
    assert_within_reference_error(result.values, plain, values, axis=None, roundings=roundings)

    indices = to_numpy(result.indices)
    assert np.array_equal(indices < 0, keys < 0)
    ranked = np.sort(indices, -1)
    assert not ((np.diff(ranked, axis=-1) == 0) & (ranked[..., 1:] >= 0)).any()
    x = np.where(np.isneginf(x), 0.0, x)
    ours, exact = (np.take_along_axis(x, np.maximum(i, 0), -1) * (i >= 0) for i in (indices, keys))
    band = 2 * np.finfo(np.float32).eps * (roundings + np.abs(x).max())
    assert np.abs(ours - exact).max() <= band


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), n=COUNTS, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, n, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, n, make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), n=COUNTS, seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, n, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, n, make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), n=COUNTS, extras=EXTRAS, seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, n, extras, seed):
    q, k, _ = make_qkv(*shape, seed=seed, scale=2.0)
    check(backend, q, k, n, causal(), **make_options(extras, shape, seed))


def integers(T, S, low=-2, high=3, dtype=torch.float32, seed=0):
    """q and k of small integers: every score is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(low, high, (2, 2, n, 16), generator=generator).to(DEVICE, dtype) for n in (T, S))
    k[:, :, S // 2 :: 3] = k[:, :, :1]
    return q, k


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("name", ["causal", "padded_left"])
def test_equal_scores_come_in_the_order_of_their_keys(backend, n, name):
    q, k = integers(40, 150)
    mask = make_mask(name, 2, 150)
    seen = to_numpy(mask.to_dense(40, 150))
    _, keys = reference(np.zeros((2, 2, 40, 150)), seen, n, scores(to_numpy(q), to_numpy(k), seen))
    assert np.array_equal(to_numpy(attention_topk(q, k, n, mask=mask, backend=backend).indices), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 9000])
def test_equal_scores_across_the_chunks_of_the_torch_path(dtype, n):
    q, k = integers(3, 17000, dtype=dtype)
    seen = to_numpy(full().to_dense(3, 17000))
    _, keys = reference(np.zeros((2, 2, 3, 17000)), seen, n, scores(to_numpy(q), to_numpy(k), seen))
    assert np.array_equal(to_numpy(attention_topk(q, k, n, backend="torch").indices), keys)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [4, 80])
def test_uniform_rows(backend, n):
    q = torch.zeros(1, 1, 90, 16, device=DEVICE)
    values, indices = attention_topk(q, q, n, causal=True, backend=backend)
    rank, row = torch.arange(n, device=DEVICE), torch.arange(90, device=DEVICE)[:, None]
    assert torch.equal(indices[0, 0], torch.where(rank <= row, rank, -1).int())
    assert (values[0, 0] - (rank <= row) / (row + 1)).abs().max() < 1e-7


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [4, 80])
def test_order_holds_where_probabilities_underflow(backend, n):
    q = torch.full((1, 1, 2, 16), 100.0, device=DEVICE)
    k = torch.arange(100.0, device=DEVICE).flip(0)[None, None, :, None].expand(1, 1, 100, 16)
    values, indices = attention_topk(q, k, n, backend=backend)
    assert torch.equal(indices[0, 0, 0], torch.arange(n, device=DEVICE, dtype=torch.int32))
    assert (values[..., 0] == 1).all()
    assert (values[..., 1:] == 0).all()


def test_float64_goes_through_the_torch_path():
    q, k, _ = make_qkv(2, 2, 1, 33, 50, 16, dtype=torch.float64)
    seen = to_numpy(causal().to_dense(33, 50))
    A = reference_attention(*map(to_numpy, (q, k, k)), seen)[2]
    values, keys = reference(A, seen, 20)
    result = attention_topk(q, k, 20, causal=True)
    assert result.values.dtype == torch.float64
    np.testing.assert_allclose(to_numpy(result.values), values, rtol=1e-12, atol=1e-15)
    assert np.array_equal(to_numpy(result.indices), keys)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("n", [8, 100])
def test_more_than_one_tile_of_the_torch_path(backend, n):
    q, k, _ = make_qkv(1, 2, 1, 1100, 2100, 16)
    check(backend, q, k, n, sliding_window(900))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [5, 70])
def test_padding_never_leaks(backend, n):
    q, k, _ = make_qkv(2, 2, 1, 80, 80, 16)
    clean = attention_topk(q, k, n, mask=padding([80, 21]), backend=backend)
    q, k = q.clone(), k.clone()
    q[1, :, 21:] = k[1, :, 21:] = torch.nan
    result = attention_topk(q, k, n, mask=padding([80, 21]), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, result, strict=True))
    assert (result.values[1, :, 21:] == 0).all()
    assert (result.indices[1, :, 21:] == -1).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [5, 70])
def test_a_nan_is_seen_in_the_rows_that_may_attend_it_alone(backend, n):
    q, k, _ = make_qkv(1, 2, 2, 90, 90, 16)
    clean = attention_topk(q, k, n, causal=True, backend=backend)
    k = k.clone()
    k[:, :, 80] = torch.nan
    result = attention_topk(q, k, n, causal=True, backend=backend)
    assert all(torch.equal(a[:, :, :80], b[:, :, :80]) for a, b in zip(clean, result, strict=True))
    assert result.values[:, :, 80:].isnan().all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [6, 66])
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend, n):
    q, k, _ = make_qkv(3, 4, 2, 90, 90, 16)
    mask = causal() & padding([90, 71, 90])
    whole = attention_topk(q, k, n, mask=mask, backend=backend)
    alone = attention_topk(q[1:2, :, :71], k[1:2, :, :71], n, causal=True, backend=backend)
    again = attention_topk(q, k, n, mask=mask, backend=backend)
    assert all(torch.equal(a[1:2, :, :71], b) for a, b in zip(whole, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [2, 70])
def test_offsets_past_two_to_the_31(backend, n):
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    k = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    q, small, _ = make_qkv(1, 1, 1, 5, 3, 16, dtype=torch.float16)
    k.copy_(small)
    result, expected = (attention_topk(q, keys, n, backend=backend) for keys in (k, small))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [2, 70])
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0), (1, 0, 0)])
def test_empty(backend, n, B, T, S):
    q, k = (torch.zeros(B, 2, count, 16, device=DEVICE) for count in (T, S))
    values, indices = attention_topk(q, k, n, backend=backend)
    assert values.shape == indices.shape == (B, 2, T, n)
    assert (values == 0).all()
    assert (indices == -1).all()


def test_a_mask_shifted_by_one_is_caught():
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    for backend in PATHS:
        result, expected = (attention_topk(q, k, 4, mask=mask, backend=backend) for mask in (wrong, right))
        assert not torch.equal(result.indices, expected.indices)


MEMORY = """
q, k = torch.randn(2, 1, 2, 32768, 16).unbind()
mask = ca.sliding_window(1024)
def run(T):
    return CALL
"""

# peak memory is read from /proc
if sys.platform == "linux":

    @pytest.mark.parametrize(
        "call",
        [
            "ca.attention_topk(q[:, :, :T], k[:, :, :T], 16, mask=mask)",
            "ca.attention_topk(q[:, :, :64], k[:, :, :T], 16)",
            "ca.attention_rows(q[:, :, :T], k[:, :, :T], range(0, T, T // 64), causal=True)",
        ],
    )
    def test_memory_is_under_a_hundredth_of_the_matrix(call):
        (grown,) = grown_memory(MEMORY.replace("CALL", call), 32768)
        assert 1024 * grown < 0.01 * 4 * 2 * 32768**2


def test_operator_contract():
    q, k, _ = make_qkv(2, 4, 2, 9, 20, 16)
    start, stop, _, offset = (causal() & padding([20, 7])).resolve(9, 20, device=DEVICE)
    bias, slopes, sink = (torch.randn(shape, device=DEVICE) for shape in ((2, 1, 9, 20), (1, 4), (4,)))
    for n in (3, 30):
        torch.library.opcheck(select_largest, (q, k, start, stop, offset, bias, slopes, 0.2, 5.0, sink, n, "torch"))


def test_compiles_once_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: attention_topk(q, k, 4, causal=True), backend=count, fullgraph=True)
    for T in range(10, 50, 2):
        q, k, _ = make_qkv(1, 2, 1, T, T, 16, strided=False)
        for got, eager in zip(compiled(q, k), attention_topk(q, k, 4, causal=True), strict=True):
            assert torch.equal(got, eager)
    assert len(graphs) <= 2


GOOD = torch.zeros(2, 4, 5, 16)
LEARNT = torch.zeros(2, 4, 5, 16, requires_grad=True)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "n must be at least 1, got 0", (GOOD, GOOD, 0), {}),
        (TypeError, "n must be an int, got float", (GOOD, GOOD, 2.0), {}),
        (TypeError, "n must be an int, got bool", (GOOD, GOOD, True), {}),
        (NotImplementedError, "attention_topk has no gradient: pass q.detach()", (LEARNT, GOOD, 1), {}),
        (NotImplementedError, "attention_topk has no gradient", (GOOD, LEARNT, 1), {}),
        (NotImplementedError, "has no gradient", (GOOD, GOOD, 1), {"bias": torch.zeros(5, 5, requires_grad=True)}),
        (NotImplementedError, "has no gradient", (GOOD, GOOD, 1), {"sink": torch.zeros(4, requires_grad=True)}),
        (ValueError, "head count that divides", (GOOD, GOOD[:, :3], 1), {}),
        (ValueError, "softcap must be positive and finite, got -1", (GOOD, GOOD, 1), {"softcap": -1.0}),
        (ValueError, r"bias must broadcast to \[2, 4, 5, 5\]", (GOOD, GOOD, 1), {"bias": torch.zeros(5, 6)}),
        (ValueError, r"alibi_slopes must have shape \[4\]", (GOOD, GOOD, 1), {"alibi_slopes": torch.ones(3)}),
        (TypeError, "mask must be a causalattn Mask", (GOOD, GOOD, 1), {"mask": torch.ones(5, 5)}),
        (ValueError, "backend must be", (GOOD, GOOD, 1), {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        attention_topk(*arguments, **options)


def test_without_gradients_being_recorded_inputs_may_require_them():
    with torch.no_grad():
        assert not attention_topk(LEARNT, LEARNT, 1).values.requires_grad

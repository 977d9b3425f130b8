"""attention_rows on every path against the float64 specification."""

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

from causalattn import attention, attention_rows, causal, full, padding
from causalattn.reference.attention import attention_rows as reference

# any order, with repeats, from either end
CHOICES = st.lists(st.integers(-1, 0) | st.integers(-129, 129), max_size=9)


def inside(rows, T):
    """rows brought into −T … T − 1."""
    return [i % T - T * (i < 0) for i in rows]


def check(backend, q, k, rows, mask, **options):
    """The rows within twice torch's error of float64."""
    seen = mask.resolve(q.shape[2], k.shape[2], device=DEVICE).to_dense(k.shape[2])
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    result = attention_rows(q, k, rows, mask=mask, backend=backend, **options)
    plain = plain_attention(q, k, k, seen, **options)[2][:, :, rows]
    expected = reference(to_numpy(q), to_numpy(k), rows, to_numpy(seen), **arrays)
    assert result.dtype == q.dtype
    roundings = score_roundings(q, k, options.get("scale"))
    assert_within_reference_error(result, plain, expected, axis=None, roundings=roundings)
    return result


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), rows=CHOICES, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, rows, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, inside(rows, shape.T), make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), rows=CHOICES, seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, rows, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, inside(rows, shape.T), make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), rows=CHOICES, extras=EXTRAS, seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, rows, extras, seed):
    q, k, _ = make_qkv(*shape, seed=seed, scale=2.0)
    check(backend, q, k, inside(rows, shape.T), causal(), **make_options(extras, shape, seed))


def test_float64_goes_through_the_torch_path():
    q, k, _ = make_qkv(2, 2, 1, 33, 50, 16, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64, device=DEVICE)
    result = attention_rows(q, k, [3, -1], causal=True, alibi_slopes=slopes)
    seen = to_numpy(causal().to_dense(33, 50))
    expected = reference(to_numpy(q), to_numpy(k), [3, -1], seen, alibi_slopes=to_numpy(slopes))
    assert result.dtype == torch.float64
    np.testing.assert_allclose(to_numpy(result), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_rows_of_attention(backend, dtype):
    q, k, v = make_qkv(2, 4, 2, 70, 90, 16, dtype=dtype)
    rows = torch.tensor([69, 0, 5, 5, -70], device=DEVICE)
    mask = causal() & padding([90, 31])
    options = {"mask": mask, "sink": torch.randn(4, device=DEVICE), "probs_dtype": torch.float32, "backend": backend}
    whole = attention(q, k, v, return_probs=True, **options).probs
    assert torch.equal(attention_rows(q, k, rows, **options), whole[:, :, rows])


@pytest.mark.parametrize(
    "rows", [(2, -1), range(2, 33, 30), np.array([2, -1]), torch.tensor([2, -1], dtype=torch.int16)]
)
def test_rows_of_any_kind(rows):
    q, k, _ = make_qkv(1, 2, 1, 33, 33, 16)
    assert torch.equal(attention_rows(q, k, rows), attention_rows(q, k, [2, 32]))


@pytest.mark.parametrize("backend", PATHS)
def test_gradients_reach_q_k_sink_and_bias(backend):
    q, k, _ = make_qkv(1, 2, 1, 20, 24, 16)
    bias, sink = torch.randn(1, 1, 20, 24, device=DEVICE), torch.randn(2, device=DEVICE)
    weights = torch.randn(1, 2, 3, 24, device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in (q, k, bias, sink)]

    def options(bias, sink):
        return {"causal": True, "bias": bias, "sink": sink}

    rows = attention_rows(*leaves[:2], [4, 4, -1], **options(*leaves[2:]), backend=backend)
    result = torch.autograd.grad((rows * weights).sum(), leaves)
    seen = causal().to_dense(20, 24, device=DEVICE)

    def plain(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        q, k, bias, sink = inputs
        probs = plain_attention(q, k, k, seen, bias=bias, sink=sink)[2][:, :, [4, 4, -1]]
        return torch.autograd.grad((probs * weights.to(dtype)).sum(), inputs)

    for got, rival, exact in zip(result, plain(torch.float32), plain(torch.float64), strict=True):
        roundings = score_roundings(q, k)
        assert_within_reference_error(got, rival, to_numpy(exact), axis=None, roundings=roundings)


@pytest.mark.parametrize("backend", PATHS)
def test_padding_never_leaks(backend):
    q, k, _ = make_qkv(2, 2, 1, 50, 50, 16)
    options = {"rows": [0, 20, 21, -1], "mask": padding([50, 21]), "backend": backend}
    clean = attention_rows(q, k, **options)
    q, k = q.clone(), k.clone()
    q[1, :, 21:] = k[1, :, 21:] = torch.nan
    assert torch.equal(clean, attention_rows(q, k, **options))
    assert (clean[1, :, 2:] == 0).all()
    assert (clean[1, :, :, 21:] == 0).all()


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend):
    q, k, _ = make_qkv(3, 4, 2, 70, 70, 16)
    rows = [50, 3, 17]
    slopes = torch.rand(4, device=DEVICE)
    options = {"rows": rows, "alibi_slopes": slopes, "backend": backend}
    whole = attention_rows(q, k, mask=causal() & padding([70, 51, 70]), **options)
    alone = attention_rows(q[1:2, :, :51], k[1:2, :, :51], causal=True, **options)
    again = attention_rows(q, k, mask=causal() & padding([70, 51, 70]), **options)
    assert torch.equal(whole[1:2, ..., :51], alone)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("backend", PATHS)
def test_a_map_of_more_than_two_to_the_31_entries(backend):
    # 2³¹ + queries, all of them one row of storage
    T = 2**22
    q = torch.randn(1, 1, 1, 16, device=DEVICE).expand(1, 1, T, 16)
    k = torch.randn(1, 1, 600, 16, device=DEVICE)
    result = attention_rows(q, k, [-1, T // 2], backend=backend)
    assert torch.equal(result, attention_rows(q[:, :, :2], k, [0, 1], backend=backend))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S", "rows"), [(0, 3, 3, [1]), (2, 0, 4, []), (2, 3, 0, [0, 1]), (2, 3, 4, [])])
def test_empty(backend, B, T, S, rows):
    q, k = (torch.zeros(B, 2, n, 16, device=DEVICE) for n in (T, S))
    assert attention_rows(q, k, rows, backend=backend).shape == (B, 2, len(rows), S)


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    seen = right.to_dense(33)
    plain = plain_attention(q, k, k, seen)[2][:, :, [7]]
    expected = reference(to_numpy(q), to_numpy(k), [7], to_numpy(seen))
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(attention_rows(q, k, [7], mask=wrong, backend=backend), plain, expected)


def test_compiles_once_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def chosen(q, k, rows):
        return attention_rows(q, k, rows, causal=True, alibi_slopes=q.new_ones(2)), attention_rows(q, k, [0, -1])

    compiled = torch.compile(chosen, backend=count, fullgraph=True)
    for T in range(10, 50, 2):
        q, k, _ = make_qkv(1, 2, 1, T, T, 16, strided=False)
        rows = torch.tensor([T - 1, 0, -2], device=DEVICE)
        for got, eager in zip(compiled(q, k, rows), chosen(q, k, rows), strict=True):
            assert torch.equal(got, eager)
    assert len(graphs) <= 2


def test_values_that_cannot_be_read_are_clamped():
    q, k, _ = make_qkv(1, 2, 1, 5, 5, 16)
    compiled = torch.compile(lambda q, k, rows: attention_rows(q, k, rows), backend="eager", fullgraph=True)
    result = compiled(q, k, torch.tensor([9, -9], device=DEVICE))
    assert torch.equal(result, attention_rows(q, k, [4, 0]))


GOOD = torch.zeros(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("error", "match", "rows", "options"),
    [
        (ValueError, "rows must lie in -5…4, got 5", [0, 5], {}),
        (ValueError, "rows must lie in -5…4, got -6", torch.tensor([-6]), {}),
        (ValueError, r"rows must have shape \[R\], got \[\]", 3, {}),
        (ValueError, r"rows must have shape \[R\], got \[1, 2\]", torch.zeros(1, 2, dtype=torch.int64), {}),
        (TypeError, "rows must be integers, got float32", [0.5], {}),
        (TypeError, "rows must be a sequence of integers, got NoneType", None, {}),
        (TypeError, "rows must be a sequence of integers, got str", "3", {}),
        (TypeError, "rows must be integers, got bool", torch.ones(5, dtype=torch.bool), {}),
        (TypeError, "probs_dtype must be float32", [0], {"probs_dtype": torch.half}),
        (ValueError, "softcap must be positive and finite, got 0", [0], {"softcap": 0.0}),
        (ValueError, r"bias must broadcast to \[2, 4, 5, 5\]", [0], {"bias": torch.zeros(1, 5, 4)}),
        (ValueError, r"alibi_slopes must have shape \[4\]", [0], {"alibi_slopes": torch.ones(3)}),
        (TypeError, "mask must be a causalattn Mask", [0], {"mask": torch.ones(5, 5)}),
        (ValueError, "backend must be", [0], {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, match, rows, options):
    with pytest.raises(error, match=match):
        attention_rows(GOOD, GOOD, rows, **options)


def test_a_row_of_an_empty_q_is_named():
    with pytest.raises(ValueError, match="rows must lie in 0…-1, got 0"):
        attention_rows(GOOD[:, :, :0], GOOD, [0], mask=full())

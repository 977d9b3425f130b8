"""attention on every path against the float64 specification."""

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

from causalattn import Intervals, attention, causal, full, intervals, packed, padding, sliding_window
from causalattn.reference.attention import attention as reference

# the package's own name attention is the function
forward = sys.modules["causalattn.attention.forward"]


def check(backend, q, k, v, mask, **logits):
    """All three results within twice torch's error of float64."""
    resolved = mask.resolve(q.shape[2], k.shape[2], device=DEVICE)
    seen = resolved.to_dense(k.shape[2])
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in logits.items()}
    expected = reference(*map(to_numpy, (q, k, v)), to_numpy(seen), **arrays)
    result = attention(q, k, v, mask=mask, return_probs=True, backend=backend, **logits)
    roundings = score_roundings(q, k, logits.get("scale"))
    for got, plain, exact in zip(result, plain_attention(q, k, v, seen, **logits), expected, strict=True):
        assert_within_reference_error(got, plain, exact, axis=None, roundings=roundings)
    return result


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), V=st.sampled_from([8, 59]), seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, V, seed):
    q, k, v = make_qkv(*shape, V, dtype, seed)
    check(backend, q, k, v, make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, seed):
    check(backend, *make_qkv(*shape, seed=seed), make_mask(name, shape.B, shape.S))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), extras=EXTRAS, seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, extras, seed):
    q, k, v = make_qkv(*shape, seed=seed, scale=2.0)
    check(backend, q, k, v, causal(), **make_options(extras, shape, seed))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3])
def test_any_scale(scale):
    for backend in PATHS:
        check(backend, *make_qkv(1, 2, 1, 33, 33, 16), full(), scale=scale)


def test_float64_goes_through_the_torch_path():
    q, k, v = make_qkv(2, 2, 1, 33, 50, 16, dtype=torch.float64)
    out, lse, _ = attention(q, k, v, causal=True)
    expected = reference(*map(to_numpy, (q, k, v)), to_numpy(causal().to_dense(33, 50)))
    assert out.dtype == lse.dtype == torch.float64
    np.testing.assert_allclose(to_numpy(out), expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(to_numpy(lse), expected[1], rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
def test_more_than_one_tile_of_the_torch_path(backend):
    q, k, v = make_qkv(1, 2, 1, 1100, 2100, 16)
    check(backend, q, k, v, sliding_window(900))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), name=st.sampled_from(["full", "causal", "window"]), seed=SEEDS)
def test_rows_sum_to_one(backend, shape, name, seed):
    q, k, v = make_qkv(*shape, seed=seed)
    mask = make_mask(name, shape.B, shape.S)
    probs = attention(q, k, v, mask=mask, return_probs=True, backend=backend).probs
    filled = mask.to_dense(shape.T, shape.S, device=DEVICE).any(-1)[:, None].expand(probs.shape[:3])
    total = probs.double().sum(-1)
    assert (total - filled.double()).abs().max() < 1e-6
    assert (probs >= 0).all()


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), seed=SEEDS)
def test_one_vector_added_to_every_key_shifts_lse_alone(backend, shape, seed):
    q, k, v = (x.double() if backend == "torch" else x for x in make_qkv(*shape, seed=seed))
    u = torch.randn(shape.D, generator=torch.Generator().manual_seed(seed + 1)).to(q)
    before, after = (attention(q, x, v, backend=backend) for x in (k, k + u))
    tolerance = 1e-11 if backend == "torch" else 1e-4
    assert (after.out - before.out).abs().max() < tolerance
    assert (after.lse - before.lse - (q @ u) * shape.D**-0.5).abs().max() < tolerance


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS, cut=st.integers(0, 129))
def test_future_keys_change_nothing(backend, shape, seed, cut):
    q, k, v = make_qkv(*shape, seed=seed)
    cut %= shape.T
    before = attention(q, k, v, causal=True, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, cut + 1 :], v[:, :, cut + 1 :] = 7.0, -3.0
    after = attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(before.out[:, :, : cut + 1], after.out[:, :, : cut + 1])
    assert torch.equal(before.lse[:, :, : cut + 1], after.lse[:, :, : cut + 1])


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), seed=SEEDS)
def test_permuting_keys_changes_nothing_and_permuting_queries_permutes_rows(backend, shape, seed):
    q, k, v = make_qkv(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(shape.S, generator=generator).to(DEVICE)
    rows = torch.randperm(shape.T, generator=generator).to(DEVICE)
    before = attention(q, k, v, backend=backend)
    after = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], backend=backend)
    assert (after.out - before.out[:, :, rows]).abs().max() < 1e-5
    assert (after.lse - before.lse[:, :, rows]).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_key_reaches_only_rows_that_may_attend_it(backend, value):
    q, k, v = make_qkv(1, 2, 2, 40, 40, 16)
    k = k.clone()
    k[:, :, 20] = value
    clean = attention(*make_qkv(1, 2, 2, 40, 40, 16), causal=True, backend=backend)
    result = attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(result.out[:, :, :20], clean.out[:, :, :20])
    assert result.out[:, :, 20:].isnan().any()


@pytest.mark.parametrize("backend", PATHS)
def test_padding_never_leaks(backend):
    q, k, v = make_qkv(2, 2, 1, 50, 50, 16)
    lengths = [50, 21]
    clean = attention(q, k, v, mask=padding(lengths), return_probs=True, backend=backend)
    q, k, v = q.clone(), k.clone(), v.clone()
    for x in (q, k, v):
        x[1, :, 21:] = torch.nan
    result = attention(q, k, v, mask=padding(lengths), return_probs=True, backend=backend)
    for before, after in zip(clean, result, strict=True):
        assert torch.equal(before, after)
    assert (result.out[1, :, 21:] == 0).all()
    assert result.lse[1, :, 21:].isneginf().all()


@pytest.mark.parametrize("backend", PATHS)
def test_a_key_allowed_to_nobody_between_two_runs_never_leaks(backend):
    q, k, v = make_qkv(1, 1, 1, 4, 12, 16)
    mask = intervals(torch.tensor([0, 0, 8, 8]), torch.tensor([3, 3, 12, 12]))
    clean = attention(q, k, v, mask=mask, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, 3:8] = v[:, :, 3:8] = torch.nan
    assert torch.equal(clean.out, attention(q, k, v, mask=mask, backend=backend).out)


@pytest.mark.parametrize("backend", PATHS)
def test_any_layout_of_sinks_and_intervals(backend):
    q, k, v = make_qkv(2, 4, 2, 33, 40, 16)
    sink = torch.randn(4, 3, device=DEVICE)
    check(backend, q, k, v, causal(), sink=sink[:, 1])
    start = torch.randint(0, 20, (33, 2), device=DEVICE, dtype=torch.int32).T
    stop = torch.full((1, 1), 31, device=DEVICE).expand(2, 33)
    given = Intervals(start, stop, start, 7)
    plain = Intervals(*(x.int().contiguous() for x in given[:3]), 7)
    for x, y in zip(*(attention(q, k, v, mask=m, backend=backend)[:2] for m in (given, plain)), strict=True):
        assert torch.equal(x, y)


def test_autocast_changes_nothing():
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16)
    expected = attention(q, k, v)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = attention(q, k, v)
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.lse, expected.lse)


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend):
    q, k, v = make_qkv(3, 4, 2, 70, 70, 16)
    whole = attention(q, k, v, mask=causal() & padding([70, 51, 70]), backend=backend)
    alone = attention(q[1:2, :, :51], k[1:2, :, :51], v[1:2, :, :51], causal=True, backend=backend)
    again = attention(q, k, v, mask=causal() & padding([70, 51, 70]), backend=backend)
    assert torch.equal(whole.out[1:2, :, :51], alone.out)
    assert torch.equal(whole.lse[1:2, :, :51], alone.lse)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], again[:2], strict=True))


@pytest.mark.parametrize("backend", PATHS)
def test_offsets_past_two_to_the_31(backend):
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    k = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    q, small, v = make_qkv(1, 1, 1, 5, 3, 16, dtype=torch.float16)
    k.copy_(small)
    result, expected = (attention(q, keys, v, backend=backend) for keys in (k, small))
    assert torch.equal(result.out, expected.out)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0), (1, 0, 0)])
def test_empty(backend, B, T, S):
    q, k, v = (torch.zeros(B, 2, n, 16, device=DEVICE) for n in (T, S, S))
    result = attention(q, k, v, return_probs=True, backend=backend)
    assert result.out.shape == (B, 2, T, 16)
    assert result.probs.shape == (B, 2, T, S)
    assert (result.out == 0).all()
    assert S > 0 or result.lse.isneginf().all()


@pytest.mark.parametrize("backend", PATHS)
def test_scores_of_ten_thousand(backend):
    q, k, v = make_qkv(1, 1, 1, 40, 40, 16, scale=100.0)
    check(backend, q, k, v, causal())


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, v = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    seen = right.to_dense(33)
    plain = plain_attention(q, k, v, seen)[0]
    exact = reference(*map(to_numpy, (q, k, v)), to_numpy(seen))[0]
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    assert_within_reference_error(attention(q, k, v, mask=right, backend=backend).out, plain, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(attention(q, k, v, mask=wrong, backend=backend).out, plain, exact)


def test_operator_contract():
    q, k, v = make_qkv(2, 4, 2, 9, 20, 16)
    start, stop, _, offset = (causal() & padding([20, 7])).resolve(9, 20, device=DEVICE)
    bias, slopes, sink = torch.randn(2, 1, 9, 20, device=DEVICE), torch.rand(1, 4, device=DEVICE), torch.randn(4)
    torch.library.opcheck(
        forward.attend, (q, k, v, start, stop, offset, bias, slopes, 0.2, 5.0, sink, torch.float32, "torch")
    )


def test_compiles_once_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True).out, backend=count, fullgraph=True)
    for T in range(10, 50, 8):
        q, k, v = make_qkv(1, 2, 1, T, T, 16, strided=False)
        assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True).out)
    assert len(graphs) <= 2


GOOD = torch.zeros(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, r"q must have 4 axes \[B, H, T, D\], got \[4, 5, 16\]", (GOOD[0], GOOD, GOOD), {}),
        (TypeError, "q must be a torch.Tensor, got ndarray", (GOOD.numpy(), GOOD, GOOD), {}),
        (TypeError, "got int64", (GOOD.long(), GOOD.long(), GOOD), {}),
        (TypeError, "k must have q's dtype float32, got float16", (GOOD, GOOD.half(), GOOD), {}),
        (ValueError, "k must be on q's device cpu, got meta", (GOOD, GOOD.to("meta"), GOOD), {}),
        (ValueError, r"k must have shape \[2, H_kv, S, 16\], got \[2, 4, 5, 8\]", (GOOD, GOOD[..., :8], GOOD), {}),
        (ValueError, "head count that divides q's 4, got 3", (GOOD, GOOD[:, :3], GOOD[:, :3]), {}),
        (ValueError, "head dim of at least 1", (GOOD[..., :0], GOOD[..., :0], GOOD), {}),
        (ValueError, r"v must have shape \[2, 4, 5, V\]", (GOOD, GOOD, GOOD[:, :, :3]), {}),
        (TypeError, "v must have k's dtype", (GOOD, GOOD, GOOD.double()), {}),
        (ValueError, "softcap must be positive and finite, got -1", (GOOD, GOOD, GOOD), {"softcap": -1.0}),
        (ValueError, "softcap must be positive and finite, got inf", (GOOD, GOOD, GOOD), {"softcap": float("inf")}),
        (TypeError, "sink must be a torch.Tensor, got list", (GOOD, GOOD, GOOD), {"sink": [0.0] * 4}),
        (TypeError, "sink must be floating point", (GOOD, GOOD, GOOD), {"sink": torch.zeros(4).long()}),
        (TypeError, "bias must be a torch.Tensor, got float", (GOOD, GOOD, GOOD), {"bias": 1.0}),
        (TypeError, "alibi_slopes must be a torch.Tensor, got list", (GOOD, GOOD, GOOD), {"alibi_slopes": [1.0] * 4}),
        (ValueError, r"sink must have shape \[4\], got \[3\]", (GOOD, GOOD, GOOD), {"sink": torch.zeros(3)}),
        (ValueError, r"bias must broadcast to \[2, 4, 5, 5\]", (GOOD, GOOD, GOOD), {"bias": torch.zeros(5, 6)}),
        (
            ValueError,
            r"alibi_slopes must have shape \[4\] or \[2, 4\], got \[3\]",
            (GOOD, GOOD, GOOD),
            {"alibi_slopes": torch.ones(3)},
        ),
        (TypeError, "alibi_slopes must be floating point", (GOOD, GOOD, GOOD), {"alibi_slopes": torch.ones(4).long()}),
        (
            NotImplementedError,
            "alibi_slopes have no gradient",
            (GOOD, GOOD, GOOD),
            {"alibi_slopes": torch.ones(4, requires_grad=True)},
        ),
        (
            TypeError,
            "probs_dtype must be float32, got float16",
            (GOOD, GOOD, GOOD),
            {"return_probs": True, "probs_dtype": torch.half},
        ),
        (TypeError, "bias must be floating point", (GOOD, GOOD, GOOD), {"bias": torch.zeros(5, 5, dtype=torch.int)}),
        (TypeError, "mask must be a causalattn Mask", (GOOD, GOOD, GOOD), {"mask": torch.ones(5, 5)}),
        (ValueError, "mask must be for", (GOOD, GOOD, GOOD), {"mask": causal().resolve(6, 6)}),
        (ValueError, "mask must lie in", (GOOD, GOOD, GOOD), {"mask": full().resolve(5, 9)}),
        (
            TypeError,
            "mask must hold integers, got float32",
            (GOOD, GOOD, GOOD),
            {"mask": Intervals(*(torch.zeros(1, 5) for _ in range(3)), 0)},
        ),
        (ValueError, "packed needs as many", (GOOD, GOOD[:, :, :3], GOOD[:, :, :3]), {"mask": packed([0, 5])}),
        (ValueError, "backend must be", (GOOD, GOOD, GOOD), {"backend": "cuda"}),
        (TypeError, "got float64", (GOOD.double(), GOOD.double(), GOOD.double()), {"backend": "triton"}),
    ],
)
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        attention(*arguments, **options)

"""Forms and edges of covariances: chosen heads and tokens, the sink given, means, empty rows, NaN, memory, errors."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, PATHS, grown_memory, make_qkv, to_numpy

from causalattn import attention, attention_correlation, attention_covariance, dense, intervals, padding
from causalattn.covariance import operators
from causalattn.reference.covariance import correlation, covariance


@pytest.mark.parametrize("backend", PATHS)
def test_heads_and_tokens_are_those_of_the_whole(backend):
    q, k, v = make_qkv(1, 4, 2, 300, 300, 16)
    options = {"causal": True, "alibi_slopes": torch.rand(1, 4, device=DEVICE), "sink": torch.randn(4, device=DEVICE)}
    options |= {"bias": torch.randn(4, 1, 300, device=DEVICE), "backend": backend}
    heads, tokens = [2, -3], torch.tensor([299, 5, -10], device=DEVICE)
    for values in (None, v):
        whole = attention_covariance(q, k, v=values, **options)
        few = attention_covariance(q, k, v=values, heads=heads, tokens=tokens, **options)
        expected = whole[:, [2, 1]][..., tokens, :][..., tokens]
        torch.testing.assert_close(few, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_given_the_sink_is_without_its_column(backend, dtype):
    q, k, _ = make_qkv(2, 2, 1, 70, 70, 16)
    options = {"dtype": dtype, "backend": backend}
    given_sink = attention_correlation(q, k, causal=True, condition_on_sink=True, **options)
    stop = torch.arange(70, device=DEVICE)
    without = attention_correlation(q, k[:, :, 1:], mask=intervals(torch.zeros_like(stop), stop), **options)
    torch.testing.assert_close(given_sink, without, rtol=0, atol=1e-5)
    assert not given_sink[..., 0].any() and not given_sink[..., 0, :].any()
    assert (given_sink.diagonal(dim1=-2, dim2=-1)[..., 1:] == 1).all()


@pytest.mark.parametrize("backend", PATHS)
def test_centred_it_is_numpys(backend):
    q, k, v = make_qkv(1, 2, 1, 63, 70, 16, 24)
    A = to_numpy(attention(q, k, v, causal=True, return_probs=True, backend=backend).probs)
    C, R = (to_numpy(f(q, k, causal=True, center=True, backend=backend))
            for f in (attention_covariance, attention_correlation))  # fmt: skip
    assert np.allclose(C[0, 1] / 69, np.cov(A[0, 1]), rtol=0, atol=1e-7)
    assert np.allclose(R[0, 1], np.corrcoef(A[0, 1]), rtol=0, atol=1e-5)
    wide = dense.correlation(torch.as_tensor(A, device=DEVICE), center=True)
    assert np.allclose(to_numpy(wide[0, 0]), np.corrcoef(A[0, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", PATHS)
def test_a_row_of_nothing_is_zero_throughout(backend):
    q, k, v = make_qkv(2, 2, 1, 50, 50, 16)
    q[1, :, 21:] = k[1, :, 21:] = v[1, :, 21:] = torch.nan
    for values in (None, v):
        for center in (False, True):
            options = {"v": values, "center": center, "mask": padding([50, 21]), "backend": backend}
            C, R = attention_covariance(q, k, **options), attention_correlation(q, k, **options)
            for x in (C, R):
                assert x.isfinite().all() and not x[1, :, 21:].any() and not x[1, ..., 21:].any()
            assert (R.diagonal(dim1=-2, dim2=-1)[1, :, :21] == 1).all()


@pytest.mark.parametrize("backend", PATHS)
def test_a_nan_reaches_only_rows_that_may_attend_it(backend):
    q, k, _ = make_qkv(1, 1, 1, 40, 40, 16)
    clean = attention_correlation(q, k, causal=True, backend=backend)
    k[:, :, 30] = torch.nan
    R = attention_correlation(q, k, causal=True, backend=backend)
    assert torch.equal(R[..., :30, :30], clean[..., :30, :30])
    assert R[..., 30:, :].isnan().all() and R[..., 30:].isnan().all()


@pytest.mark.parametrize("backend", PATHS)
def test_rows_that_lie_two_to_the_31_apart(backend):
    q, _, _ = make_qkv(1, 1, 1, 3, 3, 16, dtype=torch.float16)
    storage = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1)).copy_(q)
    result = attention_covariance(far, far, causal=True, backend=backend)
    assert torch.equal(result, attention_covariance(q, q, causal=True, backend=backend))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 4), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_empty(backend, B, T, S, center, dtype):
    q, k = (torch.zeros(B, 2, n, 16, device=DEVICE) for n in (T, S))
    options = {"center": center, "dtype": dtype, "backend": backend}
    for v in (None, k):
        C, R = (f(q, k, v=v, **options) for f in (attention_covariance, attention_correlation))
        assert C.shape == R.shape == (B, 2, T, T) and C.dtype == dtype
        assert torch.equal(R, torch.full_like(R, S == 1 and not center and v is None))
        assert attention_covariance(q, k, v=v, sum_heads=True, tokens=[], **options).shape == (B, 0, 0)


def test_a_matrix_at_hand():
    A = torch.randn(2, 3, 40, 30, device=DEVICE).softmax(-1)
    for x in (A, A[0], A[0, 0], A.mT, A.half()):
        expected = covariance(to_numpy(x))
        assert np.allclose(to_numpy(dense.covariance(x)), expected, rtol=1e-13, atol=0)
        assert np.allclose(to_numpy(dense.correlation(x)), correlation(expected), rtol=1e-13, atol=0)
    assert dense.covariance(A, dtype=torch.float32).dtype == torch.float32


MEMORY = """
def run(T):
    q, k = torch.randn(2, 1, 1, T, 64)
    return ca.attention_covariance(q, k, causal=True, dtype=torch.float32, backend="torch")
"""


def test_workspace_is_two_panels():
    (grown,) = grown_memory(MEMORY, 4096)
    # C is 64 MiB and two panels 32, but A would be 64
    assert grown < 122 * 1024


@pytest.mark.parametrize("center", [False, True])
def test_operator_contract(center):
    q, k, _ = make_qkv(1, 2, 1, 20, 24, 16)
    start, stop = torch.zeros(1, 20, dtype=torch.int32), torch.full((1, 20), 24, dtype=torch.int32)
    hull = torch.tensor([[0, 24]], dtype=torch.int32) if center else None
    pivot = torch.zeros(1, 2, 20)
    arguments = (q.cpu(), k.cpu(), start, stop, 4, None, None, 0.25, 0.0, pivot, None, hull, False, False, True)
    torch.library.opcheck(operators.covariance_of_attention, (*arguments, torch.float64, "torch"))
    torch.library.opcheck(operators.covariance_of_rows, (q.cpu(), center, True, False, torch.float32, "torch"))


def test_autocast_changes_nothing():
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16)
    for values in (None, v):
        expected = attention_covariance(q, k, v=values)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(attention_covariance(q, k, v=values), expected)


GOOD = torch.zeros(2, 4, 5, 16)


@pytest.mark.parametrize("function", [attention_covariance, attention_correlation])
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "heads must lie in -4…3, got 4", {"heads": [0, 4]}),
        (ValueError, r"heads must be distinct and at least one, got \[1, 1\]", {"heads": [1, -3]}),
        (ValueError, r"heads must be distinct and at least one, got \[\]", {"heads": []}),
        (TypeError, "heads must be a sequence of integers, got int", {"heads": 1}),
        (TypeError, "heads must be a sequence of integers, got one of float", {"heads": [1.0]}),
        (ValueError, "tokens must lie in -5…4, got 5", {"tokens": [5]}),
        (TypeError, "tokens must be integers, got float32", {"tokens": [0.5]}),
        (ValueError, r"tokens must have shape \[R\], got \[\]", {"tokens": 3}),
        (TypeError, "dtype must be float64 or float32, got bfloat16", {"dtype": torch.bfloat16}),
        (ValueError, r"v must have shape \[2, 4, 5, V\]", {"v": GOOD[:1]}),
        (TypeError, "v must be a torch.Tensor, got list", {"v": [1]}),
        (ValueError, "softcap must be positive and finite, got 0", {"softcap": 0.0}),
        (ValueError, r"sink must have shape \[4\]", {"sink": torch.zeros(3)}),
        (TypeError, "mask must be a causalattn Mask", {"mask": torch.ones(5, 5)}),
        (ValueError, "backend must be", {"backend": "cuda"}),
        (NotImplementedError, "has no gradient: pass q.detach", {"bias": torch.zeros(5, 5, requires_grad=True)}),
        (NotImplementedError, "has no gradient: pass q.detach", {"v": GOOD.clone().requires_grad_()}),
        (
            ValueError,
            "condition_on_sink needs the first real key of a row to be its leftmost key, got a row with keys",
            {
                "condition_on_sink": True,
                "mask": intervals(torch.zeros(5).int(), torch.full((5,), 5), torch.tensor([0, 0, 1, 0, 0])),
            },
        ),
    ],
)
def test_bad_input_is_named(function, error, match, options):
    with pytest.raises(error, match=match):
        function(GOOD, GOOD, **options)


def test_a_float64_input_has_a_float64_covariance():
    q = GOOD.double()
    with pytest.raises(TypeError, match="dtype must be float64, got float32"):
        attention_covariance(q, q, dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype must be float64, got float32"):
        dense.covariance(q, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"correlation has no gradient: pass A\.detach"):
        dense.correlation(q.clone().requires_grad_())
    if "triton" in PATHS:
        with pytest.raises(TypeError, match="got float64"):
            attention_covariance(q, q, backend="triton")

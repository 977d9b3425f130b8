"""attention_covariance and attention_correlation on every path against the float64 specification."""

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

from causalattn import attention, attention_correlation, attention_covariance, causal, dense, intervals, padding
from causalattn.covariance import gram, operators
from causalattn.reference.attention import attention as reference_attention
from causalattn.reference.covariance import attended_keys, correlation, covariance


class Choice:
    """What of a covariance is asked for, and the rows that it is of."""

    def __init__(self, **chosen):
        self.chosen = chosen

    def __repr__(self):
        return f"Choice({self.chosen})"

    def seen(self, mask, T, S):
        """bool [B or 1, T, S]: who may attend whom once the sink is given."""
        resolved = mask.resolve(T, S, device=DEVICE)
        seen = resolved.to_dense(S)
        if self.chosen.get("condition_on_sink"):
            seen &= torch.arange(S, device=DEVICE) != resolved.first[..., None]
        return seen

    def of_rows(self, rows, seen, values):
        """C and R of rows [B, H, T, W] by NumPy in float64."""
        center, keys = self.chosen.get("center", False), None if values else attended_keys(seen)
        return self.of_products(covariance(rows, center=center, keys=keys))

    def by_torch(self, rows, seen, values):
        """The same in the dtype asked for, by eager torch."""
        x = rows.to(self.chosen.get("dtype", torch.float64))
        if self.chosen.get("center"):
            keys = np.ones(rows.shape[-1], bool) if values else attended_keys(seen)[:, None, None]
            keys = torch.as_tensor(keys, device=rows.device)
            x = (x - x.sum(-1, keepdim=True) / keys.sum(-1, keepdim=True).clamp(min=1)) * keys
        return self.of_products(to_numpy(x @ x.mT))

    def of_products(self, C):
        if self.chosen.get("heads") is not None:
            C = C[:, self.chosen["heads"]]
        if self.chosen.get("sum_heads"):
            C = C.sum(1)
        if self.chosen.get("tokens") is not None:
            C = C[..., self.chosen["tokens"], :][..., self.chosen["tokens"]]
        return C, correlation(C)


CHOICES = st.builds(
    Choice,
    heads=st.sampled_from([None, [0], [-1]]),
    sum_heads=st.booleans(),
    tokens=st.sampled_from([None, [0], [-1, 0, 0]]),
    center=st.booleans(),
    condition_on_sink=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


def check(backend, q, k, mask, choice, v=None, **options):
    """Both within twice the error of plain torch that holds A in float32, beside the lengths of the two rows."""
    T, S = q.shape[2], k.shape[2]
    seen = choice.seen(mask, T, S)
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    values = k if v is None else v
    out, _, A = reference_attention(*map(to_numpy, (q, k, values)), to_numpy(seen), **arrays)
    offset = {"offset": S - T} if "alibi_slopes" in options else {}
    plain = plain_attention(*(x.float() for x in (q, k, values)), seen, **options, **offset)
    seen = np.broadcast_to(to_numpy(seen), (len(q), T, S))
    C, R = choice.of_rows(A if v is None else out, seen, v is not None)
    rival = choice.by_torch(plain[2] if v is None else plain[0], seen, v is not None)

    lengths = np.sqrt(np.diagonal(C, axis1=-2, axis2=-1))
    lengths = np.where(lengths > 0, lengths, 1)
    unit = lengths[..., :, None] * lengths[..., None, :]
    # what a mean leaves of a row is of few digits, and so is a sum over v
    raw, _ = Choice(**choice.chosen | {"center": False}).of_rows(A if v is None else np.abs(out), seen, v is not None)
    lost = np.max(np.diagonal(raw, axis1=-2, axis2=-1) / lengths**2, initial=1)
    roundings = score_roundings(q, k, options.get("scale"))
    for function, exact, plain, scale in (
        (attention_covariance, C, rival[0], unit), (attention_correlation, R, rival[1], 1.0)
    ):  # fmt: skip
        result = function(q, k, v=v, mask=mask, backend=backend, **choice.chosen, **options)
        assert result.dtype == choice.chosen.get("dtype", torch.float64)
        assert torch.equal(result, result.mT)
        assert_within_reference_error(
            (result.double() / torch.as_tensor(scale, device=DEVICE)).float(), plain / scale, exact / scale,
            axis=None, roundings=2 * roundings, terms=lost,
        )  # fmt: skip
    diagonal = result.diagonal(dim1=-2, dim2=-1).cpu().numpy()
    assert np.array_equal(diagonal, np.diagonal(R, axis1=-2, axis2=-1))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), choice=CHOICES, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, choice, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), choice)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), choice=CHOICES, seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, choice, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), choice)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), name=st.sampled_from(["full", "padded_right"]), choice=CHOICES, extras=EXTRAS, seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, name, choice, extras, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), choice, **make_options(extras, shape, seed))


@pytest.mark.parametrize("backend", PATHS)
@given(
    shape=shapes(),
    V=st.sampled_from([5, 64, 130]),
    name=st.sampled_from(["full", "causal", "padded_right"]),
    choice=CHOICES,
    seed=SEEDS,
)
def test_of_the_outputs(backend, shape, V, name, choice, seed):
    q, k, v = make_qkv(*shape, V, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), choice, v)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_float64_goes_through_the_torch_path(values, center):
    q, k, v = make_qkv(2, 4, 2, 70, 90, 16, dtype=torch.float64)
    out, _, A = reference_attention(*map(to_numpy, (q, k, v)), to_numpy(causal().to_dense(70, 90)))
    C = covariance(out if values else A, center=center)
    options = {"v": v if values else None, "center": center, "causal": True}
    np.testing.assert_allclose(to_numpy(attention_covariance(q, k, **options)), C, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(to_numpy(attention_correlation(q, k, **options)), correlation(C), rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["causal", "window", "packed_padded"])
def test_several_panels(backend, dtype, name, monkeypatch):
    # tiles of the kernel are 128 rows in the interpreter
    T = 1100 if backend == "torch" else 300
    q, k, _ = make_qkv(1, 1, 1, T, T, 16)
    mask = make_mask(name, 1, T)
    two = attention_covariance(q, k, mask=mask, dtype=dtype, backend=backend)
    monkeypatch.setattr(gram, "PANEL_TILES", 1)
    check(backend, q, k, mask, Choice(dtype=dtype))
    assert torch.equal(attention_covariance(q, k, mask=mask, dtype=dtype, backend=backend), two)
    check(backend, q, k, mask, Choice(dtype=dtype, center=True))


@pytest.mark.parametrize("backend", PATHS)
def test_several_panels_of_outputs(backend, monkeypatch):
    monkeypatch.setattr(gram, "PANEL_TILES", 1)
    q, k, v = make_qkv(1, 2, 1, 300 if backend == "triton" else 1100, 40, 16, 20)
    for dtype in (torch.float64, torch.float32):
        check(backend, q, k, padding([40]), Choice(dtype=dtype, sum_heads=True), v)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("center", [False, True])
def test_products_are_exact_in_float64(backend, center):
    """What is beyond the rank of P is 0 to float64's roundings: products rounded to float32 would leave 1e-8."""
    q, k, _ = make_qkv(1, 2, 1, 130, 15, 16, scale=0.3)
    C = attention_covariance(q, k, center=center, backend=backend)
    eigenvalues = torch.linalg.eigvalsh(C)
    rank = 15 - center
    assert (eigenvalues[..., :-rank].abs() <= 1e-14 * eigenvalues[..., -1:]).all()
    assert (eigenvalues[..., -rank:] > 1e-9 * eigenvalues[..., -1:]).all()


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS)
def test_what_holds_of_every_covariance(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    options = {"causal": True, "backend": backend}
    C, R = (f(q, k, **options) for f in (attention_covariance, attention_correlation))
    generator = torch.Generator().manual_seed(seed)
    # positive semidefinite, entries of A being positive so are C's
    assert (torch.linalg.eigvalsh(C) >= -1e-13 * C.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)).all()
    assert (C >= 0).all() and (R <= 1 + 1e-14).all()
    # tokens chosen, in any order, are those rows and columns
    order = torch.randperm(shape.T, generator=generator).to(DEVICE)
    chosen = attention_covariance(q, k, tokens=order, **options)
    close = {"rtol": 2e-6 * score_roundings(q, k), "atol": 0}
    torch.testing.assert_close(chosen, C[..., order, :][..., order], **close)
    # a sum over heads is the sum, and a head is itself
    total = attention_covariance(q, k, sum_heads=True, **options)
    torch.testing.assert_close(total, C.sum(1), rtol=1e-13, atol=0)
    last = attention_covariance(q, k, heads=[-1], sum_heads=True, **options)
    assert torch.equal(last, C[:, -1])
    # the scale of a row cancels
    A = attention(q, k, k, return_probs=True, probs_dtype=torch.float32, **options).probs.double()
    scales = torch.rand(shape.T, 1, generator=generator).to(A) + 0.1
    torch.testing.assert_close(dense.correlation(A * scales), dense.correlation(A), rtol=1e-12, atol=0)
    torch.testing.assert_close(R, dense.correlation(A), rtol=0, atol=2e-6 * score_roundings(q, k))


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


def test_a_partial_correlation_survives_a_sink():
    """Of two rows given two others, under a sink that leaves each of them alike to three digits."""
    q, k, _ = make_qkv(1, 1, 1, 64, 64, 16)
    bias = torch.zeros(64, device=DEVICE)
    bias[0] = 8
    A = reference_attention(*map(to_numpy, (q, k, k)), to_numpy(causal().to_dense(64, 64)), bias=to_numpy(bias))[2]
    rows, given = A[0, 0, [40, 50]], A[0, 0, [20, 30]]
    rest = rows - rows @ np.linalg.pinv(given) @ given
    expected = correlation(covariance(rest))[0, 1]
    R = attention_correlation(q, k, tokens=[20, 30, 40, 50], causal=True, bias=bias)[0, 0]
    L = torch.linalg.cholesky(R)
    assert abs((L[3, 2] / torch.hypot(L[3, 2], L[3, 3])).item() - expected) < 1e-5


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
    T = 6144
    (grown,) = grown_memory(MEMORY, T)
    # C alone would be 144 MiB, and so would A
    assert grown < (T * T * 4 + 2 * 1024 * T * 4) / 1024 + 40 * 1024


@pytest.mark.parametrize("backend", PATHS)
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    A = reference_attention(*map(to_numpy, (q, k, k)), to_numpy(right.to_dense(33)))[2]
    plain = plain_attention(q, k, k, right.to_dense(33))[2]
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(
            attention_covariance(q, k, mask=wrong, backend=backend), covariance(to_numpy(plain)), covariance(A), axis=None
        )


def without_last_panel(rows, C, left, right, m, n, add):
    if n == 0:
        original(rows, C, left, right, m, n, add)


def original(rows, *args):
    gram.multiply(rows, *args)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("wrong", ["last panel", "last chunk", "mirror"])
def test_what_is_skipped_is_caught(backend, wrong, monkeypatch):
    T = 1100 if backend == "torch" else 300
    q, k, _ = make_qkv(1, 1, 1, T, T, 16)
    monkeypatch.setattr(gram, "PANEL_TILES", 1)
    rows = operators.HeadRows if backend == "torch" else operators.KernelRows
    if wrong == "last panel":
        monkeypatch.setattr(rows, "multiply", without_last_panel)
    elif wrong == "last chunk":
        chunks = rows.chunks
        monkeypatch.setattr(rows, "chunks", lambda rows, m, n: chunks(rows, m, n)[:-1])
    else:
        place = gram._place
        monkeypatch.setattr(gram, "_place", lambda target, c, add: place(target, c.T if c.stride(0) == 1 else c, add))
    with pytest.raises(AssertionError):
        check(backend, q, k, causal(), Choice())


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
            "condition_on_sink needs the first real key of a row to be its leftmost key, got a row with keys before it: 2",
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
    with pytest.raises(NotImplementedError, match="correlation has no gradient: pass A.detach"):
        dense.correlation(q.clone().requires_grad_())
    if "triton" in PATHS:
        with pytest.raises(TypeError, match="got float64"):
            attention_covariance(q, q, backend="triton")

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

from causalattn import attention, attention_correlation, attention_covariance, causal, dense, padding
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
@pytest.mark.parametrize("name", ["causal", "packed_padded"])
def test_several_panels(backend, dtype, name, monkeypatch):
    # tiles of the kernel are 128 rows in the interpreter
    T = 1030 if backend == "torch" else 260
    q, k, _ = make_qkv(1, 1, 1, T, T, 16)
    mask = make_mask(name, 1, T)
    two = attention_covariance(q, k, mask=mask, dtype=dtype, backend=backend)
    monkeypatch.setattr(gram, "PANEL_BLOCKS", 1)
    check(backend, q, k, mask, Choice(dtype=dtype))
    assert torch.equal(attention_covariance(q, k, mask=mask, dtype=dtype, backend=backend), two)
    check(backend, q, k, mask, Choice(dtype=dtype, center=True))


@pytest.mark.parametrize("backend", PATHS)
def test_several_panels_of_outputs(backend, monkeypatch):
    monkeypatch.setattr(gram, "PANEL_BLOCKS", 1)
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
def test_a_mask_shifted_by_one_is_caught(backend):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    A = reference_attention(*map(to_numpy, (q, k, k)), to_numpy(right.to_dense(33)))[2]
    plain = plain_attention(q, k, k, right.to_dense(33))[2]
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(
            attention_covariance(q, k, mask=wrong, backend=backend),
            covariance(to_numpy(plain)),
            covariance(A),
            axis=None,
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
    monkeypatch.setattr(gram, "PANEL_BLOCKS", 1)
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

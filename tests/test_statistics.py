"""The statistics on every path against the float64 specification, and the identities they must keep."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    MASKS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    assert_within_reference_error,
    grown_memory,
    make_mask,
    make_qkv,
    plain_stats,
    score_roundings,
    shapes,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

import causalattn as ca
from causalattn.reference.statistics import attention_stats as reference
from causalattn.reference.statistics import score_asymmetry as reference_score_asymmetry
from causalattn.statistics import chosen, pairs, received, rows

SQUARE_ONLY = ("net_flow", "asymmetry")
RECTANGULAR = tuple(name for name in ca.AttentionStats._fields if name not in SQUARE_ONLY)


def check(backend, q, k, mask, want, columns=("sink",), **logits):
    """Every wanted statistic within twice torch's error of float64."""
    S = k.shape[2]
    intervals = mask.resolve(q.shape[2], S, device=DEVICE)
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in logits.items()}
    seen, first = to_numpy(intervals.to_dense(S)), to_numpy(intervals.first)
    expected = reference(
        to_numpy(q), to_numpy(k), seen, first=first, offset=intervals.offset, columns=columns, **arrays
    )
    plain = plain_stats(q, k, intervals, columns=columns, **logits)
    roundings = score_roundings(q, k)
    result = ca.attention_stats(q, k, mask=mask, want=want, columns=columns, backend=backend, **logits)
    for name in want:
        got, rival, exact = getattr(result, name), plain[name], expected[name]
        if name == "asymmetry":
            for part in ca.Asymmetry._fields:
                assert_within_reference_error(
                    getattr(got, part), rival[part], exact[part], axis=None, roundings=roundings
                )
        else:
            own = max(roundings, lse_roundings(q, k, exact, **logits)) if name == "lse" else roundings
            assert_within_reference_error(got, rival, exact, axis=None, roundings=own)


def lse_roundings(q, k, lse, bias=None, softcap=None, **_):
    """Roundings of the largest lse that those of a score's parts are: a bias may cancel what it is added to."""
    if bias is None:
        return 0
    rounded = score_roundings(q, k) - 2
    parts = min(rounded, softcap or rounded) + bias[bias.isfinite()].abs().max().item()
    largest = np.abs(np.where(np.isfinite(lse), lse, 0)).max(initial=0.0)
    return (rounded + 2 * parts) / largest if largest else 0


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), RECTANGULAR, columns=("sink", 0, -1))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), seed=SEEDS)
def test_square_statistics_match_float64(backend, shape, name, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), ("columns", "received_mean", *SQUARE_ONLY))


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), softcap=st.sampled_from([None, 0.7]), sink=st.sampled_from([None, 2.0]), seed=SEEDS)
def test_bias_slopes_softcap_and_sink(backend, shape, softcap, sink, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    options = {"bias": torch.randn(shape.T, shape.T, generator=torch.Generator().manual_seed(seed)).to(DEVICE)}
    options["alibi_slopes"] = torch.rand(shape.H, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    options |= {} if softcap is None else {"softcap": softcap}
    options |= {} if sink is None else {"sink": torch.full((shape.H,), sink, device=DEVICE)}
    check(backend, q, k, ca.causal(), ca.AttentionStats._fields, **options)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("mask", [ca.full(), ca.causal(), ca.sliding_window(600)], ids=["full", "causal", "window"])
def test_more_than_one_tile_of_the_torch_path(backend, mask):
    q, k, _ = make_qkv(1, 2, 1, 1100, 1100, 16)
    check(backend, q, k, mask, ca.AttentionStats._fields)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS)
def test_causal_identities(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    stats = ca.attention_stats(q, k, causal=True, want="all", backend=backend)
    diag, sum_sq = stats.diag.double(), stats.sum_sq.double()
    assert (stats.dag_score - (1 - diag.mean(-1))).abs().max() < 1e-6
    share = diag.square().sum(-1) / sum_sq.sum(-1)
    assert (stats.asymmetry.ratio - ((1 - share) / (1 + share)).clamp(min=0).sqrt()).abs().max() < 1e-3
    assert (stats.asymmetry.l1 - 2 * stats.below.double().sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("T", [1, 33, 130])
def test_uniform_attention(backend, T):
    q = k = torch.zeros(1, 1, T, 16, device=DEVICE)
    harmonic = sum(1 / n for n in range(1, T + 1))
    stats = ca.attention_stats(q, k, causal=True, backend=backend)
    assert stats.dag_score.item() == pytest.approx(1 - harmonic / T, abs=1e-6)
    assert stats.entropy[0, 0].tolist() == pytest.approx([math.log(n) for n in range(1, T + 1)], abs=1e-5)
    assert ca.dag_score(q, k, backend=backend).item() == pytest.approx((T - 1) / (2 * T), abs=1e-6)
    share = sum(1 / n**2 for n in range(1, T + 1)) / harmonic
    ratio = ca.asymmetry(q, k, causal=True, backend=backend).ratio.item()
    assert ratio == pytest.approx(math.sqrt((1 - share) / (1 + share)), abs=1e-6)


@pytest.mark.parametrize("backend", PATHS)
def test_acyclicity_under_a_causal_mask_is_the_diagonal_s(backend):
    q, k, v = make_qkv(1, 2, 1, 33, 33, 16)
    A = ca.attention(q, k, v, causal=True, return_probs=True, backend=backend).probs.double()
    acyclicity = torch.linalg.matrix_exp(A.square()).diagonal(dim1=-2, dim2=-1).sum(-1) - 33
    diag = ca.attention_stats(q, k, causal=True, want="diag", backend=backend).diag.double()
    assert (acyclicity - torch.expm1(diag.square()).sum(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), seed=SEEDS)
def test_stock_kernel_identities(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed, strided=False)
    q, k = (x.double() for x in (q, k)) if backend == "torch" else (q, k)
    scale, tolerance = shape.D**-0.5, 1e-10 if backend == "torch" else 2e-4
    stats = ca.attention_stats(q, k, want=RECTANGULAR, backend=backend)
    keys = k.repeat_interleave(shape.H // shape.H_kv, 1)
    v = torch.zeros_like(keys).requires_grad_()
    F.scaled_dot_product_attention(q, keys, v).backward(torch.ones_like(q))
    assert (stats.received - v.grad[..., 0]).abs().max() < tolerance * shape.T
    attended = F.scaled_dot_product_attention(q, keys, keys)
    assert (stats.entropy - (stats.lse - scale * (q * attended).sum(-1))).abs().max() < tolerance
    doubled = ca.attention_stats(q, k, want="lse", scale=2 * scale, backend=backend).lse
    assert (stats.sum_sq - torch.exp(doubled - 2 * stats.lse)).abs().max() < tolerance
    intervals = ca.causal().resolve(shape.T, shape.S, device=DEVICE)
    strictly = intervals._replace(stop=(intervals.stop - 1).clamp(min=0))
    below = ca.attention_stats(q, k, want="lse", mask=strictly, backend=backend).lse
    assert (stats.below - torch.exp(below - stats.lse)).abs().max() < tolerance


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS)
def test_ranges_and_conservation(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed, scale=3.0)
    stats = ca.attention_stats(q, k, want="all", backend=backend)
    assert (stats.mass - 1).abs().max() < 1e-6
    assert (stats.entropy > -1e-5).all()
    assert (stats.entropy < math.log(shape.S) + 1e-5).all()
    assert (stats.sum_sq <= stats.max * (1 + 1e-5)).all()
    assert (stats.received.sum(-1) - shape.T).abs().max() < 1e-4 * shape.T
    assert stats.net_flow.sum(-1).abs().max() < 1e-4 * shape.T
    assert ((stats.asymmetry.ratio >= 0) & (stats.asymmetry.ratio <= 1)).all()


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS)
def test_permuting_tokens_permutes_statistics(backend, shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    order = torch.randperm(shape.T, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    want = ("entropy", "sum_sq", "received", "diag", "net_flow", "asymmetry")
    before = ca.attention_stats(q, k, want=want, backend=backend)
    after = ca.attention_stats(q[:, :, order], k[:, :, order], want=want, backend=backend)
    for name in want[:-1]:
        assert (getattr(after, name) - getattr(before, name)[:, :, order]).abs().max() < 1e-5 * max(1, shape.T)
    assert (after.asymmetry.frobenius - before.asymmetry.frobenius).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), seed=SEEDS, cut=st.integers(0, 129))
def test_future_keys_change_nothing(backend, shape, seed, cut):
    q, k, _ = make_qkv(*shape, seed=seed)
    cut %= shape.T
    before = ca.attention_stats(q, k, causal=True, backend=backend)
    k = k.clone()
    k[:, :, cut + 1 :] = 5.0
    after = ca.attention_stats(q, k, causal=True, backend=backend)
    for name in ("lse", "max", "mass", "entropy", "sum_sq", "below", "diag", "distance", "columns"):
        assert torch.equal(getattr(before, name)[:, :, : cut + 1], getattr(after, name)[:, :, : cut + 1])


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend):
    q, k, _ = make_qkv(3, 4, 2, 70, 70, 16)
    mask = ca.causal() & ca.padding([70, 51, 70])
    whole, again = (ca.attention_stats(q, k, mask=mask, want="all", backend=backend) for _ in range(2))
    alone = ca.attention_stats(q[1:2, :, :51], k[1:2, :, :51], causal=True, want="all", backend=backend)
    for name in ca.AttentionStats._fields[:-2]:
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
        assert torch.equal(getattr(whole, name)[1:2, :, :51], getattr(alone, name)), name
    assert torch.equal(whole.dag_score[1:2], alone.dag_score)
    for part in ca.Asymmetry._fields[:-1]:
        assert torch.equal(getattr(whole.asymmetry, part)[1:2], getattr(alone.asymmetry, part)), part


@pytest.mark.parametrize("backend", PATHS)
def test_a_symmetric_map_has_no_asymmetry(backend):
    # points on a circle: every row is the same one turned, so A is symmetric
    angle = 2 * math.pi * torch.arange(60, device=DEVICE) / 60
    x = torch.stack([angle.cos(), angle.sin()], -1).repeat(1, 1, 1, 8)
    result = ca.asymmetry(x, x, scale=1.0, backend=backend)
    assert result.ratio.max() < 1e-6
    assert result.net_flow.abs().max() < 1e-5


@given(shape=shapes(square=True), seed=SEEDS)
def test_score_asymmetry(shape, seed):
    q, k, _ = make_qkv(*shape, seed=seed)
    expected = reference_score_asymmetry(to_numpy(q), to_numpy(k))
    finite = np.isfinite(expected) & (expected < 1e3)
    np.testing.assert_allclose(to_numpy(ca.score_asymmetry(q, k))[finite], expected[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", ["below", "distance", "received", "asymmetry"])
def test_a_mask_shifted_by_one_is_caught(backend, name):
    q, k, _ = make_qkv(1, 1, 1, 33, 33, 16)
    wrong = ca.causal().resolve(33, 33, device=DEVICE)
    wrong = wrong._replace(stop=(wrong.stop + 1).clamp(max=33))
    with pytest.raises(AssertionError, match="error"):
        stats = ca.attention_stats(q, k, mask=wrong, want=name, backend=backend)
        right = ca.causal().resolve(33, 33, device=DEVICE)
        plain = plain_stats(q, k, right)[name]
        got = getattr(stats, name)
        got, plain = (got.l1, plain["l1"]) if name == "asymmetry" else (got, plain)
        exact = reference(to_numpy(q), to_numpy(k), to_numpy(right.to_dense(33)))[name]
        assert_within_reference_error(got, plain, exact["l1"] if name == "asymmetry" else exact, axis=None)


def test_what_is_not_wanted_is_none():
    q, k, _ = make_qkv(1, 2, 1, 9, 9, 16)
    stats = ca.attention_stats(q, k, want="entropy")
    assert [name for name in stats._fields if getattr(stats, name) is not None] == ["entropy"]
    assert ca.attention_stats(q, k).received is None
    assert ca.attention_stats(q, k).dag_score.shape == (1, 2)
    assert all(value is not None for value in ca.attention_stats(q, k, want="all"))


MEMORY = """
q, k = torch.randn(2, 1, 1, 6144, 32).unbind()
def run(T):
    ca.attention_stats(q[:, :, :T], k[:, :, :T], want="all")
"""


# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_is_linear():
        (grown,) = grown_memory(MEMORY, 6144)
        assert 1024 * grown < 0.25 * 4 * 6144**2


def test_operator_contracts():
    q, k, _ = make_qkv(2, 4, 2, 20, 20, 16)
    start, stop, first, offset = (ca.causal() & ca.padding([20, 7])).resolve(20, 20, device=DEVICE)
    bias, slopes = torch.randn(2, 1, 20, 20, device=DEVICE), torch.rand(1, 4, device=DEVICE)
    logits = (q, k, start, stop, offset, bias, slopes, 0.2, 5.0, torch.randn(4, device=DEVICE))
    names = " ".join(rows.ROWS)
    torch.library.opcheck(rows.row_statistics, (*logits, names, "torch"))
    packed = rows.row_statistics(*logits, names, "torch")
    masked = (*logits, packed[-1].clone(), packed[1].clone())
    torch.library.opcheck(received.received, (*masked, "torch"))
    torch.library.opcheck(pairs.pair_statistics, (*masked, "torch"))
    torch.library.opcheck(chosen.chosen_probs, (*masked, first[..., None], "torch"))


GOOD = torch.zeros(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("want must be 'all' or names among .*, got 'entorpy'", lambda: ca.attention_stats(GOOD, GOOD, want="entorpy")),
        (
            "columns must hold 'sink' or positions from -5 to 4, got 5",
            lambda: ca.attention_stats(GOOD, GOOD, columns=[5]),
        ),
        ("columns must hold .* got 'bos'", lambda: ca.attention_stats(GOOD, GOOD, columns=["bos"])),
        ("as many queries as keys, got T = 3 and S = 5", lambda: ca.asymmetry(GOOD[:, :, :3], GOOD)),
        ("as many queries as keys", lambda: ca.attention_stats(GOOD[:, :, :3], GOOD, want="net_flow")),
        ("score_asymmetry needs as many", lambda: ca.score_asymmetry(GOOD[:, :, :3], GOOD)),
        ("head count that divides", lambda: ca.dag_score(GOOD, GOOD[:, :3])),
    ],
)
def test_bad_input_is_named(match, call):
    with pytest.raises(ValueError, match=match):
        call()

"""The permutation null against its formula with every weight written out, and against shuffling itself."""

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    MASKS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    Shape,
    make_mask,
    make_qkv,
    plain_attention,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

import causalattn.masks as masks
from causalattn.nulls import NOISE, SOURCE, null_from_stats, permutation_null
from causalattn.reference.attention import attention as reference_attention
from causalattn.reference.nulls import permutation_null as reference_null
from causalattn.reference.nulls import shuffled, weights
from causalattn.statistics import attention_stats

EPS = torch.finfo(torch.float32).eps
# what a null adds to its statistics does not depend on the number of heads
SHAPES = st.builds(
    Shape,
    st.integers(1, 3),
    st.just(2),
    st.integers(1, 2),
    *[st.sampled_from([1, 15, 33])] * 2,
    st.sampled_from([16, 59]),
)


def probabilities(q, k, intervals, **logits):
    """A and what each row may attend, in float64 NumPy."""
    seen = to_numpy(intervals.to_dense(k.shape[2]))
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in logits.items()}
    return reference_attention(to_numpy(q), to_numpy(k), to_numpy(k), seen, **arrays)[2], seen


def weights_of(intervals, S, statistic, column="sink"):
    T = intervals.start.shape[1]
    key = to_numpy(intervals.first) if column == "sink" else np.full((1, T), column % S)
    return weights(statistic, T, S, offset=intervals.offset, column=key)


def std_bound(A, w, seen, statistic):
    """How far the variance may be off: NOISE roundings of Σ A² and of (Σ A)² / n in every row."""
    n = np.maximum(seen.sum(-1), 1)
    mean = (w * seen).sum(-1) / n
    spread = ((w - mean[..., None]) ** 2 * seen).sum(-1) / np.maximum(n - 1, 1)
    noise = NOISE * EPS * ((A**2).sum(-1) + A.sum(-1) ** 2 / n[:, None])
    total = A.sum((-2, -1)) if statistic == "dag_score" else seen.any(-1).sum(-1)[:, None]
    return (spread[:, None] * noise).sum(-1) / np.where(total > 0, total, np.inf) ** 2


def check(null, q, k, intervals, statistic, column="sink", **logits):
    S = k.shape[2]
    A, seen = probabilities(q, k, intervals, **logits)
    _, lse, plain_A = plain_attention(q, k, k, intervals.to_dense(S), **logits)
    w = weights_of(intervals, S, statistic, column)
    expected, plain = (reference_null(x, w, seen, statistic) for x in (A, to_numpy(plain_A)))
    # A = exp(S − lse) is as far off as its exponent: a dot product rounds with its terms, lse with itself
    scale = logits.get("scale", q.shape[3] ** -0.5)
    terms = scale * (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    size = 2 + terms + lse.nan_to_num(0, 0, 0).abs().amax().item()
    band = EPS * size * max(np.abs(expected[name]).max(initial=0.0) for name in ("value", "mean"))
    for name in ("value", "mean"):
        error, plain_error = (np.abs(x - expected[name]).max() for x in (to_numpy(getattr(null, name)), plain[name]))
        assert error <= 2 * plain_error + band
    assert (np.abs(to_numpy(null.std) ** 2 - expected["std"] ** 2) <= size * std_bound(A, w, seen, statistic)).all()
    value, mean, std, lift, z = (to_numpy(x) for x in null)
    assert np.abs(lift - (value - mean)).max() <= 2 * EPS * np.abs([value, mean]).max()
    assert np.array_equal(z == 0, (std == 0) | (lift == 0))
    assert np.allclose(z[std > 0], lift[std > 0] / std[std > 0], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("statistic", SOURCE)
@given(shape=SHAPES, name=st.sampled_from(sorted(MASKS)), seed=SEEDS)
def test_closed_form(backend, statistic, shape, name, seed):
    q, k, _ = make_qkv(*shape, seed=seed, scale=2.0)
    mask = make_mask(name, shape.B, shape.S)
    intervals = mask.resolve(shape.T, shape.S, device=DEVICE)
    check(permutation_null(q, k, statistic=statistic, mask=mask, backend=backend), q, k, intervals, statistic)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", sorted(SQUARE_MASKS.keys() - MASKS.keys()))
@pytest.mark.parametrize("statistic", SOURCE)
def test_closed_form_of_packed_masks(backend, statistic, name):
    q, k, _ = make_qkv(2, 2, 1, 33, 33, 16, seed=3)
    mask = make_mask(name, 2, 33)
    intervals = mask.resolve(33, 33, device=DEVICE)
    check(permutation_null(q, k, statistic=statistic, mask=mask, backend=backend), q, k, intervals, statistic)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("column", ["sink", 0, 4, -1])
def test_columns_logits_and_learned_sinks(backend, column):
    q, k, _ = make_qkv(2, 2, 1, 15, 18, 16, seed=5)
    logits = {"bias": torch.randn(2, 15, 18).to(DEVICE), "scale": 0.7, "softcap": 3.0}
    logits["sink"] = torch.tensor([0.5, -1.0], device=DEVICE)
    logits["alibi_slopes"] = torch.tensor([0.3, 1.0], device=DEVICE)
    intervals = masks.sliding_window(6).resolve(15, 18, device=DEVICE)
    options = {"statistic": "column", "column": column, "backend": backend}
    null = permutation_null(q, k, mask=masks.sliding_window(6), **options, **logits)
    check(null, q, k, intervals, "column", column, **logits)


@pytest.mark.parametrize("statistic", SOURCE)
@given(shape=SHAPES, name=st.sampled_from(sorted(MASKS)))
def test_float64_is_right_to_the_last_digit_of_float32(statistic, shape, name):
    q, k, _ = make_qkv(*shape, dtype=torch.float64, scale=2.0)
    intervals = make_mask(name, shape.B, shape.S).resolve(shape.T, shape.S, device=DEVICE)
    A, seen = probabilities(q, k, intervals)
    expected = reference_null(A, weights_of(intervals, shape.S, statistic), seen, statistic)
    null = permutation_null(q, k, statistic=statistic, mask=intervals)
    for name in ("value", "mean", "std"):
        ours = to_numpy(getattr(null, name))
        assert np.abs(ours - expected[name]).max() <= EPS * np.abs(expected[name]).max()


@pytest.mark.parametrize("statistic", SOURCE)
def test_simulation(statistic):
    q, k, _ = make_qkv(2, 1, 1, 12, 14, 16, dtype=torch.float64, seed=1, scale=2.0)
    mask = masks.sliding_window(5, right=3) & masks.padding([14, 9])
    intervals = mask.resolve(12, 14, device=DEVICE)
    A, seen = probabilities(q, k, intervals)
    w = weights_of(intervals, 14, statistic)
    null = permutation_null(q, k, statistic=statistic, mask=mask)
    generator, count = np.random.default_rng(0), 2000
    for b in range(2):
        total = A[b, 0].sum() if statistic == "dag_score" else seen[b].any(-1).sum()
        draws = [(shuffled(A[b, 0], seen[b], generator) * w[0]).sum() / total for _ in range(count)]
        mean, std = null.mean[b, 0].item(), null.std[b, 0].item()
        assert abs(np.mean(draws) - mean) <= 5 * std / np.sqrt(count)
        # the variance of a sample variance, with the sample's own fourth moment
        fourth = np.mean((np.array(draws) - mean) ** 4)
        assert abs(np.var(draws) - std**2) <= 5 * np.sqrt((fourth - std**4) / count)


@pytest.mark.parametrize("backend", PATHS)
def test_from_statistics_of_an_earlier_pass(backend):
    q, k, _ = make_qkv(2, 2, 1, 33, 33, 16, seed=7)
    intervals = make_mask("padded_left", 2, 33).resolve(33, 33, device=DEVICE)
    stats = attention_stats(q, k, mask=intervals, columns=(3, "sink", -2), backend=backend)
    cases = [
        ("dag_score", 0, "sink"),
        ("distance", 0, "sink"),
        ("column", 0, 3),
        ("column", 1, "sink"),
        ("column", 2, -2),
    ]
    for statistic, index, column in cases:
        null = null_from_stats(stats, intervals, 33, statistic, index, column=column)
        direct = permutation_null(q, k, statistic=statistic, column=column, mask=intervals, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(null, direct, strict=True))


@pytest.mark.parametrize("backend", PATHS)
def test_causal_is_the_causal_mask(backend):
    q, k, _ = make_qkv(1, 2, 2, 15, 15, 16)
    both = [
        permutation_null(q, k, causal=True, backend=backend),
        permutation_null(q, k, mask=masks.causal(), backend=backend),
    ]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("statistic", SOURCE)
@given(shape=SHAPES, name=st.sampled_from(sorted(MASKS)))
def test_equal_weights_equal_their_null(backend, statistic, shape, name):
    B, H, H_kv, T, S, D = shape
    q, k = torch.zeros(B, H, T, D, device=DEVICE), torch.ones(B, H_kv, S, D, device=DEVICE)
    null = permutation_null(q, k, statistic=statistic, mask=make_mask(name, B, S), backend=backend)
    assert (null.std == 0).all() and (null.z == 0).all()
    bound = 8 * EPS * null.mean.abs().clamp(min=1e-30)
    assert (null.lift.abs() <= bound).all()


def test_nothing_to_attend():
    for T, S in [(0, 5), (3, 0), (0, 0)]:
        q, k, _ = make_qkv(2, 1, 1, T, S, 16, strided=False)
        for statistic in ("dag_score", "distance"):
            null = permutation_null(q, k, statistic=statistic)
            assert all(torch.equal(x, torch.zeros(2, 1, device=DEVICE)) for x in null)


def test_far_windows_do_not_cancel():
    T, w = 3, 4
    q, k, _ = make_qkv(1, 1, 1, T, w, 16, seed=2, dtype=torch.float64)
    intervals = masks.full().resolve(T, w, offset=10**6, device=DEVICE)
    A, seen = probabilities(q, k, intervals)
    expected = reference_null(A, weights_of(intervals, w, "distance"), seen, "distance")
    null = permutation_null(q, k, statistic="distance", mask=intervals)
    assert np.abs(to_numpy(null.std) / expected["std"] - 1).max() < 1e-9


def test_a_shifted_mask_is_noticed():
    shape = Shape(1, 2, 2, 33, 33, 16)
    q, k, _ = make_qkv(*shape, seed=2)
    stats = attention_stats(q, k, causal=True)
    right = null_from_stats(stats, masks.causal().resolve(33, 33, device=DEVICE), 33, "dag_score")
    wrong = null_from_stats(stats, masks.causal().resolve(33, 33, offset=1, device=DEVICE), 33, "dag_score")
    assert ((right.mean - wrong.mean).abs() > 1e-3).all()


def test_bad_input_is_named():
    q, k, _ = make_qkv(1, 2, 1, 5, 7, 16)
    with pytest.raises(ValueError, match="statistic must be one of dag_score, distance, column, got 'entropy'"):
        permutation_null(q, k, statistic="entropy")
    with pytest.raises(ValueError, match="got 7"):
        permutation_null(q, k, statistic="column", column=7)
    with pytest.raises(TypeError, match=r"q must be a torch.Tensor, got list"):
        permutation_null([1.0], k)

    intervals = masks.full().resolve(5, 7, device=DEVICE)
    stats = attention_stats(q, k, want=("mass", "sum_sq", "columns"))
    with pytest.raises(ValueError, match="stats must hold below for the null of 'dag_score', got None"):
        null_from_stats(stats, intervals, 7, "dag_score")
    with pytest.raises(ValueError, match=r"column_index must be one of stats.columns' 1, got 2"):
        null_from_stats(stats, intervals, 7, "column", 2)
    with pytest.raises(ValueError, match=r"column must be 'sink' or a position from -7 to 6, got 'last'"):
        null_from_stats(stats, intervals, 7, "column", column="last")
    with pytest.raises(ValueError, match="statistic must be one of"):
        null_from_stats(stats, intervals, 7, "below")

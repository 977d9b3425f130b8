"""The specifications against definitions written another way, and against torch's own operators in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    MASKS,
    SEEDS,
    assert_within_reference_error,
    make_mask,
    make_qkv,
    plain_attention,
    plain_stats,
    shapes,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

from causalattn.reference import masks as reference_masks
from causalattn.reference.attention import attention
from causalattn.reference.nulls import offset_null, permutation_null, shuffled, weights
from causalattn.reference.statistics import attention_stats, score_asymmetry


@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), seed=SEEDS)
def test_attention_is_sdpa(shape, name, seed):
    q, k, v = make_qkv(*shape, V=7, dtype=torch.float64, seed=seed)
    seen = make_mask(name, shape.B, shape.S).to_dense(shape.T, shape.S, device=q.device)
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    out, lse, probs = attention(*map(to_numpy, (q, k, v)), to_numpy(seen))
    filled = np.broadcast_to(to_numpy(seen.any(-1))[:, None], lse.shape)
    assert np.allclose(out[filled], to_numpy(sdpa)[filled], rtol=0, atol=1e-12)
    assert np.array_equal(np.isneginf(lse), ~filled) and not out[~filled].any()
    assert np.allclose(probs.sum(-1), filled, rtol=0, atol=1e-12)


@given(shape=shapes(square=True), name=st.sampled_from(sorted(MASKS)), seed=SEEDS)
def test_statistics_are_torchs_in_float64(shape, name, seed):
    q, k, _ = make_qkv(*shape, dtype=torch.float64, seed=seed)
    intervals = make_mask(name, shape.B, shape.S).resolve(shape.T, shape.S, device=q.device)
    plain = plain_stats(q, k, intervals, columns=("sink", -1))
    seen, first = to_numpy(intervals.to_dense(shape.S)), to_numpy(intervals.first)
    expected = attention_stats(to_numpy(q), to_numpy(k), seen, first=first, columns=("sink", -1))
    assert expected.keys() == plain.keys()
    for name in expected.keys() - {"asymmetry"}:
        assert np.allclose(to_numpy(plain[name]), expected[name], rtol=1e-9, atol=1e-12), name
    for name, value in expected["asymmetry"].items():
        assert np.allclose(to_numpy(plain["asymmetry"][name]), value, rtol=1e-9, atol=1e-12), name


def test_what_a_causal_mask_makes_trivial():
    T = 33
    seen = reference_masks.causal(T, T, 0)
    uniform = attention_stats(np.zeros((1, 1, T, 4)), np.ones((1, 1, T, 4)), seen)
    harmonic, squares = (np.sum(np.arange(1, T + 1) ** -float(n)) for n in (1, 2))
    assert np.isclose(uniform["dag_score"], 1 - harmonic / T)
    delta = squares / harmonic
    assert np.isclose(uniform["asymmetry"]["ratio"], np.sqrt((1 - delta) / (1 + delta)))
    q = np.random.default_rng(0).normal(size=(2, 1, T, 4))
    stats = attention_stats(q, q[:, :, ::-1], seen)
    assert np.allclose(stats["dag_score"], 1 - stats["diag"].mean(-1))
    assert np.allclose(stats["entropy"], -np.sum(probs(q, seen) * np.log(probs(q, seen) + (~seen)[:, None]), -1))


def probs(q, seen):
    return attention(q, q[:, :, ::-1], q, seen)[2]


def test_score_asymmetry_of_known_scores():
    x = np.random.default_rng(1).normal(size=(1, 2, 9, 4))
    assert np.allclose(score_asymmetry(x, x), 0)
    assert np.isclose(score_asymmetry(np.eye(2)[None, None], np.array([[[[0.0, -1.0], [1.0, 0.0]]]])), np.inf)


def test_shuffling_keeps_a_row_and_its_null_keeps_the_sum():
    generator = np.random.default_rng(2)
    A, seen = generator.random((6, 8)), generator.random((6, 8)) < 0.6
    A = A * seen
    assert np.array_equal(np.sort(shuffled(A, seen, generator)), np.sort(A))
    assert np.isclose(offset_null(A, seen).sum(), A.sum())
    w = weights("distance", 6, 8, offset=2)
    null = permutation_null(A[None, None], np.ones_like(w), seen[None], "distance")
    assert np.isclose(null["value"], null["mean"]) and np.allclose(null["std"], 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_times_rule_notices(dtype):
    q, k, v = make_qkv(2, 2, 1, 15, 33, 16, dtype=dtype)
    seen = make_mask("causal", 2, 33).to_dense(15, 33, device=q.device)
    expected = attention(*map(to_numpy, (q, k, v)), to_numpy(seen))[0]
    plain = plain_attention(q, k, v, seen)[0]
    assert_within_reference_error(plain, plain, expected)
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(plain * 1.1, plain, expected)
    shifted = make_mask("causal", 2, 33).to_dense(15, 33, offset=17, device=q.device)
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(plain_attention(q, k, v, shifted)[0], plain, expected)

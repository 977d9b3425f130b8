"""The statistics of a matrix at hand against the float64 specification, and against those from q and k."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, MASKS, SEEDS, make_mask, to_numpy
from hypothesis import given
from hypothesis import strategies as st

import causalattn.masks as masks
from causalattn import dense
from causalattn.reference import dense as reference
from causalattn.reference.nulls import weights
from causalattn.statistics import AttentionStats

LEADS = st.sampled_from([(), (2,), (2, 3), (1, 2), (0, 2)])
SIZES = st.sampled_from([1, 2, 7, 33])


def make_probs(lead, T, S, seed=0, dtype=torch.float32, seen=None):
    """Rows that sum to one over seen [B or 1, T, S], stored keys first, with some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, S, T, generator=generator, dtype=torch.float64).mT * 3
    x = x.masked_fill(x < -5, -torch.inf)
    if seen is not None:
        x = x.masked_fill(~(seen[:, None] if x.ndim == 4 else seen).cpu(), -torch.inf)
    return x.softmax(-1).nan_to_num(0).to(DEVICE, dtype)


def close(ours, expected, dtype):
    """One rounding of the result, which is summed in float64."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if dtype == torch.float64:
        eps *= 64  # sums of S float64 terms on both sides
    expected = np.asarray(expected).reshape(ours.shape)
    return np.abs(to_numpy(ours) - expected).max(initial=0) <= eps * np.abs(expected).max(initial=0)


def four(A):
    return to_numpy(A)[(None,) * (4 - A.ndim)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(lead=LEADS, T=SIZES, S=SIZES, seed=SEEDS)
def test_every_statistic(dtype, lead, T, S, seed):
    A = make_probs(lead, T, S, seed, dtype)
    expected = reference.matrix_stats(four(A), columns=("sink", -1))
    square = T == S
    want = set(AttentionStats._fields) - ({"net_flow", "asymmetry"} if not square else set())
    stats = dense.attention_stats(A, want=want, columns=("sink", -1))
    assert stats.lse is None
    for name in want - {"lse", "asymmetry"}:
        value = getattr(stats, name)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert value.shape[: len(lead)] == lead and close(value, expected[name], dtype), name
    if square:
        for name, value in stats.asymmetry._asdict().items():
            assert close(value, expected["asymmetry"][name], dtype), name


@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_mask_gives_the_sink_and_the_mean(name, T, S, seed):
    intervals = make_mask(name, 3, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((3, 2), T, S, seed, seen=seen)
    stats = dense.attention_stats(A, want=("columns", "received_mean"), mask=intervals)
    expected = reference.matrix_stats(four(A), to_numpy(seen), first=to_numpy(intervals.first))
    assert close(stats.columns, expected["columns"], A.dtype)
    assert close(stats.received_mean, expected["received_mean"], A.dtype)


@given(T=SIZES, seed=SEEDS)
def test_seed_definitions(T, seed):
    A = make_probs((2, 3), T, T, seed)
    assert close(dense.dag_score(A), reference.dag_score(to_numpy(A)), A.dtype)
    difference = dense.asymmetry_matrix(A)
    assert np.array_equal(to_numpy(difference), to_numpy(A - A.mT)) and torch.equal(difference, -difference.mT)
    assert close(dense.asymmetry(A).l1, np.abs(reference.asymmetry_matrix(to_numpy(A))).sum((-2, -1)), A.dtype)


@given(T=SIZES, seed=SEEDS)
def test_transpose_turns_the_flow_round(T, seed):
    A = make_probs((2,), T, T, seed, torch.float64)
    ours, turned = dense.asymmetry(A), dense.asymmetry(A.mT)
    assert torch.allclose(ours.net_flow, -turned.net_flow, rtol=0, atol=1e-14)
    assert torch.equal(ours.frobenius, turned.frobenius) and torch.equal(ours.max, turned.max)
    symmetric = dense.asymmetry(A + A.mT)
    assert not symmetric.frobenius.any() and not symmetric.ratio.any()


@given(T=SIZES, seed=SEEDS)
def test_triangles_score_one_and_zero(T, seed):
    A = make_probs((2,), T, T, seed)
    assert (dense.dag_score(A.triu()) == 0).all()
    assert (dense.dag_score(A.tril(-1)) == (A.tril(-1).sum((-2, -1)) > 0)).all()


@pytest.mark.parametrize("statistic", ["dag_score", "distance", "column"])
@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_permutation_null(statistic, name, T, S, seed):
    intervals = make_mask(name, 2, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((2, 3), T, S, seed, torch.float64, seen=seen)
    null = dense.permutation_null(A, statistic=statistic, mask=intervals)
    w = weights(statistic, T, S, offset=intervals.offset, column=to_numpy(intervals.first))
    expected = reference.permutation_null(to_numpy(A), w, to_numpy(seen), statistic)
    for part in ("value", "mean"):
        assert close(getattr(null, part), expected[part], torch.float64)
    # the variance of a row is a difference that cancels where its weights are nearly equal
    assert np.allclose(to_numpy(null.std), expected["std"], rtol=1e-7, atol=1e-7 * np.abs(expected["value"]).max())
    alone = dense.permutation_null(A[0, 1], statistic=statistic, mask=masks.intervals(*(x[0] for x in intervals[:3])))
    assert torch.equal(alone.value, null.value[0, 1]) and alone.z.shape == ()


@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_offset_null(name, T, S, seed):
    intervals = make_mask(name, 2, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((2, 3), T, S, seed, seen=seen)
    null = dense.offset_null(A, mask=intervals)
    allowed = np.broadcast_to(to_numpy(seen), (2, T, S))
    for b, h in np.ndindex(2, 3):
        assert close(null[b, h], reference.offset_null(to_numpy(A[b, h]), allowed[b]), A.dtype)
    # it keeps what depends on the offset alone
    both = (dense.attention_stats(x.double(), want=("dag_score", "distance")) for x in (A, null))
    for ours, theirs in zip(*both, strict=True):
        if ours is not None:
            ours, theirs = (x if x.ndim == 2 else x.sum(-1) for x in (ours, theirs))
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@given(T=SIZES, S=SIZES, seed=SEEDS)
def test_blocks_change_nothing(T, S, seed):
    A = make_probs((2,), T, S, seed, torch.float64)
    square = {"want": "all"} if T == S else {}

    def run():
        return dense.attention_stats(A, **square), dense.offset_null(A), dense.permutation_null(A)

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK_SIZE", 3 * S)
        patch.setattr(dense, "PAIR_BLOCK", 3)
        parts = run()
    assert torch.allclose(whole[1], parts[1], rtol=0, atol=1e-14)
    for a, b in zip([*whole[0], *whole[2]], [*parts[0], *parts[2]], strict=True):
        for x, y in zip(*((z,) if isinstance(z, torch.Tensor) else z or () for z in (a, b)), strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_nothing_at_all():
    for shape in [(0, 0), (0, 4), (4, 0), (2, 0, 3, 3)]:
        A = torch.zeros(shape, device=DEVICE)
        stats = dense.attention_stats(A, columns=(), want=("max", "mass", "received", "columns", "dag_score"))
        assert stats.mass.shape == stats.max.shape == shape[:-1] and stats.received.shape == shape[:-2] + shape[-1:]
        assert not stats.received.any() and not stats.dag_score.any()
        assert dense.offset_null(A).shape == shape
        assert not dense.permutation_null(A).z.any()


def test_bad_input_is_named():
    A = torch.full((4, 5), 0.2)
    with pytest.raises(TypeError, match=r"A must be a torch.Tensor, got ndarray"):
        dense.attention_stats(A.numpy())
    with pytest.raises(TypeError, match="A must be float16, bfloat16, float32 or float64, got int64"):
        dense.dag_score(A.long())
    with pytest.raises(ValueError, match=r"A must have shape \[T, S\], .* got \[5\]"):
        dense.dag_score(A[0])
    with pytest.raises(ValueError, match=r"got \[1, 1, 1, 4, 5\]"):
        dense.offset_null(A[None, None, None])
    for name in ("asymmetry", "asymmetry_matrix"):
        with pytest.raises(ValueError, match="needs as many queries as keys, got T = 4 and S = 5"):
            getattr(dense, name)(A)
    with pytest.raises(ValueError, match="want must be 'all' or names among"):
        dense.attention_stats(A, want="pagerank")
    with pytest.raises(ValueError, match="columns must hold 'sink' or positions from -5 to 4, got 5"):
        dense.attention_stats(A, columns=(5,))
    with pytest.raises(ValueError, match="statistic must be one of dag_score, distance, column, got 'max'"):
        dense.permutation_null(A, statistic="max")
    with pytest.raises(TypeError, match="mask must be a causalattn Mask or Intervals, got str"):
        dense.permutation_null(A, mask="causal")

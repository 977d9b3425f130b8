"""The error model at length and at extremes: sampled rows against float64, huge scores, flat and peaked rows."""

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    PATHS,
    assert_within_reference_error,
    make_qkv,
    plain_stats,
    score_roundings,
    to_numpy,
)

import causalattn as ca
from causalattn.masks import Intervals
from causalattn.reference.attention import attention as reference
from causalattn.reference.statistics import attention_stats as reference_stats

ROWS = ("lse", "max", "mass", "entropy", "sum_sq", "below", "diag", "distance", "columns")
# compiled kernels take any length, the interpreter a short one
SHORT = {"torch": 2048, "triton": 2048 if DEVICE == "cuda" else 192}
CASES = [(path, SHORT[path]) for path in PATHS]
CASES += [pytest.param(path, 65536, marks=pytest.mark.full) for path in PATHS if SHORT[path] == 2048]


def sampled(T, n=8):
    """Runs of n rows at the start, in the middle and at the end."""
    return [slice(first, first + n) for first in (0, T // 2 - 3, T - n)]


def rows_of(mask, T, rows):
    """The mask of some rows of T, which keep their positions."""
    whole = mask.resolve(T, T, device=DEVICE)
    return Intervals(*(bound[:, rows] for bound in whole[:3]), whole.offset + rows.start)


def check_rows(q, k, v, mask, backend):
    """Row statistics and output of the whole, of which some rows are compared with float64."""
    T = q.shape[2]
    stats = ca.attention_stats(q, k, want=ROWS, mask=mask, backend=backend)
    out = ca.attention(q, k, v, mask=mask, backend=backend).out
    largest = ca.attention_topk(q, k, 4, mask=mask, backend=backend)
    pulled = ca.edge_effects(q, k, v, kind="hard", want="row", mask=mask, backend=backend).row
    roundings = score_roundings(q, k)
    for rows in sampled(T):
        some = rows_of(mask, T, rows)
        seen = to_numpy(some.to_dense(T))
        arrays = [to_numpy(x) for x in (q[:, :, rows], k)]
        expected = reference_stats(*arrays, seen, first=to_numpy(some.first), offset=some.offset)
        plain = plain_stats(q[:, :, rows], k, some)
        for name in ROWS:
            # Σ A (lse − S) has the roundings of A and S, whose sizes are 1 and that of a score, however small it is
            floor = 1.0 if name == "entropy" else 0.0
            results = (x + floor for x in (getattr(stats, name)[:, :, rows], plain[name], expected[name]))
            # a second pass sums its dot products in an order of its own
            passes = 2 if name in ("diag", "columns") else 1
            assert_within_reference_error(*results, axis=None, roundings=passes * roundings)
        exact, _, A = reference(*arrays, to_numpy(v), seen)
        rival = torch.softmax((q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5).masked_fill(
            ~some.to_dense(T)[:, None], -torch.inf), -1)  # fmt: skip
        assert_within_reference_error(out[:, :, rows], rival @ v, exact, axis=None, roundings=roundings)
        values = np.sort(A, -1)[..., :-5:-1]
        top = rival.topk(4).values
        assert_within_reference_error(largest.values[:, :, rows], top, values, axis=None, roundings=roundings)
        hard, far = (torch.cdist(o, x) * some.to_dense(T)[:, None] for o, x in (
            (rival @ v, v), (torch.from_numpy(exact).to(DEVICE), v.double())))  # fmt: skip
        results = (pulled[:, :, rows], hard.sum(-1), to_numpy(far.sum(-1)))
        assert_within_reference_error(*results, axis=None, roundings=roundings)


@pytest.mark.parametrize(("backend", "T"), CASES)
@pytest.mark.parametrize("mask", [ca.full(), ca.causal(), ca.sliding_window(100)], ids=["full", "causal", "window"])
def test_sampled_rows_of_a_long_sequence(backend, T, mask):
    check_rows(*make_qkv(1, 1, 1, T, T, 16), mask, backend)


@pytest.mark.parametrize(("backend", "T"), CASES)
@pytest.mark.parametrize("kind", ["uniform", "peaked", "one in a thousand"])
def test_flat_and_peaked_rows(backend, T, kind):
    q, k, v = make_qkv(1, 1, 1, T, T, 16)
    if kind == "uniform":
        k = k[:, :, :1].expand(-1, -1, T, -1)
    elif kind == "peaked":
        # each query finds its own key
        q = 8 * k
    else:
        q = torch.zeros_like(q) + 1
        k = torch.zeros_like(k)
        k[:, :, ::1000] = 1
    check_rows(q, k, v, ca.causal(), backend)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_of_one_sign(backend, sign):
    q, k, v = make_qkv(1, 2, 1, 65, 65, 16)
    check_rows(q + 50 * sign, k + 50, v, ca.full(), backend)


@pytest.mark.parametrize("backend", PATHS)
def test_dot_products_beyond_float16(backend):
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16, dtype=torch.float16, scale=200.0)
    assert (q.float() @ k.float().mT).abs().max() > 65504
    result = ca.attention(q, k, v, scale=1e-4, return_probs=True, backend=backend)
    exact = reference(*map(to_numpy, (q, k, v)), np.ones((1, 40, 40), bool), scale=1e-4)
    for got, expected in zip(result, exact, strict=True):
        assert got.isfinite().all()
        error = np.abs(to_numpy(got) - expected).max() / np.abs(expected).max()
        assert error <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("backend", PATHS)
def test_rows_that_may_attend_nothing(backend):
    q, k, _ = make_qkv(2, 2, 1, 33, 33, 16)
    mask = ca.padding([33, 0])
    stats = ca.attention_stats(q, k, want="all", mask=mask, backend=backend)
    assert stats.lse[1].isneginf().all()
    for name in ("max", "mass", "entropy", "sum_sq", "below", "diag", "distance", "columns", "received", "dag_score"):
        assert (getattr(stats, name)[1] == 0).all()
    assert all((x[1] == 0).all() for x in stats.asymmetry)
    top = ca.attention_topk(q, k, 3, mask=mask, backend=backend)
    assert (top.values[1] == 0).all()
    assert (top.indices[1] == -1).all()
    assert (ca.attention_map(q, k, 8, mask=mask, backend=backend).mean[1] == 0).all()
    effects = ca.edge_effects(q, k, q[:, :1], kind="hard", want="all", cells=8, mask=mask, backend=backend)
    assert all((x[1] == 0).all() for x in (effects.row, effects.column, effects.topk.values, effects.map))
    assert (effects.topk.indices[1] == -1).all()


# under the interpreter a thousand blocks of rows take minutes
@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param("triton", marks=[pytest.mark.full] * (DEVICE == "cpu")) for _ in PATHS[1:])]
)
def test_more_entries_than_two_to_the_31(backend):
    T = 2**16
    q, k, _ = make_qkv(1, 1, 1, T, T, 16)
    mask = ca.sliding_window(40)
    last = slice(T - 3, T)
    near = slice(T - 60, T)
    exact = reference(*map(to_numpy, (q[:, :, last], k[:, :, near], k[:, :, near])),
                      to_numpy(mask.to_dense(3, 60)))[2]  # fmt: skip
    rows = ca.attention_rows(q, k, [-3, -2, -1], mask=mask, backend=backend)
    assert np.abs(to_numpy(rows[..., near]) - exact).max() < 1e-6
    assert (rows[..., : T - 60] == 0).all()
    top = ca.attention_topk(q, k, 3, mask=mask, backend=backend)
    order = np.argsort(-exact, -1)[..., :3]
    assert np.array_equal(to_numpy(top.indices[:, :, last]), order + T - 60)
    assert np.abs(to_numpy(top.values[:, :, last]) - np.take_along_axis(exact, order, -1)).max() < 1e-6

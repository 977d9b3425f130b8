"""edge_effects on every path against the float64 specification, which forms each row again for each of its edges."""

import math
import sys

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    EXTRAS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    Extras,
    Shape,
    assert_within_reference_error,
    grown_memory,
    make_mask,
    make_options,
    make_qkv,
    plain_scores,
    score_roundings,
    to_numpy,
)
from hypothesis import example, given
from hypothesis import strategies as st

from causalattn import attention, causal, edge_effects, full, padding, sliding_window
from causalattn.edge_effects.rest import attend_rest
from causalattn.edge_effects.sweep import sweep
from causalattn.reference.edge_effects import edge_effects as reference
from causalattn.reference.edge_effects import reduced

MEASURES = ["norm", "kl", "readout"]
KINDS = {"cut": [None], "hard": [None], "soft": [2.5, -1.5, 0.05, -0.02, 30.0, -25.0]}
N, CELLS = 7, 5


@st.composite
def cases(draw, square=False):
    """Lengths that the specification, of T·S² products, takes no seconds for."""
    H, H_kv = draw(st.sampled_from([(1, 1), (2, 1), (3, 3)]))
    T, S = (draw(st.sampled_from([1, 15, 33, 40])) for _ in range(2))
    shape = Shape(draw(st.integers(1, 2)), H, H_kv, T, T if square else S, draw(st.sampled_from([16, 59, 80])))
    return shape, draw(st.sampled_from([16, 24])), draw(SEEDS)


def plain(q, k, v, seen, kind, strength, measure, readout, sink=None, **logits):
    """The effects by plain torch in the dtype that results are summed in: the softmax of each row once an edge."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    x = plain_scores(q, k, seen, **logits)
    allowed, S = ~x.isneginf(), x.shape[-1]
    x = torch.cat([x, (x.new_full((x.shape[1],), -torch.inf) if sink is None else sink.to(x))[:, None, None].expand(
        *x.shape[:3], 1)], -1)  # fmt: skip
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    before, effects = x.log_softmax(-1).nan_to_num(-torch.inf), torch.zeros_like(x[..., :S])
    out = before.exp()[..., :S] @ v
    for j in range(S):
        changed = x.clone() if kind != "hard" else torch.full_like(x, -torch.inf)
        changed[..., j] = {"cut": -torch.inf, "hard": 0.0}[kind] if kind != "soft" else x[..., j] + strength
        after = changed.log_softmax(-1).nan_to_num(-torch.inf)
        if measure == "kl":
            change, new, old = (after - before).nan_to_num(0, neginf=0), after.exp(), before.exp()
            gained = torch.where(change > 1, new - old, old * change.clamp(max=1).expm1())
            terms = torch.where(after.isneginf(), old, new * change - gained)
            effect = terms.sum(-1).masked_fill(after.isneginf().all(-1), torch.inf)
        else:
            moved = after.exp()[..., :S] @ v - out
            effect = moved.norm(dim=-1) if measure == "norm" else (readout.to(wide) * moved).sum(-1)
        effects[..., j] = effect
    return effects.masked_fill(~allowed, 0)


def check(backend, q, k, v, mask, kind, strength, measure, readout=None, given=None, **options):
    """Every reduction within twice torch's error of float64, and every edge of topk the one that it says it is."""
    T, S = q.shape[2], k.shape[2]
    if measure == "readout" and readout is None:
        readout = make_qkv(*q.shape[:2], 1, T, 1, v.shape[3], dtype=q.dtype, seed=9)[0]
    seen = mask.resolve(T, S, device=DEVICE).to_dense(S)
    what = {"kind": kind, "strength": strength, "measure": measure}
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    g = None if readout is None else to_numpy(readout)
    exact = reference(*map(to_numpy, (q, k, v, seen)), **what, readout=g, **arrays)
    rival = to_numpy(plain(q, k, v, seen, **what, readout=readout, **options))
    allowed = np.broadcast_to(to_numpy(seen)[:, None], exact.shape)
    if "bias" in options:
        allowed = allowed & ~np.isneginf(np.broadcast_to(arrays["bias"], exact.shape))
    given = mask if given is None else given
    result = edge_effects(
        q, k, v, **what, readout=readout, want="all", n=N, cells=CELLS, mask=given, backend=backend, **options
    )
    # three passes form a score, each in an order of its own
    band = {"axis": None, "roundings": 3 * score_roundings(q, k, options.get("scale"))}
    target, other = (reduced(x, allowed, N, CELLS) for x in (exact, rival))
    for name in ("row", "column", "map"):
        assert getattr(result, name).dtype == torch.promote_types(q.dtype, torch.float32)
        assert_within_reference_error(getattr(result, name), other[name], target[name], **band)
    values, indices = result.topk
    assert indices.dtype == torch.int32
    assert np.array_equal(to_numpy(indices) < 0, target["indices"] < 0)
    assert_within_reference_error(values.abs(), np.abs(other["values"]), np.abs(target["values"]), **band)
    ranked = np.sort(to_numpy(indices), -1)
    assert not ((np.diff(ranked, axis=-1) == 0) & (ranked[..., 1:] >= 0)).any()
    there = [np.take_along_axis(np.pad(x, [(0, 0)] * 3 + [(0, 1)]), to_numpy(indices), -1) for x in (rival, exact)]
    assert_within_reference_error(values, *there, **band)
    return result


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", MEASURES)
@given(case=cases(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), data=st.data())
def test_matches_float64(backend, kind, measure, case, name, data):
    shape, V, seed = case
    q, k, v = make_qkv(*shape, V, seed=seed)
    # at 2 rows are peaked, at 0.1 flat
    scale, strength = data.draw(st.sampled_from([0.1, 0.5, 2.0])), data.draw(st.sampled_from(KINDS[kind]))
    check(backend, q, k, v, make_mask(name, shape.B, shape.S), kind, strength, measure, scale=scale)


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(), kind=st.sampled_from(sorted(KINDS)), measure=st.sampled_from(MEASURES), extras=EXTRAS)
# beside such a sink p is far below the rounding of 1
@example((Shape(1, 1, 1, 1, 1, 16), 16, 0), "soft", "kl", Extras(None, None, 40.0, None))
def test_bias_slopes_softcap_and_sink(backend, case, kind, measure, extras):
    shape, V, seed = case
    q, k, v = make_qkv(*shape, V, seed=seed, scale=2.0)
    check(backend, q, k, v, causal(), kind, KINDS[kind][0], measure, **make_options(extras, shape, seed))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(backend, dtype, measure, kind):
    q, k, v = make_qkv(1, 2, 1, 33, 40, 16, 24, dtype=dtype)
    check(backend, q, k, v, causal(), kind, KINDS[kind][0], measure, scale=0.5)


def test_float64_goes_through_the_torch_path():
    q, k, v = make_qkv(2, 2, 1, 33, 50, 16, dtype=torch.float64)
    seen = causal().to_dense(33, 50)
    for kind in KINDS:
        for measure in MEASURES:
            readout = q if measure == "readout" else None
            what = {"kind": kind, "strength": KINDS[kind][0], "measure": measure}
            result = edge_effects(q, k, v, **what, readout=readout, causal=True, want="all")
            exact = reference(*map(to_numpy, (q, k, v, seen)), **what, readout=to_numpy(q))
            expected = reduced(exact, to_numpy(seen)[:, None], 16, 512)
            for name in ("row", "column", "map"):
                assert getattr(result, name).dtype == torch.float64
                np.testing.assert_allclose(to_numpy(getattr(result, name)), expected[name], rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(to_numpy(result.topk.values), expected["values"], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", MEASURES)
def test_rows_that_one_key_has_almost_to_itself(backend, kind, measure):
    # row i has p = 1 / (1 + 3·e^−gap) at key i % 4
    gaps = torch.tensor([0.0, 1.0, 1.3, 2.0, 4.6, 9.0, 14.0, 16.1, 20.0, 60.0, 90.0], device=DEVICE)
    k = 8 * torch.eye(16, device=DEVICE)[None, None, :4]
    q = k[:, :, torch.arange(len(gaps)) % 4] * gaps[:, None] / 64
    v = torch.randn(1, 1, 4, 24).to(DEVICE)
    for strength in KINDS[kind]:
        result = check(backend, q, k, v, full(), kind, strength, measure, scale=1.0)
        if kind == "cut" and measure == "kl":
            exact = np.log1p(np.exp(to_numpy(gaps)) / 3)
            assert np.abs(to_numpy(result.topk.values[0, 0, :, 0]) / exact - 1).max() < 1e-6


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [3.0, 300.0])
def test_values_much_larger_than_their_differences(backend, kind, offset):
    q, k, v = make_qkv(1, 2, 1, 33, 40, 16, 24, seed=1)
    for values in (v + offset, v + offset * (torch.arange(40, device=DEVICE) % 7 == 0)[:, None]):
        check(backend, q, k, values, causal(), kind, KINDS[kind][0], "norm")


@pytest.mark.parametrize("backend", PATHS)
def test_equal_values_leave_the_output_as_it_is(backend):
    q, k, v = make_qkv(1, 2, 1, 33, 33, 16)
    result = check(backend, q, k, v[:, :, :1].expand_as(v), causal(), "hard", None, "norm")
    assert result.row.max() < 33 * 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", PATHS)
def test_a_row_whose_only_edge_is_cut_is_emptied(backend):
    q, k, v = make_qkv(1, 1, 1, 5, 5, 16)
    out = attention(q, k, v, causal=True, backend=backend).out
    options = {"causal": True, "backend": backend}
    norm = edge_effects(q, k, v, **options).row[0, 0, 0]
    assert torch.allclose(norm, out[0, 0, 0].norm())
    kl = edge_effects(q, k, v, measure="kl", want="all", cells=2, **options)
    assert kl.row[0, 0].isinf().tolist() == [True, *[False] * 4]
    assert kl.column[0, 0].isinf().tolist() == [True, *[False] * 4]
    assert kl.topk.values.isinf().sum() == 1
    assert kl.map[0, 0].isinf().tolist() == [[True, False], [False, False]]
    readout = edge_effects(q, k, v, measure="readout", readout=v, **options).topk.values[0, 0, 0, 0]
    assert torch.allclose(readout, -(v * out)[0, 0, 0].sum(), rtol=1e-5)
    # λ on it, or a hard do, leaves it what it has
    for kind, strength in (("soft", 3.0), ("hard", None)):
        assert edge_effects(q, k, v, kind=kind, strength=strength, **options).row[0, 0, 0] == 0


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(), kind=st.sampled_from(sorted(KINDS)), measure=st.sampled_from(MEASURES))
def test_identities(backend, case, kind, measure):
    shape, V, seed = case
    q, k, v = make_qkv(*shape, V, seed=seed)
    readout = make_qkv(shape.B, shape.H, 1, shape.T, 1, V, seed=seed)[0] if measure == "readout" else None
    what = {"kind": kind, "strength": KINDS[kind][0], "measure": measure, "readout": readout, "backend": backend}
    row, column, top, pooled = edge_effects(q, k, v, **what, want="all", n=64, cells=512)
    close = {"rtol": 1e-5, "atol": 1e-6 * row[row.isfinite()].abs().max().item() if row.isfinite().any() else 1e-6}
    torch.testing.assert_close(row.sum(-1), column.sum(-1), **close)
    torch.testing.assert_close(pooled.sum(-1), row, **close)
    torch.testing.assert_close(pooled.sum(-2), column, **close)
    # n is more than there are keys
    torch.testing.assert_close(top.values.abs().sum(-1), row, **close)


@pytest.mark.parametrize("backend", PATHS)
def test_a_weak_do_is_a_gradient_and_a_hard_one_knows_no_probability(backend):
    q, k, v = make_qkv(1, 2, 1, 20, 20, 16, dtype=torch.float32)
    g = make_qkv(1, 2, 1, 20, 20, 16, seed=3)[0]
    A = attention(q.double(), k.double(), v.double(), causal=True, return_probs=True).probs
    pull = g.double() @ v.double().mT
    gradient = A * (pull - (A * pull).sum(-1, keepdim=True))
    weak = {"kind": "soft", "strength": 1e-6, "measure": "readout", "readout": g, "causal": True, "backend": backend}
    row = edge_effects(q, k, v, **weak).row / 1e-6
    torch.testing.assert_close(row.double(), gradient.abs().sum(-1), rtol=1e-5, atol=1e-6)
    # where no output is told from another the effect is g·v alone
    hard = {"kind": "hard", "measure": "readout", "readout": g, "n": 20, "backend": backend}
    flat = edge_effects(torch.zeros_like(q), k, v, **hard).topk
    expected = pull - pull.mean(-1, keepdim=True)
    there = expected.gather(-1, flat.indices.long())
    torch.testing.assert_close(flat.values.double(), there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("n", [1, 5, 64])
def test_equal_effects_come_in_the_order_of_their_keys(backend, n):
    q = torch.zeros(1, 1, 40, 16, device=DEVICE)
    v = torch.tensor([1.0, -1.0], device=DEVICE).repeat(20)[None, None, :, None].expand(1, 1, 40, 16)
    result = edge_effects(q, q, v, measure="kl", causal=True, n=n, backend=backend)
    rank, row = torch.arange(n, device=DEVICE), torch.arange(40, device=DEVICE)[:, None]
    assert torch.equal(result.topk.indices[0, 0], torch.where(rank <= row, rank, -1).int())
    assert (result.topk.values[0, 0][rank > row] == 0).all()
    signed = edge_effects(q, q, v, kind="hard", measure="readout", readout=v * 0 + 1.0, n=n, backend=backend).topk
    assert torch.equal(signed.indices[0, 0, 39], rank.clamp(max=39).int().where(rank < 40, -1))
    assert torch.equal(signed.values[0, 0, 39], torch.where(rank < 40, 16.0 * (-1.0) ** rank, 0.0))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_tile_of_the_torch_path(kind, measure):
    q, k, v = make_qkv(1, 1, 1, 530, 1100, 16)
    readout = q if measure == "readout" else None
    what = {"kind": kind, "strength": KINDS[kind][0], "measure": measure, "readout": readout, "want": "all"}
    narrow, wide = (
        edge_effects(*(x.to(dtype) for x in (q, k, v)), **{**what, "readout": None if readout is None else q.to(dtype)},
                     mask=sliding_window(600), cells=9) for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for name in ("row", "column", "map"):
        got, exact = getattr(narrow, name).double(), getattr(wide, name)
        assert ((got - exact).abs().max() / exact.max()) < 1e-5
    total = wide.row.sum(-1)
    torch.testing.assert_close(wide.column.sum(-1), total)
    sizes = [torch.tensor([count * (c + 1) // 9 - count * c // 9 for c in range(9)]).to(total) for count in (530, 1100)]
    torch.testing.assert_close((wide.map * sizes[0][:, None] * sizes[1]).sum((-1, -2)), total)
    assert (narrow.topk.values.double() - wide.topk.values).abs().max() < 1e-5 * wide.topk.values.abs().max()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", MEASURES)
def test_padding_never_leaks(backend, kind, measure):
    q, k, v = make_qkv(2, 2, 1, 50, 50, 16)
    g = q.clone() if measure == "readout" else None
    what = {"kind": kind, "strength": KINDS[kind][0], "measure": measure, "mask": padding([50, 21]), "want": "all"}
    clean = edge_effects(q, k, v, **what, readout=g, cells=7, backend=backend)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v, g):
        if x is not None:
            x[1, :, 21:] = torch.nan
    result = edge_effects(q, k, v, **what, readout=g, cells=7, backend=backend)
    for a, b in zip((*clean[:2], *clean.topk, clean.map), (*result[:2], *result.topk, result.map), strict=True):
        assert torch.equal(a, b)
    assert (result.row[1, :, 21:] == 0).all()
    assert (result.column[1, :, 21:] == 0).all()
    assert (result.topk.indices[1, :, 21:] == -1).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("measure", MEASURES)
def test_empty(backend, measure):
    for B, T, S in [(0, 3, 3), (2, 0, 4), (2, 3, 0), (1, 0, 0)]:
        q, k = (torch.zeros(B, 2, count, 16, device=DEVICE) for count in (T, S))
        readout = q if measure == "readout" else None
        result = edge_effects(q, k, k, measure=measure, readout=readout, want="all", n=3, cells=2, backend=backend)
        assert result.row.shape == (B, 2, T)
        assert result.column.shape == (B, 2, S)
        assert result.topk.values.shape == result.topk.indices.shape == (B, 2, T, 3)
        assert result.map.shape == (B, 2, min(T, 2), min(S, 2))
        assert all((x == 0).all() for x in (result.row, result.column, result.topk.values, result.map))
        assert (result.topk.indices == -1).all()


@pytest.mark.parametrize("backend", PATHS)
def test_what_is_not_wanted_is_none(backend):
    q, k, v = make_qkv(1, 1, 1, 5, 5, 16)
    for name in ("row", "column", "topk", "map"):
        result = edge_effects(q, k, v, want=name, backend=backend)
        assert [x is not None for x in result] == [field == name for field in result._fields]
    assert edge_effects(q, k, v, backend=backend).map is None


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_mask_shifted_by_one_is_caught(backend, measure):
    q, k, v = make_qkv(1, 1, 1, 33, 33, 16)
    right = causal().resolve(33, 33, device=DEVICE)
    wrong = right._replace(stop=(right.stop + 1).clamp(max=33))
    with pytest.raises(AssertionError):
        check(backend, q, k, v, causal(), "cut", None, measure, given=wrong)


def test_operator_contract():
    q, k, v = make_qkv(2, 4, 2, 9, 20, 16)
    start, stop, _, offset = (causal() & padding([20, 7])).resolve(9, 20, device=DEVICE)
    bias, slopes, sink = (torch.randn(shape, device=DEVICE) for shape in ((2, 1, 9, 20), (1, 4), (4,)))
    row = torch.rand(2, 4, 9, device=DEVICE)
    common = (q, k, v, start, stop, offset, bias, slopes, 0.2, 5.0, sink)
    torch.library.opcheck(attend_rest, (*common, row, "torch"))
    torch.library.opcheck(sweep, (*common, row, row, row, row, q, row, 0.5, "row column topk map", 3, 4, "torch"))
    torch.library.opcheck(sweep, (*common, row, row, row, row, q, None, -math.inf, "row", 3, 4, "torch"))


MEMORY = """
q, k, v = torch.randn(3, 1, 2, 16384, 16).unbind()
mask = ca.sliding_window(1024)
def run(T):
    return ca.edge_effects(q[:, :, :T], k[:, :, :T], v[:, :, :T], want="all", mask=mask)
"""

# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_is_a_fiftieth_of_the_matrix():
        (grown,) = grown_memory(MEMORY, 16384)
        assert 1024 * grown < 0.02 * 4 * 2 * 16384**2


GOOD = torch.zeros(2, 4, 5, 16)
LEARNT = torch.zeros(2, 4, 5, 16, requires_grad=True)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "kind must be 'cut', 'soft' or 'hard', got 'do'", {"kind": "do"}),
        (ValueError, "strength must be a finite number with kind='soft', got None", {"kind": "soft"}),
        (ValueError, r"strength must be finite \(kind='cut' is −∞", {"kind": "soft", "strength": -math.inf}),
        (TypeError, "strength must be a number, got str", {"kind": "soft", "strength": "1"}),
        (ValueError, "strength must be None with kind='cut', got 1.0", {"strength": 1.0}),
        (ValueError, "measure must be 'norm', 'kl' or 'readout', got 'l2'", {"measure": "l2"}),
        (TypeError, "readout must be a torch.Tensor with measure='readout', got NoneType", {"measure": "readout"}),
        (ValueError, "readout must be None with measure='norm', got a Tensor", {"readout": GOOD}),
        (ValueError, r"readout must have shape \[2, 4, 5, 16\]", {"measure": "readout", "readout": GOOD[:1]}),
        (TypeError, "readout must have q's dtype", {"measure": "readout", "readout": GOOD.double()}),
        (ValueError, "want must be 'all' or names among row, column, topk, map, got 'rows'", {"want": "rows"}),
        (ValueError, "n must be from 1 to 64, got 65", {"n": 65}),
        (ValueError, "n must be from 1 to 64, got 0", {"n": 0}),
        (TypeError, "n must be an int, got bool", {"n": True}),
        (ValueError, "cells must be at least 1, got 0", {"cells": 0}),
        (TypeError, "cells must be an int, got float", {"cells": 2.0}),
        (NotImplementedError, r"edge_effects has no gradient: pass q.detach\(\)", {"sink": LEARNT[0, :, 0, 0]}),
        (ValueError, "softcap must be positive and finite, got -1", {"softcap": -1.0}),
        (TypeError, "mask must be a causalattn Mask", {"mask": torch.ones(5, 5)}),
        (ValueError, "backend must be", {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, match, options):
    with pytest.raises(error, match=match):
        edge_effects(GOOD, GOOD, GOOD, **options)


def test_gradients_are_refused_where_they_are_recorded():
    for inputs in ((LEARNT, GOOD, GOOD), (GOOD, LEARNT, GOOD), (GOOD, GOOD, LEARNT)):
        with pytest.raises(NotImplementedError, match="edge_effects has no gradient"):
            edge_effects(*inputs)
        with torch.no_grad():
            assert not edge_effects(*inputs).row.requires_grad

"""The statistics of short texts against the float64 specification, and against those of `attention_stats`."""

import pytest
import torch
from helpers import (
    EXTRAS,
    MASKS,
    SEEDS,
    assert_within_reference_error,
    make_mask,
    make_options,
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
from causalattn.statistics import short
from causalattn.statistics.short import is_short, short_stats

SQUARE_ONLY = ("net_flow", "asymmetry")
COLUMNS = ("sink", 0, -1)


def options_of(extras, shape, seed):
    """What a transformers layer may have, on the CPU."""
    found = make_options(extras._replace(slopes=None), shape, seed)
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in found.items()}


def assert_matches(q, k, mask, **options):
    """Each statistic within twice eager torch's error of float64."""
    S = k.shape[2]
    intervals = mask.resolve(q.shape[2], S)
    want = [name for name in ca.AttentionStats._fields if q.shape[2] == S or name not in SQUARE_ONLY]
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    seen, first = to_numpy(intervals.to_dense(S)), to_numpy(intervals.first)
    exact = reference(to_numpy(q), to_numpy(k), seen, first=first, offset=intervals.offset, columns=COLUMNS, **arrays)
    plain = plain_stats(q, k, intervals, columns=COLUMNS, **options)
    result = short_stats(q, k, want=want, mask=intervals, columns=COLUMNS, **options)
    # a sink is one more score
    beside = options["sink"].abs().max().item() if "sink" in options else 0
    rounded = {"axis": None, "roundings": score_roundings(q, k, options.get("scale")) + beside}
    for name in want:
        if name == "asymmetry":
            for part, ours in result.asymmetry._asdict().items():
                assert_within_reference_error(ours, plain[name][part], exact[name][part], **rounded)
        else:
            assert getattr(result, name).dtype == torch.promote_types(q.dtype, torch.float32)
            assert_within_reference_error(getattr(result, name), plain[name], exact[name], **rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), extras=EXTRAS, seed=SEEDS)
def test_matches_float64(dtype, shape, name, extras, seed):
    q, k, _ = (x.cpu() for x in make_qkv(*shape, dtype=dtype, seed=seed))
    assert_matches(q, k, make_mask(name, shape.B, shape.S), **options_of(extras, shape, seed))


@given(shape=shapes(square=True), seed=SEEDS)
def test_a_head_at_a_time_is_the_same(shape, seed):
    q, k, _ = (x.cpu() for x in make_qkv(*shape, seed=seed))
    intervals = ca.causal().resolve(shape.T, shape.S)
    with pytest.MonkeyPatch.context() as patched:
        at_once = short_stats(q, k, want="all", mask=intervals)
        patched.setattr(short, "AREA", 1)
        one_by_one = short_stats(q, k, want="all", mask=intervals)
    torch.testing.assert_close(at_once, one_by_one)


def test_nan_reaches_only_rows_that_may_attend_it():
    q, k, _ = (x.cpu() for x in make_qkv(1, 2, 1, 9, 9, 16, strided=False))
    intervals = ca.causal().resolve(9, 9)
    expected = short_stats(q, k, want=("lse", "entropy"), mask=intervals)
    k[:, :, 6] = torch.nan
    for ours, clean in zip(short_stats(q, k, want=("lse", "entropy"), mask=intervals), expected, strict=True):
        assert ours is clean is None or (ours[:, :, 6:].isnan().all() and torch.equal(ours[:, :, :6], clean[:, :, :6]))


def test_which_texts_are_short():
    q = torch.zeros(1, 1, 512, 8)
    assert is_short(q, q) and not is_short(q, torch.zeros(1, 1, 513, 8)) and not is_short(torch.zeros(1, 1, 513, 8), q)
    assert not is_short(q.to("meta"), q.to("meta")) and not is_short(q[:0], q[:0]) and not is_short(q, q[:, :, :0])


def test_what_fits_one_tile():
    q = torch.zeros(2, 2, 256, 8)
    assert short.fits_one_tile(q, q) and not short.fits_one_tile(q, torch.zeros(2, 2, 257, 8))


def test_what_it_refuses():
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 8)
    with pytest.raises(ValueError, match="net_flow and asymmetry"):
        short_stats(q, k, want=("asymmetry",), mask=ca.full().resolve(4, 5))
    with pytest.raises(ValueError, match="want must be 'all' or names among"):
        short_stats(q, q, want=("nonsense",), mask=ca.full().resolve(4, 4))

"""Masks of one tile as bits do what a fill with bools does, whatever lies underneath."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causalattn._seen import seen_patterns, zero_where_zero_

BLOCK, FORBIDDEN = 32, -1e33
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ODD = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1.5])


@DTYPES
@given(seed=st.integers(0, 2**32 - 1))
def test_forbids_what_no_row_may_attend(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, BLOCK + 1, (2, BLOCK, 1), generator=generator, dtype=torch.int32)
    start, stop = bounds.amin(0), bounds.amax(0)
    keys = torch.arange(BLOCK)
    allowed = (keys >= start) & (keys < stop)
    x = ODD.to(dtype)[torch.randint(len(ODD), (BLOCK, BLOCK), generator=generator)]
    expected = x.masked_fill(~allowed, FORBIDDEN)
    seen = seen_patterns(BLOCK, dtype, FORBIDDEN)(start, stop)
    mirrored = x.T.contiguous()
    seen.forbid_(x)
    seen.forbid_(mirrored, transposed=True)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mirrored.T, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(seen.dense(), allowed)
    assert torch.equal(seen.rows, allowed.any(1, keepdim=True)) and torch.equal(seen.keys[:, 0], allowed.any(0))


def test_tiles_alike_share_one_mask():
    patterns = seen_patterns(BLOCK, torch.float32, FORBIDDEN)
    start, stop = torch.zeros(BLOCK, 1, dtype=torch.int32), torch.arange(1, BLOCK + 1, dtype=torch.int32)[:, None]
    assert patterns(start, stop) is patterns(start.clone(), stop.clone())
    assert patterns(start, stop) is not patterns(start, stop - 1)


@DTYPES
def test_zero_where_zero(dtype):
    p = torch.tensor([0.0, 1e-38, torch.nan, 0.0, 1.0], dtype=dtype)
    x = torch.tensor([torch.nan, 2.0, 3.0, torch.inf, -torch.nan], dtype=dtype)
    torch.testing.assert_close(zero_where_zero_(x, p), x.masked_fill(p == 0, 0), rtol=0, atol=0, equal_nan=True)
    assert x[0] == 0 and x[3] == 0 and x[4].isnan()

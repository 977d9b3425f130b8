"""Every mask rule against a table of who may attend whom, asked of each pair."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, SQUARE_MASKS, make_mask, to_numpy
from hypothesis import assume, given
from hypothesis import strategies as st

import causalattn.masks as masks
from causalattn.masks import Mask
from causalattn.reference import masks as reference

SIZES = st.integers(0, 12)
OFFSETS = st.one_of(st.none(), st.integers(-6, 9))


@st.composite
def rules(draw, S):
    """The name of a rule and its arguments."""
    name = draw(st.sampled_from(["full", "causal", "sliding_window", "chunked", "prefix", "padding"]))
    if name == "sliding_window":
        return name, (draw(st.integers(1, 14)), draw(st.one_of(st.none(), st.integers(0, 5))))
    if name == "chunked":
        return name, (draw(st.integers(1, 6)),)
    if name == "prefix":
        return name, (draw(st.integers(0, 14)),)
    if name == "padding":
        # two sequences always, so that any two paddings can meet
        lengths = draw(st.lists(st.integers(0, S), min_size=2, max_size=2))
        return name, (lengths, draw(st.sampled_from(["right", "left"])))
    return name, ()


def made(rule):
    name, arguments = rule
    return getattr(masks, name)(*arguments)


def expected(rule, T, S, offset):
    name, arguments = rule
    return getattr(reference, name)(T, S, offset, *arguments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.offset == b.offset


@st.composite
def cu_seqlens(draw, S):
    inner = draw(st.lists(st.integers(0, S), max_size=5))
    return [0, *sorted(inner), S]


@given(data=st.data(), T=SIZES, S=SIZES, offset=OFFSETS)
def test_rule_is_its_table(data, T, S, offset):
    rule = data.draw(rules(S))
    dense = made(rule).to_dense(T, S, offset=offset, device=DEVICE)
    assert dense.dtype == torch.bool
    assert np.array_equal(to_numpy(dense), expected(rule, T, S, S - T if offset is None else offset))


@given(data=st.data(), T=SIZES, S=SIZES, offset=OFFSETS)
def test_and_is_intersection(data, T, S, offset):
    chosen = data.draw(st.lists(rules(S), min_size=2, max_size=4))
    at = S - T if offset is None else offset
    tables = [expected(rule, T, S, at) for rule in chosen]
    mask = made(chosen[0])
    for rule in chosen[1:]:
        mask = mask & made(rule)
    table = np.logical_and.reduce(np.broadcast_arrays(*tables))
    assert np.array_equal(to_numpy(mask.to_dense(T, S, offset=offset)), table)


@given(data=st.data(), T=SIZES, S=SIZES, offset=OFFSETS)
def test_and_is_commutative_associative_idempotent(data, T, S, offset):
    a, b, c = (made(data.draw(rules(S))) for _ in range(3))

    def resolve(mask):
        return mask.resolve(T, S, offset=offset)

    assert same(resolve(a & b), resolve(b & a))
    assert same(resolve((a & b) & c), resolve(a & (b & c)))
    assert same(resolve(a & a), resolve(a))
    assert same(resolve(a & masks.full()), resolve(a))


@given(data=st.data(), S=SIZES)
def test_packed_is_its_table(data, S):
    edges = data.draw(cu_seqlens(S))
    other = data.draw(rules(S))
    mask = masks.packed(torch.tensor(edges)) & made(other)
    table = reference.packed(S, S, 0, edges) & expected(other, S, S, 0)
    assert np.array_equal(to_numpy(mask.to_dense(S, S)), table)


@given(data=st.data(), S=st.integers(1, 12))
def test_first_is_the_first_real_key_of_the_segment(data, S):
    edges = data.draw(cu_seqlens(S))
    lengths = data.draw(st.lists(st.integers(0, S), min_size=1, max_size=3))
    side = data.draw(st.sampled_from(["right", "left"]))
    own = reference.packed(S, S, 0, edges) & reference.padding(S, S, 0, lengths, side)
    intervals = (masks.packed(edges) & masks.padding(lengths, side) & masks.sliding_window(2)).resolve(S, S)
    filled = to_numpy(intervals.stop) > to_numpy(intervals.start)
    assert np.array_equal(to_numpy(intervals.first)[filled], reference.first(own)[filled])


def test_first_of_a_window_stays_at_the_start():
    intervals = masks.sliding_window(2).resolve(3, 6)
    assert intervals.start.tolist() == [[2, 3, 4]] and intervals.first.tolist() == [[0, 0, 0]]


@given(name=st.sampled_from(sorted(SQUARE_MASKS)), S=st.sampled_from([1, 15, 33]), B=st.integers(1, 3))
def test_resolve_is_in_normal_form(name, S, B):
    start, stop, first, offset = make_mask(name, B, S).resolve(S, S, device=DEVICE)
    for bound in (start, stop, first):
        assert bound.dtype == torch.int32 and bound.shape in ((1, S), (B, S))
        assert bound.is_contiguous() and bound.device.type == DEVICE
    assert offset == 0 and ((0 <= start) & (start <= stop) & (stop <= S)).all()
    assert (start[start == stop] == 0).all()


@given(name=st.sampled_from(sorted(SQUARE_MASKS)), S=st.sampled_from([1, 15, 33]), B=st.integers(1, 3))
def test_without_first_forbids_the_sink_and_nothing_else(name, S, B):
    intervals = make_mask(name, B, S).resolve(S, S)
    sink = torch.nn.functional.one_hot(intervals.first.long().clamp(max=S - 1), S).bool()
    rest = intervals.without_first()
    assert torch.equal(rest.to_dense(S), intervals.to_dense(S) & ~sink)
    assert torch.equal(rest.first, intervals.first) and rest.offset == intervals.offset
    assert (rest.start[rest.start == rest.stop] == 0).all()


def test_offset_defaults_to_the_last_key():
    assert masks.causal().resolve(2, 5).stop.tolist() == [[4, 5]]
    assert masks.causal().resolve(2, 5).offset == 3
    assert masks.causal().resolve(2, 5, offset=0).stop.tolist() == [[1, 2]]
    assert masks.causal().resolve(4, 2).stop.tolist() == [[0, 0, 1, 2]]


@given(data=st.data(), T=SIZES, S=st.integers(0, 12), B=st.integers(0, 3))
def test_explicit_intervals(data, T, S, B):
    numbers = st.lists(st.integers(0, S), min_size=B * T, max_size=B * T)
    start, stop, first = (torch.tensor(data.draw(numbers), dtype=torch.int64).reshape(B, T) for _ in range(3))
    resolved = masks.intervals(start, stop, first).resolve(T, S)
    keys = torch.arange(S)
    assert torch.equal(resolved.to_dense(S), (keys >= start[..., None]) & (keys < stop[..., None]))
    assert torch.equal(resolved.first.long(), first)
    if B:
        alone = masks.intervals(start[0], stop[0]).resolve(T, S)
        assert torch.equal(alone.stop[0], resolved.stop[0]) and not alone.first.any()


def test_explicit_intervals_stay_inside_the_keys():
    assert masks.intervals(torch.tensor([-3, 2]), torch.tensor([9, 9])).resolve(2, 4).to_dense(4).sum() == 6


def test_intervals_move_and_only_masks_combine():
    intervals = masks.causal().resolve(3, 3)
    assert same(intervals.to("cpu"), intervals)
    assert Mask() == masks.full()
    with pytest.raises(TypeError):
        masks.causal() & 3


@given(S=st.integers(2, 12))
def test_a_shifted_mask_is_noticed(S):
    shifted = masks.causal().to_dense(S, S, offset=1)
    assert not np.array_equal(to_numpy(shifted), reference.causal(S, S, 0))


@given(first=st.lists(st.integers(0, 5), min_size=1, max_size=4), second=st.lists(st.integers(0, 5), max_size=4))
def test_batches_must_agree(first, second):
    assume(len(first) != len(second) and 1 not in (len(first), len(second)))
    with pytest.raises((ValueError, RuntimeError)):
        (masks.padding(first) & masks.padding(second)).resolve(5, 5)


BAD = {
    "w must be at least 1, got 0": lambda: masks.sliding_window(0),
    "right must be at least 0 or None, got -1": lambda: masks.sliding_window(2, right=-1),
    "c must be at least 1, got 0": lambda: masks.chunked(0),
    "n must be at least 0, got -1": lambda: masks.prefix(-1),
    r"cu_seqlens must be integers of shape [segments + 1], got [1, 2]": lambda: masks.packed(torch.tensor([[0, 3]])),
    r"got [0] ": lambda: masks.packed(torch.tensor([], dtype=torch.int32)),
    r"got [2] torch.float32": lambda: masks.packed(torch.tensor([0.0, 3.0])),
    "cu_seqlens must start at 0 and never decrease, got [1, 3]": lambda: masks.packed([1, 3]),
    "cu_seqlens must start at 0 and never decrease, got [0, 3, 2]": lambda: masks.packed([0, 3, 2]),
    "packed needs as many queries as keys, got T = 2 and S = 3": lambda: masks.packed([0, 3]).resolve(2, 3),
    "cu_seqlens must end at S = 4, got 3": lambda: masks.packed([0, 3]).resolve(4, 4),
    "side must be 'right' or 'left', got 'top'": lambda: masks.padding([1], side="top"),
    "lengths must be integers of shape [B], got [1, 1]": lambda: masks.padding(torch.ones(1, 1, dtype=torch.int32)),
    "lengths must be integers of shape [B], got [1] torch.float32": lambda: masks.padding([1.5]),
    "lengths must be at least 0, got [2, -1]": lambda: masks.padding([2, -1]),
    "lengths must be at most S = 3, got 4": lambda: masks.padding([2, 4]).resolve(3, 3),
    "stop must be integers of shape [T] or [B, T], alike in start, stop and first, got [3]": lambda: masks.intervals(
        torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    ),
    "start must be integers": lambda: masks.intervals(torch.zeros(2), torch.zeros(2)),
    "first must be integers": lambda: masks.intervals(*torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2)),
    "start must be integers of shape [T] or [B, T], alike in start, stop and first, got []": lambda: masks.intervals(
        torch.tensor(1), torch.tensor(2)
    ),
    "mask is for T = 2, got T = 3": lambda: masks.intervals(*torch.zeros(2, 2, dtype=torch.int32)).resolve(3, 3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(SQUARE_MASKS))
def test_a_mask_that_says_it_is_causal_is(name):
    mask = make_mask(name, 2, 20)
    seen = to_numpy(mask.to_dense(20, 20))
    assert not mask.is_causal() or not np.triu(seen, 1).any()
    assert mask.is_causal() or name not in ("causal", "packed_causal", "window", "padded_left")

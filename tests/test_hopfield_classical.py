"""The classical network of spins against the float64 specification with its matrix, and what is known of it."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, SEEDS, to_numpy
from hypothesis import given
from hypothesis import strategies as st

from causalattn import classical_hopfield_energy, classical_hopfield_retrieve
from causalattn.reference import hopfield as reference

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 24))
CASES = {"size": SIZES, "keep": st.booleans(), "lifted": st.booleans(), "seed": SEEDS}


def spins(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(DEVICE, dtype)


def make(size, lifted, seed, dtype=torch.float32):
    """State [L, d], patterns [N, d], and thresholds that make some fields exactly zero."""
    N, L, d = size
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.randint(-1, 2, (d,), generator=generator).to(DEVICE, torch.float32) if lifted else None
    return spins(seed, L, d, dtype=dtype), spins(seed + 1, N, d, dtype=dtype), threshold


def arrays(*tensors):
    return [None if x is None else to_numpy(x) for x in tensors]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(**CASES)
def test_energy_matches_float64(dtype, size, keep, lifted, seed):
    state, patterns, threshold = make(size, lifted, seed, dtype)
    got = classical_hopfield_energy(state, patterns, keep_diagonal=keep, threshold=threshold)
    expected = reference.classical_hopfield_energy(*arrays(state, patterns), keep, *arrays(threshold))
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", ["async", "sync"])
@given(**CASES, steps=st.integers(1, 8))
def test_retrieval_matches_float64(mode, size, keep, lifted, seed, steps):
    state, patterns, threshold = make(size, lifted, seed)
    options = {"keep_diagonal": keep, "threshold": threshold}
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    got = classical_hopfield_retrieve(state, patterns, mode=mode, steps=steps, generator=generators[0], **options)
    orders = [
        None if mode == "sync" else torch.randperm(size[2], generator=generators[1]).tolist() for _ in range(steps)
    ]
    expected = reference.classical_hopfield_retrieve(*arrays(state, patterns), orders, keep, *arrays(threshold))
    for name in ("state", "steps", "converged", "cycle"):
        assert np.array_equal(to_numpy(getattr(got, name)), getattr(expected, name)), name
    assert torch.equal(got.energy, classical_hopfield_energy(got.state, patterns, **options))


@given(size=SIZES, seed=SEEDS)
def test_a_state_does_not_know_its_mates(size, seed):
    state, patterns, _ = make(size, False, seed)
    for mode in ("async", "sync"):
        together, alone = (
            classical_hopfield_retrieve(x, patterns, mode=mode, generator=torch.Generator().manual_seed(seed))
            for x in (state, state[-1:])
        )
        assert all(torch.equal(x[-1:], y) for x, y in zip(together, alone, strict=True))


def test_leading_axes_broadcast():
    state, patterns = spins(0, 2, 1, 5, 12), spins(1, 3, 4, 12)
    result = classical_hopfield_retrieve(state, patterns, generator=torch.Generator().manual_seed(0))
    assert result.state.shape == (2, 3, 5, 12) and result.energy.shape == (2, 3, 5)
    one = classical_hopfield_retrieve(state[1, 0], patterns[2], generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.state[1, 2], one.state) and torch.equal(result.energy[1, 2], one.energy)


def test_a_tie_keeps_the_spin():
    # two patterns that differ in the last spin leave its field at zero
    patterns = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]], device=DEVICE)
    for mode in ("async", "sync"):
        assert torch.equal(classical_hopfield_retrieve(patterns, patterns, mode=mode).state, patterns)


def test_the_smallest_cycle():
    state, pattern = torch.tensor([[1.0, -1.0], [1.0, 1.0]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
    result = classical_hopfield_retrieve(state, pattern, mode="sync")
    assert result.cycle.tolist() == [True, False] and result.converged.tolist() == [False, True]
    kept = classical_hopfield_retrieve(state, pattern, mode="sync", keep_diagonal=True)
    assert kept.converged.all() and not kept.cycle.any()


def test_too_few_steps_leave_it_unconverged():
    state, patterns = spins(3, 40, 60), spins(4, 12, 60)
    once = classical_hopfield_retrieve(state, patterns, steps=1)
    assert not once.converged.all() and (once.steps <= 1).all()
    assert classical_hopfield_retrieve(state, patterns, steps=50).converged.all()


GOOD = torch.ones(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "state must hold spins, 1 or -1, got 0", (torch.zeros(2, 4), GOOD[1]), {}),
        (ValueError, "patterns must hold spins, 1 or -1, got 0.5", (GOOD[0], torch.full((3, 4), 0.5)), {}),
        (ValueError, "state must hold spins, 1 or -1, got nan", (torch.full((2, 4), torch.nan), GOOD[1]), {}),
        (ValueError, "patterns must hold at least one pattern", (GOOD[0], torch.ones(0, 4)), {}),
        (ValueError, r"patterns must have shape \[\.\.\., N, 4\]", (GOOD[0], torch.ones(3, 5)), {}),
        (ValueError, "mode must be 'async' or 'sync', got 'both'", GOOD, {"mode": "both"}),
        (ValueError, "steps must be an integer from 1, got 0", GOOD, {"steps": 0}),
        (ValueError, r"threshold must have shape \[4\] on cpu, got \[3\]", GOOD, {"threshold": torch.ones(3)}),
        (TypeError, "threshold must be a floating point", GOOD, {"threshold": 1.0}),
        (ValueError, "threshold must be finite", GOOD, {"threshold": torch.tensor([torch.nan, 0, 0, 0])}),
        (TypeError, "patterns must have state's dtype", (GOOD[0], GOOD[1].double()), {}),
    ],
)
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        classical_hopfield_retrieve(*arguments, **options)

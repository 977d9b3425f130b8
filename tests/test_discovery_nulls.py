"""Null maps keep what they say they keep, and nothing else."""

import numpy as np
import pytest
import torch
from correlations import attention, correlation, tensor
from helpers import SEEDS
from hypothesis import given
from hypothesis import strategies as st

from causalattn.discovery import discover, null_attention, null_discoveries


def entropy(A):
    return torch.special.entr(A).sum(-1)


@given(causal=st.booleans(), spread=st.sampled_from([0.1, 1.0, 4.0]), sink=st.sampled_from([0.0, 6.0]), seed=SEEDS)
def test_random_logits_have_the_entropies(causal, spread, sink, seed):
    A = tensor(attention(12, spread=spread, causal=causal, sink=sink, seed=seed)).cpu()
    drawn = null_attention(A, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn > 0, A > 0) or sink
    assert not drawn[A == 0].any()
    assert (drawn.sum(-1) - 1).abs().max() < 1e-12
    # what a row of two keys has is known to a rounding of its entropy only
    assert (entropy(drawn) - entropy(A)).abs().max() < 1e-6
    assert not torch.allclose(drawn[5:], A[5:], atol=1e-3)


@given(causal=st.booleans(), seed=SEEDS)
def test_permuted_rows_have_the_weights(causal, seed):
    A = tensor(attention(12, causal=causal, seed=seed)).cpu()
    A /= A.sum(-1, keepdim=True)
    A[3] = 0
    drawn = null_attention(A, null="permute", generator=torch.Generator().manual_seed(seed))
    assert (drawn.sort(-1).values - A.sort(-1).values).abs().max() < 1e-15
    assert not drawn[A == 0].any() and not torch.equal(drawn, A)
    again = null_attention(A, null="permute", generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn, again)


def test_what_a_learned_sink_takes_is_no_keys():
    A = tensor(attention(12)).cpu()
    scaled = A * torch.linspace(0.1, 1, 12, dtype=torch.float64)[:, None]
    for null in ("random_logits", "permute"):
        drawn = [null_attention(x, null=null, generator=torch.Generator().manual_seed(3)) for x in (A, scaled)]
        assert (drawn[0] - drawn[1]).abs().max() < 1e-9


def test_keys_of_no_weight_may_be_allowed():
    A = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    allowed = torch.tensor([[True, True, True, False]])
    places = {
        int(null_attention(A, null="permute", allowed=allowed, generator=torch.Generator().manual_seed(seed)).argmax())
        for seed in range(30)
    }
    assert places == {0, 1, 2}


def test_permuted_weights_go_anywhere_alike():
    # each of 4 weights at each of 4 keys a quarter of the time: χ² with 9 degrees of freedom
    A = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([null_attention(A, null="permute", generator=generator)[0].argsort() for _ in range(2000)])
    counts = torch.stack([torch.bincount(column, minlength=4) for column in order.T]).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 27.9


def test_graphs_of_the_null():
    A = tensor(attention(8, S=20, spread=2.0)).cpu()
    told = []
    found = null_discoveries(A, draws=3, cut=0.2, max_order=1, progress=lambda *x: told.append(x))
    assert told == [(1, 3), (2, 3), (3, 3)] and len(found) == 3
    assert all(len(x.levels) == 2 for x in found)
    again = null_discoveries(A, draws=3, cut=0.2, generator=torch.Generator().manual_seed(1))
    same = null_discoveries(A, draws=3, cut=0.2, generator=torch.Generator().manual_seed(1))
    assert [x.pag for x in again] == [x.pag for x in same]


def test_structure_is_beyond_its_null():
    # rows in two groups, each about a key of its own, where random rows of their entropies are about any
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10, 30)) * 0.3
    logits[:5, 0] += 4
    logits[5:, 1] += 4
    A = np.exp(logits)
    A /= A.sum(1, keepdims=True)
    edges = discover(tensor(correlation(A)).cpu(), cut=0.5, max_order=0).pag.skeleton
    assert edges[:5, :5].sum() == 20 and not edges[:5, 5:].any()
    nulls = null_discoveries(tensor(A).cpu(), draws=10, cut=0.5, max_order=0)
    assert max(int(x.pag.skeleton.sum()) for x in nulls) < int(edges.sum())


def test_bad_input():
    A = torch.eye(3)
    with pytest.raises(ValueError, match="null must be one of random_logits, permute, got 'shuffle'"):
        null_attention(A, null="shuffle")
    with pytest.raises(ValueError, match=r"A must be one map \[T, S\], got \[1, 3, 3\]"):
        null_attention(A[None])
    with pytest.raises(ValueError, match=r"allowed must be bool, of A's shape \[3, 3\], got \[2, 3\]"):
        null_attention(A, allowed=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="A must hold probabilities, got a negative number or NaN"):
        null_attention(-A)
    with pytest.raises(ValueError, match="allowed must hold every key of positive weight"):
        null_attention(torch.ones(3, 3), null="permute", allowed=torch.eye(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        null_discoveries(A, draws=0, cut=0.5)

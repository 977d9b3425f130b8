"""Effects of a linear model read from attention, against the model that the attention was made from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causalattn import causal, padding
from causalattn.discovery import sem


def of_weights(G):
    """q, k and a bias whose attention is (I − G)⁻¹ Λ for direct effects G ≥ 0 [T, T], rows scaled to sum to 1."""
    A = np.linalg.inv(np.eye(len(G)) - G)
    A /= A.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        bias = torch.from_numpy(np.log(A))
    q = torch.zeros(1, 1, len(G), 4, dtype=torch.float64)
    return q, bias, A


def some_weights(T, seed):
    rng = np.random.default_rng(seed)
    return np.tril(rng.random((T, T)) * (rng.random((T, T)) < 0.4), -1) * 0.5


@given(T=st.sampled_from([1, 2, 7, 16]), seed=st.integers(0, 999))
def test_the_weights_come_back(T, seed):
    G = some_weights(T, seed)
    q, bias, A = of_weights(G)
    found = sem(q, q, bias=bias, causal=True)
    # rows scaled by s: G_ij s_i / s_j, of a model whose variables are scaled
    scale = np.diag(A)
    assert np.abs(found.total[0, 0].numpy() - A / scale).max() < 1e-12
    assert np.abs(np.linalg.inv(np.eye(T) - found.weights[0, 0].numpy()) - A / scale).max() < 1e-9
    assert ((found.weights[0, 0].numpy() > 1e-12) == (G > 0)).all()
    expected = np.abs(A).sum(1).max() * np.abs(np.linalg.inv(A)).sum(1).max()
    assert np.isclose(float(found.condition), expected)


@given(T=st.sampled_from([2, 9]), seed=st.integers(0, 999), data=st.data())
def test_a_token_set_from_outside_listens_to_none(T, seed, data):
    q, bias, _ = of_weights(some_weights(T, seed))
    found = sem(q, q, bias=bias, causal=True)
    token = data.draw(st.integers(-T, T - 1))
    G = found.weights[0, 0].numpy().copy()
    G[token] = 0
    assert np.abs(found.do(token)[0, 0].numpy() - np.linalg.inv(np.eye(T) - G)).max() < 1e-9


def test_what_is_only_rounding_is_refused():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 64, 16).mul(2).unbind()
    found = sem(q, k, causal=True)
    assert (found.condition > 1e10).all() and found.weights.isnan().all() and found.total.isfinite().all()
    assert sem(q, k, causal=True, bound=1e300).weights.isfinite().all()


def test_padding_is_told():
    q = torch.randn(2, 1, 5, 8)
    found = sem(q, q, mask=causal() & padding(torch.tensor([5, 3])))
    assert found.condition[0].isfinite().all() and found.condition[1].isinf().all()
    assert found.weights[1].isnan().all() and found.total[1, 0, :, 3:].isnan().all()
    assert found.total[1, 0, :3, :3].isfinite().all()


def test_bad_input():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="sem needs attention without weight above its diagonal"):
        sem(q, q)
    with pytest.raises(ValueError, match="sem needs as many queries as keys, got T = 3 and S = 4"):
        sem(q[:, :, 1:], q, causal=True)
    with pytest.raises(ValueError, match="bound must be at least 1, got"):
        sem(q, q, causal=True, bound=0.5)
    with pytest.raises(ValueError, match="token must lie in -4…3, got 4"):
        sem(q, q, causal=True).do(4)

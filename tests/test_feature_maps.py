"""Feature maps against what they expand, their gradients and their seeds."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, SEEDS, to_numpy
from hypothesis import given
from hypothesis import strategies as st

from causalattn import feature_maps
from causalattn.reference.linear_attention import FEATURE_MAPS as REFERENCE


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("name", ["elu", "relu", "exp", "identity"])
@given(seed=SEEDS, scale=st.sampled_from([1.0, 30.0]))
def test_elementwise_maps_are_the_specification(name, seed, scale):
    x = normal(3, 7, seed=seed) * scale
    phi = feature_maps.elementwise(name, x)
    np.testing.assert_allclose(to_numpy(phi), REFERENCE[name](to_numpy(x)), rtol=1e-14)
    slope = feature_maps.elementwise_gradient(name, phi)
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(feature_maps.FEATURE_MAPS[name](leaf).sum(), leaf)
    torch.testing.assert_close(torch.ones_like(expected) if slope is None else slope, expected)


def test_elu_stays_positive_far_below_zero():
    x = torch.tensor([-80.0, -20.0])
    assert torch.equal(feature_maps.elu(x), x.exp())


@given(seed=SEEDS, D=st.sampled_from([1, 2, 5, 16]))
def test_taylor2_is_the_expansion(seed, D):
    q, k = normal(2, 6, D, seed=seed), normal(2, 6, D, seed=seed + 100)
    s = q @ k.mT / D**0.5
    phi_q, phi_k = feature_maps.taylor2(q), feature_maps.taylor2(k)
    assert phi_q.shape[-1] == 1 + D + D * (D + 1) // 2
    torch.testing.assert_close(phi_q @ phi_k.mT, 1 + s + s.square() / 2)
    expected = REFERENCE["taylor2"](to_numpy(q)) @ np.swapaxes(REFERENCE["taylor2"](to_numpy(k)), -1, -2)
    np.testing.assert_allclose(to_numpy(phi_q @ phi_k.mT), expected, rtol=1e-10, atol=1e-12)


def test_favor_is_unbiased():
    q, k = normal(4, 8, seed=1) * 0.7, normal(4, 8, seed=2) * 0.7
    phi = [feature_maps.favor(64, seed=seed) for seed in range(200)]
    draws = torch.stack([f(q) @ f(k).T for f in phi])
    exact = torch.exp(q @ k.T / 8**0.5)
    # five standard errors of the mean
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / len(phi) ** 0.5).all()


def test_favor_is_orthogonal_positive_and_seeded():
    w = feature_maps._directions(32, 8, 0)
    blocks = w.view(4, 8, 8)
    products = blocks @ blocks.mT
    assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-12
    x = normal(5, 8, dtype=torch.float32)
    phi = feature_maps.favor(40, seed=3)(x)
    assert phi.shape == (5, 40) and phi.dtype == torch.float32 and (phi > 0).all()
    assert torch.equal(phi, feature_maps.favor(40, seed=3)(x))
    assert not torch.equal(phi, feature_maps.favor(40, seed=4)(x))
    assert feature_maps.FEATURE_MAPS["favor"](x).shape == (5, feature_maps.FAVOR_FEATURES)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        feature_maps.favor(0)

"""Hopfield retrieval as a layer: what it is without projections, and multi-head attention with them."""

import pytest
import torch
from helpers import DEVICE

from causalattn import Hopfield, hopfield_retrieve


def make(N, L):
    """States [2, L, 8] and patterns [2, N, 8]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 8, generator=generator).to(DEVICE) for n in (L, N)]


def test_without_projections_it_retrieves():
    state, patterns = make(9, 5)
    got = Hopfield(8, heads=2, project=False, beta=3.0, steps=4, tol=1e-5)(state, patterns)
    heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (state, patterns)]
    expected = hopfield_retrieve(*heads, beta=3.0, steps=4, tol=1e-5).state
    assert torch.equal(got, expected.transpose(1, 2).flatten(2))


def test_with_projections_one_step_is_multi_head_attention():
    state, patterns = make(9, 5)
    layer = Hopfield(8, heads=2).to(DEVICE)
    rival = torch.nn.MultiheadAttention(8, 2, batch_first=True).to(DEVICE)
    parts = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        rival.in_proj_weight.copy_(torch.cat([x.weight for x in parts]))
        rival.in_proj_bias.copy_(torch.cat([x.bias for x in parts]))
        rival.out_proj.load_state_dict(layer.out.state_dict())
    torch.testing.assert_close(layer(state, patterns), rival(state, patterns, patterns)[0])


def test_a_beta_a_head_is_learned():
    state, patterns = make(9, 5)
    layer = Hopfield(8, heads=2, beta=torch.nn.Parameter(torch.tensor([0.5, 2.0]))).to(DEVICE)
    assert "beta" in dict(layer.named_parameters())
    layer(state, patterns).sum().backward()
    assert layer.beta.grad.abs().min() > 0
    first = Hopfield(8, heads=2, beta=torch.tensor([0.5, 2.0]))
    assert "beta" in dict(first.named_buffers())


def test_widths_of_its_own():
    layer = Hopfield(8, pattern_dim=6, value_dim=10, heads=4, steps=2).to(DEVICE)
    state, _ = make(9, 5)
    patterns, values = (torch.randn(2, 9, n, device=DEVICE) for n in (6, 10))
    assert layer(state, patterns, values).shape == (2, 5, 8)
    assert layer.retrieve(state, patterns, values).energy.shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 3}, "heads must divide dim 8, got 3"),
        ({"heads": 2, "beta": torch.ones(1)}, r"beta must have shape \[2\], got \[1\]"),
        ({"steps": 0}, "steps must be an integer from 1, got 0"),
        ({"tol": 1e-3}, "steps must be at least 2 where values are read"),
        ({"pattern_dim": 6, "project": False}, "pattern_dim must be dim 8"),
    ],
)
def test_bad_widths_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Hopfield(8, **options)


@pytest.mark.parametrize("name", ["state", "patterns", "values"])
def test_tensors_of_another_shape_are_named(name):
    tensors = {"state": torch.ones(2, 5, 8), "patterns": torch.ones(2, 9, 8), "values": torch.ones(2, 9, 8)}
    tensors[name] = tensors[name][..., None]
    with pytest.raises(ValueError, match=rf"{name} must have shape \[B, …, 8\]"):
        Hopfield(8)(**tensors)

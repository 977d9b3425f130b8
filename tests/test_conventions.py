"""Converters against each project's recurrence, written from its definition."""

import re

import pytest
import torch
from helpers import DEVICE, SEEDS
from hypothesis import given
from hypothesis import strategies as st

from causalattn import conventions, linear_attention


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def read(inputs, scale=1.0):
    """out, [B, T, H, V]."""
    q, k, v, decay = inputs
    options = {"decay": decay, "feature_map": "identity", "normalize": False, "scale": scale}
    return linear_attention(q, k, v, **options).out.transpose(1, 2)


def mamba2(x, dt, A, B, C):
    """h = e^{dt A} h + dt x Bᵀ, y = h C, a step at a time."""
    groups = x.shape[2] // B.shape[2]
    B, C = (y.repeat_interleave(groups, 2) for y in (B, C))
    h, ys = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=x.dtype, device=x.device), []
    for t in range(x.shape[1]):
        written = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        h = (dt[:, t] * A).exp()[..., None, None] * h + written
        ys.append((h @ C[:, t, :, :, None])[..., 0])
    return torch.stack(ys, 1)


@given(seed=SEEDS, groups=st.sampled_from([1, 2, 4]), T=st.sampled_from([1, 9, 70]))
def test_mamba2(seed, groups, T):
    x, dt = normal(2, T, 4, 3, seed=seed), normal(2, T, 4, seed=seed + 1).exp() * 0.1
    A, B, C = (
        -normal(4, seed=seed + 2).exp(),
        normal(2, T, groups, 5, seed=seed + 3),
        normal(2, T, groups, 5, seed=seed),
    )
    ours = conventions.from_mamba2(x, dt, A, B, C)
    torch.testing.assert_close(read(ours), mamba2(x, dt, A, B, C))
    back = conventions.to_mamba2(*ours)
    torch.testing.assert_close(mamba2(*back), mamba2(x, dt, A, B, C))


def test_one_group_of_mamba2_is_not_copied():
    x, B = normal(1, 6, 4, 3), normal(1, 6, 1, 5)
    ours = conventions.from_mamba2(x, x[..., 0].exp(), -torch.ones(4, dtype=x.dtype, device=DEVICE), B, B)
    assert ours.k.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


@given(seed=SEEDS, T=st.sampled_from([1, 70]))
def test_retnet(seed, T):
    q, k, v = (normal(2, 3, T, 4, seed=seed + i) for i in range(3))
    gamma = 1 - 2.0 ** -torch.arange(5, 8, dtype=q.dtype, device=DEVICE)
    S, outs = torch.zeros(2, 3, 4, 4, dtype=q.dtype, device=DEVICE), []
    for t in range(T):
        S = gamma[:, None, None] * S + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(4**-0.5 * (q[:, :, t, None] @ S))
    decay = conventions.from_retnet(gamma)
    torch.testing.assert_close(read((q, k, v, decay), 4**-0.5).transpose(1, 2), torch.cat(outs, 2))
    torch.testing.assert_close(conventions.to_retnet(decay), gamma)


@given(seed=SEEDS, T=st.sampled_from([1, 70]))
def test_gla(seed, T):
    q, k, v = (normal(2, T, 3, 4, seed=seed + i) for i in range(3))
    gates = normal(2, T, 3, 4, seed=seed).sigmoid() ** (1 / 16)
    S, outs = torch.zeros(2, 3, 4, 4, dtype=q.dtype, device=DEVICE), []
    for t in range(T):
        S = gates[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append((q[:, t, :, None] @ S)[:, :, 0])
    ours = conventions.from_gla(q, k, v, gates)
    torch.testing.assert_close(read(ours), torch.stack(outs, 1))
    for x, y in zip(conventions.to_gla(*ours), (q, k, v, gates), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("axes", [None, 1, 3, 4])
def test_fla(axes):
    q, k, v = (normal(2, 40, 3, 4, seed=i) for i in range(3))
    g = None if axes is None else {1: normal(3), 3: normal(2, 40, 3), 4: normal(2, 40, 3, 4)}[axes].sigmoid().log()
    kept = torch.ones(2, 40, 3, 1, dtype=q.dtype, device=DEVICE)
    if g is not None:
        kept = g.exp().expand(2, 40, 3)[..., None] if axes < 4 else g.exp()
    S, outs = torch.zeros(2, 3, 4, 4, dtype=q.dtype, device=DEVICE), []
    for t in range(40):
        S = S * kept[:, t, ..., None] + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / 2)
    ours = conventions.from_fla(q, k, v, g)
    torch.testing.assert_close(read(ours, 0.5), torch.stack(outs, 1))
    assert all(
        x is y is None or torch.equal(x, y) for x, y in zip(conventions.to_fla(*ours), (q, k, v, g), strict=True)
    )


X, DT = torch.zeros(1, 6, 4, 3), torch.ones(1, 6, 4)
Q = torch.zeros(1, 4, 6, 3)


@pytest.mark.parametrize(
    ("match", "run"),
    [
        ("x must have 4 axes, got [6, 4, 3]", lambda: conventions.from_mamba2(X[0], DT, DT[0, 0], X, X)),
        ("dt and A must have shapes [1, 6, 4] and [4]", lambda: conventions.from_mamba2(X, DT, DT[0], X, X)),
        ("G dividing 4, got [1, 6, 3, 3]", lambda: conventions.from_mamba2(X, DT, DT[0, 0], X[:, :, :3], X[:, :, :3])),
        ("B must have 4 axes", lambda: conventions.from_mamba2(X, DT, DT[0, 0], X[0], X)),
        ("k, v and decay must have q's", lambda: conventions.to_mamba2(Q, Q[:, :2], Q[:, :2], -Q[..., 0])),
        ("decay must be below 0 for a step of Mamba-2, got 0", lambda: conventions.to_mamba2(Q, Q, Q, Q[..., 0])),
        ("gamma must lie in (0, 1], got 0", lambda: conventions.from_retnet(torch.zeros(2))),
        ("gates must lie in (0, 1], got 2", lambda: conventions.from_gla(X, X, X, X + 2)),
        ("gates must have 4 axes, got [1, 6, 4]", lambda: conventions.from_gla(X, X, X, DT)),
        ("decay must have 4 axes, got [4]", lambda: conventions.to_gla(Q, Q, Q, torch.zeros(4))),
        ("v must have 4 axes, got [6, 4, 3]", lambda: conventions.from_fla(X, X, X[0])),
    ],
)
def test_bad_input_is_named(match, run):
    with pytest.raises(ValueError, match=re.escape(match)):
        run()

"""Gradients of the statistics of a matrix at hand: finite differences, both paths, ties and zeros."""

import pytest
import torch
from helpers import DEVICE, PATHS

from causalattn import dense
from causalattn.statistics import AttentionStats


def scalars(A, backend="auto"):
    """A number a statistic, of A [T, S]."""
    want = set(AttentionStats._fields) - ({"net_flow", "asymmetry"} if A.shape[0] != A.shape[1] else set())
    stats = dense.attention_stats(A, want=want, columns=("sink", -1), backend=backend)
    values = [x for x in stats[:-1] if x is not None] + [*(stats.asymmetry or ()), dense.dag_score(A, backend=backend)]
    generator = torch.Generator().manual_seed(7)
    return tuple((x * torch.rand(x.shape, generator=generator).to(x)).sum() for x in values)


@pytest.mark.parametrize(("T", "S"), [(6, 6), (4, 7)])
def test_gradients(T, S):
    A = torch.rand(T, S, dtype=torch.float64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) + 0.1
    assert torch.autograd.gradcheck(scalars, A.requires_grad_())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("T", [33, 70])
def test_gradients_of_both_paths_are_those_of_float64(backend, T):
    A = torch.randn(T, T, generator=torch.Generator().manual_seed(T)).mul(3).softmax(-1).to(DEVICE)
    grads = []
    for x, path in ((A, backend), (A.double(), "torch")):
        x.requires_grad_()
        grads.append(torch.autograd.grad(sum(scalars(x, path)), x)[0])
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_gradients_of_ties_and_zeros():
    A = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]], device=DEVICE, requires_grad=True)
    (shared,) = torch.autograd.grad(dense.attention_stats(A, want="max").max.sum(), A)
    assert shared.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    (entropy,) = torch.autograd.grad(dense.attention_stats(A, want="entropy").entropy.sum(), A)
    assert torch.allclose(entropy, torch.where(A > 0, -1 - A.log(), 0))
    empty = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    sum(x.sum() for x in dense.attention_stats(empty) if x is not None).backward()
    assert empty.grad.shape == (0, 4)

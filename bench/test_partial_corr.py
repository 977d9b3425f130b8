"""Partial correlations in batches and by levels against causal-learn, causality-lab's formula, and batched solvers."""

import functools
import itertools

import peers
import pytest
import torch
from cases import DEVICE, OURS, ROWS

import causalattn as ca
from causalattn.reference.partial_corr import partial_correlation as reference

T = 64
ORDERS = (0, 1, 2, 4, 8)
# what peers that make a test at a time take a second for, and what the others do
FEW, MANY = 20_000, 10_000_000 if DEVICE == "cuda" else 1_000_000
SINGLE = {"causal-learn fisherz": peers.fisherz, "causality-lab formula": peers.causality_lab}
BATCHED = {
    OURS: lambda R, i, j, given: ca.partial_correlation(R, i, j, given).r,
    "numpy.linalg batched": peers.numpy_partial_correlation,
    "torch.linalg batched": peers.torch_partial_correlation,
}


@functools.lru_cache(1)
def correlations(tokens):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(tokens, tokens + 100, generator=generator, dtype=torch.float64).softmax(-1)
    C = A @ A.mT
    scale = C.diagonal().sqrt()
    return (C / (scale[:, None] * scale)).fill_diagonal_(1).to(DEVICE)


@functools.lru_cache(1)
def drawn(order, count):
    generator = torch.Generator().manual_seed(order)
    tokens = torch.rand(count, T, generator=generator).topk(order + 2).indices.to(DEVICE)
    return tokens[:, 0].contiguous(), tokens[:, 1].contiguous(), tokens[:, 2:].contiguous()


def add_rate(count):
    if ROWS[-1]["ms"] is not None:
        ROWS[-1]["tests_per_s"] = 1e3 * count / ROWS[-1]["ms"]["p50"]


def flops(order, count):
    """A Cholesky factor of order + 2 rows."""
    return count * (order + 2) ** 3 / 3


def close_to(R, i, j, given):
    some = range(0, len(i), max(1, len(i) // 50))
    expected = [reference(R.cpu().numpy(), int(i[n]), int(j[n]), given[n].tolist())[0] for n in some]

    def check(result):
        # fisherz has no sign, and its p six digits
        found = torch.as_tensor(result).double().cpu()[list(some)].abs()
        assert (found - torch.tensor(expected, dtype=torch.float64).abs()).abs().max() < 1e-6

    return check


@pytest.mark.parametrize("peer", [*BATCHED, *SINGLE])
@pytest.mark.parametrize("order", ORDERS)
def test_few(measure, order, peer):
    R, chosen = correlations(T), drawn(order, FEW)
    run = {**BATCHED, **SINGLE}[peer]
    measure(f"{FEW} tests of |S| = {order}", peer, run, R, *chosen, flops=flops(order, FEW), check=close_to(R, *chosen))
    add_rate(FEW)


@pytest.mark.parametrize("peer", BATCHED)
@pytest.mark.parametrize("order", ORDERS)
def test_many(measure, order, peer):
    R, chosen = correlations(T), drawn(order, MANY)
    needs = 8 * MANY * (order + 2) ** 2 if peer != OURS else 0
    check = close_to(R, *chosen)
    measure(
        f"{MANY} tests of |S| = {order}",
        peer,
        BATCHED[peer],
        R,
        *chosen,
        flops=flops(order, MANY),
        needs=needs,
        check=check,
    )
    add_rate(MANY)


def test_every_single_neighbour_of_512_tokens(measure):
    R = correlations(512)
    adjacency = ~torch.eye(512, dtype=torch.bool, device=DEVICE)
    count = 512 * 511 // 2 * 510

    def check(result):
        assert int(result.tests) == count

    measure(
        "level of order 1", OURS, lambda R: ca.level_tests(R, adjacency, 1, cut=0.1), R, flops=6 * count, check=check
    )
    add_rate(count)


@pytest.mark.parametrize("order", [2, pytest.param(3, marks=[pytest.mark.long] if DEVICE == "cpu" else [])])
def test_every_set_of_64_tokens(measure, order):
    R = correlations(T)
    sets = torch.tensor(list(itertools.combinations(range(T), order)))
    node = torch.arange(T).repeat_interleave(len(sets))
    given = sets.repeat(T, 1)
    apart = (given != node[:, None]).all(1)
    handed = ca.Candidates(node[apart].to(DEVICE), given[apart].to(DEVICE))
    adjacency = ~torch.eye(T, dtype=torch.bool, device=DEVICE)
    count = len(handed.node) * (T - 1 - order)

    def check(result):
        assert int(result.tests) == count

    run = functools.partial(ca.level_tests, adjacency=adjacency, order=order, cut=0.1, candidates=handed)
    measure(f"level of order {order}", OURS, run, R, flops=count * (order**2 + 3 * order), check=check)
    add_rate(count)

"""Modern Hopfield retrieval, its energy and certificate on every path against the float64 specification."""

import math
import sys

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    PATHS,
    SEEDS,
    assert_within_reference_error,
    grown_memory,
    score_roundings,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

import causalattn as ca
from causalattn import FixedPoint, hopfield_certificate, hopfield_energy, hopfield_retrieve
from causalattn.reference import hopfield as reference

SIZES = st.tuples(st.sampled_from([1, 2, 33, 70]), st.sampled_from([1, 17, 64]), st.sampled_from([3, 16, 59]))
BETAS = st.sampled_from([0.1, 1.0, 4.0])


def make(N, L, d, dtype=torch.float32, seed=0, *lead):
    """Patterns [*lead, N, d] and states between them, in layouts of their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal(*lead, L, 2 * d)[..., ::2], normal(*lead, d, N).mT


def make_beta(kind, L, beta):
    """One number, or one a query."""
    return beta if kind == "number" else beta * torch.linspace(0.5, 1.5, L, device=DEVICE)


def plain(state, patterns, beta, values=None):
    """Eager torch's update and energy: scores in the accumulation dtype, weights in that of the patterns."""
    wide = torch.promote_types(state.dtype, torch.float32)
    xi, X = state.to(wide), patterns.to(wide)
    scores = beta * (xi @ X.mT) if isinstance(beta, float) else (xi * beta[..., None]) @ X.mT
    energy = xi.square().sum(-1) / 2 + X.square().sum(-1).max() / 2 - (scores.logsumexp(-1) - np.log(len(X))) / beta
    return scores.softmax(-1).to(state.dtype) @ (patterns if values is None else values), energy


def as_numpy(beta):
    return beta if isinstance(beta, float) else to_numpy(beta)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=SIZES, beta=BETAS, kind=st.sampled_from(["number", "query"]), paired=st.booleans(), seed=SEEDS)
def test_matches_float64(backend, dtype, size, beta, kind, paired, seed):
    N, L, d = size
    state, patterns = make(N, L, d, dtype, seed)
    beta = make_beta(kind, L, beta)
    values = make(N, N, 8, dtype, seed + 1)[0] if paired else None
    result = hopfield_retrieve(state, patterns, values, beta=beta, backend=backend)
    rival, energy = plain(state, patterns, beta, values)
    roundings = score_roundings(state, patterns, beta if kind == "number" else beta.max().item())
    # β·ξ, where β is a tensor, is rounded in the dtype of ξ
    coarser = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if kind == "query" else 0
    arrays = [None if x is None else to_numpy(x) for x in (state, patterns, values)]
    exact = reference.hopfield_update(*arrays[:2], as_numpy(beta), arrays[2])
    assert_within_reference_error(result.state, rival, exact, axis=None, roundings=roundings * max(1, coarser))
    exact = reference.hopfield_energy(*arrays[:2], as_numpy(beta))
    roundings *= what_an_energy_cancels(*arrays[:2], exact)
    roundings += coarser * what_a_state_moves(*arrays[:2], as_numpy(beta), exact)
    for got in (result.energy, hopfield_energy(state, patterns, beta=beta, backend=backend)):
        assert_within_reference_error(got, energy, exact, axis=None, roundings=roundings)
    assert (result.steps == 1).all() and result.converged is None


def what_an_energy_cancels(state, patterns, energy):
    """How many times the largest energy its largest term is, or 1."""
    norms = [(x.astype(float) ** 2).sum(-1).max() for x in (state, patterns)]
    return max(1, 2 * max(norms) / np.abs(energy).max())


def what_a_state_moves(state, patterns, beta, energy):
    """‖ξ‖·‖∇E‖ as a share of the largest energy: what one rounding of every state moves of it."""
    slope = state - reference.hopfield_update(state, patterns, beta)
    return (np.linalg.norm(state, axis=-1) * np.linalg.norm(slope, axis=-1)).max() / np.abs(energy).max()


@given(size=SIZES, beta=BETAS, steps=st.integers(1, 12), tol=st.sampled_from([None, 1e-3, 1e-9]), seed=SEEDS)
def test_many_steps_of_float64(size, beta, steps, tol, seed):
    state, patterns = make(*size, torch.float64, seed)
    result = hopfield_retrieve(state, patterns, beta=beta, steps=steps, tol=tol)
    exact = reference.hopfield_retrieve(to_numpy(state), to_numpy(patterns), beta, steps, tol or -1.0)
    assert np.array_equal(to_numpy(result.steps), exact.steps)
    for name in ("state", "energy", "change"):
        np.testing.assert_allclose(to_numpy(getattr(result, name)), getattr(exact, name), rtol=1e-8, atol=1e-9)
    assert result.converged is None if tol is None else np.array_equal(to_numpy(result.converged), exact.converged)


@pytest.mark.parametrize("backend", PATHS)
def test_a_query_stops_by_itself(backend):
    state, patterns = make(33, 17, 16)
    options = {"beta": 1.0, "steps": 20, "tol": 1e-4, "backend": backend}
    together = hopfield_retrieve(state, patterns, **options)
    assert together.converged.all() and together.steps.unique().numel() > 1
    assert (together.change <= 1e-4).all()
    for n in (0, 5, 16):
        alone = hopfield_retrieve(state[n : n + 1], patterns, **options)
        assert all(torch.equal(x[n : n + 1], y) for x, y in zip(together, alone, strict=True))


def test_no_convergence_is_no_error():
    state, patterns = make(33, 17, 16)
    result = hopfield_retrieve(state, patterns, beta=1.0, steps=2, tol=1e-12)
    assert not result.converged.any() and (result.steps == 2).all()


@pytest.mark.parametrize("backend", PATHS)
def test_values_are_read_after_the_updates(backend):
    state, patterns = make(33, 17, 16)
    values = make(33, 33, 5)[0]
    moved = hopfield_retrieve(state, patterns, beta=1.0, steps=3, backend=backend)
    result = hopfield_retrieve(state, patterns, values, beta=1.0, steps=4, backend=backend)
    read = hopfield_retrieve(moved.state, patterns, values, beta=1.0, backend=backend)
    assert torch.equal(result.state, read.state) and torch.equal(result.energy, read.energy)
    assert torch.equal(result.change, moved.change) and (result.steps == 4).all()
    assert read.change is None


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("lead", "stored"),
    [
        ((), ()),
        ((2,), ()),
        ((2,), (2,)),
        ((), (3,)),
        ((2, 3), (3,)),
        ((2, 1), (2, 3)),
        ((2, 1, 3), (4, 1)),
        ((2, 2, 3), ()),
    ],
)
def test_leading_axes_broadcast(backend, lead, stored):
    state, _ = make(5, 4, 16, torch.float32, 0, *lead)
    _, patterns = make(5, 4, 16, torch.float32, 1, *stored)
    whole = torch.broadcast_shapes(lead, stored)
    beta = 1 + torch.rand(*whole[-1:], 1, device=DEVICE)
    result = hopfield_retrieve(state, patterns, beta=beta, steps=2, backend=backend)
    assert result.state.shape == (*whole, 4, 16) and result.energy.shape == (*whole, 4)
    states, stores = state.expand(*whole, -1, -1), patterns.expand(*whole, -1, -1)
    betas = beta.expand(*whole, 4)
    for place in np.ndindex(*whole):
        one = hopfield_retrieve(states[place], stores[place], beta=betas[place], steps=2, backend=backend)
        torch.testing.assert_close(result.state[place], one.state)
        torch.testing.assert_close(result.energy[place], one.energy)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", ["number", "query"])
def test_gradients_are_those_of_the_formula(backend, kind):
    state, patterns = (x.detach().requires_grad_() for x in make(20, 7, 16))
    values = make(20, 20, 5)[0].requires_grad_()
    beta = make_beta(kind, 7, 1.0)
    leaves = [state, patterns, values] + ([beta.requires_grad_()] if kind == "query" else [])
    weight = torch.randn(7, 5, device=DEVICE)

    def loss(state, energy):
        return (state * weight.to(state.dtype)).sum() + energy.square().sum()

    result = hopfield_retrieve(state, patterns, values, beta=beta, steps=2, backend=backend)
    got = torch.autograd.grad(loss(result.state, result.energy), leaves)
    rivals = []
    for dtype in (torch.float32, torch.float64):
        copies = [x.detach().to(dtype).requires_grad_() for x in leaves]
        b = 1.0 if kind == "number" else copies[3]
        moved, _ = plain(copies[0], copies[1], b)
        rivals.append(torch.autograd.grad(loss(*plain(moved, copies[1], b, copies[2])), copies))
    for x, rival, exact in zip(got, *rivals, strict=True):
        assert_within_reference_error(x, rival, exact.cpu(), axis=None, roundings=score_roundings(state, patterns, 1.5))


def test_gradcheck():
    state, patterns = (x.detach().requires_grad_() for x in make(5, 3, 4, torch.float64))
    beta = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run(state, patterns, beta):
        result = hopfield_retrieve(state, patterns, beta=beta, steps=2)
        return result.state, result.energy, result.change, hopfield_energy(state, patterns, beta=beta)

    torch.autograd.gradcheck(run, (state, patterns, beta))


@pytest.mark.parametrize("backend", PATHS)
def test_energy_is_what_the_update_descends(backend):
    state, patterns = make(20, 7, 16)
    state = state.detach().requires_grad_()
    energy = hopfield_energy(state, patterns, beta=0.7, backend=backend)
    (slope,) = torch.autograd.grad(energy.sum(), state)
    update = hopfield_retrieve(state.detach(), patterns, beta=0.7, backend=backend).state
    torch.testing.assert_close(slope, state.detach() - update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", PATHS)
@given(size=SIZES, beta=BETAS, near=st.booleans(), seed=SEEDS)
def test_certificate_matches_float64(backend, size, beta, near, seed):
    N, L, d = size
    state, patterns = make(N, L, d, torch.float32, seed)
    if near:
        state = patterns[torch.arange(L, device=DEVICE) % N] + 0.01 * state
    got = hopfield_certificate(state, patterns, beta=beta, backend=backend)
    exact = reference.hopfield_certificate(to_numpy(state), to_numpy(patterns), beta)
    scale = np.linalg.norm(to_numpy(patterns), axis=-1).max() ** 2
    # two patterns equally near, up to rounding, may stand for each other
    sure = exact.margin > 1e-5 * scale
    assert np.array_equal(to_numpy(got.nearest)[sure], exact.nearest[sure])
    # eight roundings of a product of two patterns, in an exponent times beta
    eps = 8 * torch.finfo(torch.float32).eps
    for name, absolute in {"margin": scale, "separation": scale, "weight": 0, "bound": 0, "radius": 0}.items():
        x, y = to_numpy(getattr(got, name))[sure], getattr(exact, name)[sure]
        limits = {"rtol": eps * (1 + beta * scale), "atol": eps * absolute + np.finfo(np.float32).tiny}
        np.testing.assert_allclose(x, y, **limits, err_msg=name)
    clear = np.abs(exact.separation - (2 / N + np.log(2 * N * max(N - 1, 0.5) * beta * scale)) / beta) > 1e-4 * scale
    assert np.array_equal(to_numpy(got.stored)[sure & clear], exact.stored[sure & clear])
    assert np.array_equal(to_numpy(got.contraction), exact.contraction)


def test_certificate_knows_the_kinds_of_fixed_point():
    generator = torch.Generator().manual_seed(0)
    far = 4 * torch.nn.functional.normalize(torch.randn(6, 32, generator=generator), dim=1)
    close = far[:1] + 0.05 * torch.randn(5, 32, generator=generator)
    patterns = torch.cat([far[1:], close]).to(DEVICE)
    for beta, expected in (
        (2.0, [FixedPoint.PATTERN] * 5 + [FixedPoint.METASTABLE] * 5),
        (0.01, [FixedPoint.GLOBAL] * 10),
    ):
        settled = hopfield_retrieve(patterns, patterns, beta=beta, steps=500, tol=1e-6)
        assert settled.converged.all()
        kind = hopfield_certificate(settled.state, patterns, beta=beta).kind
        assert kind.tolist() == [int(x) for x in expected]


def test_one_pattern_is_the_fixed_point():
    pattern = make(1, 4, 8)[1]
    certificate = hopfield_certificate(pattern, pattern, beta=9.0)
    assert certificate.margin.isposinf().all() and certificate.separation.isposinf().all()
    assert certificate.stored.all() and (certificate.bound == 0).all()


def test_equal_patterns_are_not_apart():
    patterns = make(6, 4, 8)[1].clone()
    patterns[5] = patterns[2]
    certificate = hopfield_certificate(patterns, patterns)
    assert certificate.separation[2] == certificate.separation[5] == 0
    assert certificate.nearest.tolist()[5] in (2, 5)


@pytest.mark.parametrize("backend", PATHS)
def test_one_graph_serves_every_count(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def retrieve(state, patterns):
        return hopfield_retrieve(state, patterns, beta=1.0, steps=3, tol=1e-3, backend=backend)

    compiled = torch.compile(retrieve, backend=count, fullgraph=True)
    for N in range(20, 220, 10):
        state, patterns = make(N, 7, 16)
        assert torch.equal(compiled(state, patterns).state, retrieve(state, patterns).state)
    assert len(graphs) <= 2


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (2, 0, 5, 16), (0, 2, 5, 16)], ids=str)
def test_no_query(backend, shape):
    _, patterns = make(5, 1, 16)
    result = hopfield_retrieve(torch.zeros(shape, device=DEVICE), patterns, steps=3, tol=1e-3, backend=backend)
    assert result.state.shape == shape and result.energy.shape == shape[:-1]


def test_autocast_changes_nothing():
    state, patterns = make(33, 5, 16)
    plainly = hopfield_retrieve(state, patterns, beta=1.0), hopfield_certificate(state, patterns, beta=1.0)
    with torch.autocast(state.device.type, torch.bfloat16):
        cast = hopfield_retrieve(state, patterns, beta=1.0), hopfield_certificate(state, patterns, beta=1.0)
    for x, y in zip((*plainly[0], *plainly[1]), (*cast[0], *cast[1]), strict=True):
        assert x is y is None or (x.dtype == y.dtype and torch.equal(x, y))


@pytest.mark.parametrize("backend", PATHS)
def test_a_tensor_beta_in_half_precision_knows_the_nearest(backend):
    state, patterns = make(200, 20, 64, torch.bfloat16)
    number, tensor = (
        hopfield_certificate(state, patterns, beta=beta, backend=backend)
        for beta in (0.3, torch.tensor(0.3, device=DEVICE))
    )
    assert torch.equal(number.nearest, tensor.nearest) and torch.equal(number.margin, tensor.margin)
    assert (tensor.margin >= 0).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("beta", [1e-12, 1e-20, 1e-30, 1e-36])
def test_a_tiny_beta_takes_the_mean(backend, beta):
    state, patterns = make(3, 4, 16)
    update = hopfield_retrieve(state, patterns, beta=beta, backend=backend).state
    torch.testing.assert_close(update, patterns.mean(0).expand(4, -1))


MEMORY = """
def run(T):
    X = torch.randn(T, 32)
    return ca.hopfield_retrieve(torch.randn(T // 4, 32), X, beta=1.0, steps=2, tol=1e-3)
"""

# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_is_linear():
        (grown,) = grown_memory(MEMORY, 16384)
        assert 1024 * grown < 0.1 * 4 * 16384**2 / 4


GOOD = torch.zeros(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "beta must be positive and finite in float32, got 0", GOOD, {"beta": 0}),
        (ValueError, "beta must be positive and finite in float32, got -1.0", GOOD, {"beta": -1.0}),
        (ValueError, "beta must be positive and finite in float32, got 1e[+]40", GOOD, {"beta": 1e40}),
        (ValueError, "beta must be positive and finite in float32, got nan", GOOD, {"beta": math.nan}),
        (
            ValueError,
            "beta must be positive and finite in float32 everywhere",
            GOOD,
            {"beta": torch.tensor([1.0, -1.0])},
        ),
        (ValueError, "beta must be on state's device cpu, got meta", GOOD, {"beta": torch.ones(2, device="meta")}),
        (TypeError, "beta must be a number or a torch.Tensor, got str", GOOD, {"beta": "1"}),
        (ValueError, r"beta must broadcast to \[2\], got \[3\]", GOOD, {"beta": torch.ones(3)}),
        (TypeError, "beta must be floating point, got int64", GOOD, {"beta": torch.ones(2, dtype=torch.int64)}),
        (ValueError, "patterns must hold at least one pattern, got 0", (GOOD[0], torch.ones(0, 4)), {}),
        (
            ValueError,
            "patterns must be finite and of finite norm",
            (GOOD[0], torch.tensor([[1.0, 2.0, torch.nan, 0.0]])),
            {},
        ),
        (ValueError, "patterns must be finite", (GOOD[0], torch.full((2, 4), torch.inf)), {}),
        (ValueError, r"patterns must have shape \[\.\.\., N, 4\], got \[3, 5\]", (GOOD[0], torch.ones(3, 5)), {}),
        (ValueError, "state must have a width of at least 1", (torch.ones(2, 0), torch.ones(3, 0)), {}),
        (ValueError, r"leading axes that broadcast with state's \[2\]", (torch.ones(2, 2, 4), torch.ones(3, 3, 4)), {}),
        (ValueError, r"state must have at least the axes \[\.\.\., L, d\], got \[4\]", (torch.ones(4), GOOD[1]), {}),
        (TypeError, "patterns must have state's dtype float32", (GOOD[0], GOOD[1].double()), {}),
        (TypeError, "state must be float16, bfloat16, float32 or float64, got int64", (GOOD[0].long(), GOOD[1]), {}),
        (TypeError, "state must be a torch.Tensor, got list", ([[1.0]], GOOD[1]), {}),
        (ValueError, r"values must have shape \[3, V\], V ≥ 1, got \[2, 4\]", (*GOOD, torch.ones(2, 4)), {}),
        (ValueError, "steps must be an integer from 1, got 0", GOOD, {"steps": 0}),
        (ValueError, "steps must be at least 2 where values are read", (*GOOD, GOOD[1]), {"tol": 1.0}),
        (ValueError, "steps must be an integer from 1, got True", GOOD, {"steps": True}),
        (ValueError, "tol must be a positive number, got 0.0", GOOD, {"tol": 0.0}),
        (ValueError, "tol must be a positive number, got inf", GOOD, {"tol": math.inf}),
        (ValueError, "tol must be a positive number, got 1", GOOD, {"tol": "1"}),
    ],
)
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        hopfield_retrieve(*arguments, **options)


def test_a_nan_state_is_its_own_alone():
    state, patterns = make(9, 5, 8)
    dirty = state.clone()
    dirty[2] = torch.nan
    clean, result = (hopfield_retrieve(x, patterns, steps=3, tol=1e-3) for x in (state, dirty))
    keep = [0, 1, 3, 4]
    assert torch.equal(clean.state[keep], result.state[keep]) and result.state[2].isnan().all()
    assert not result.converged[2]


def test_public_names():
    assert {"hopfield_retrieve", "hopfield_energy", "hopfield_certificate", "Hopfield"} <= set(ca.__all__)

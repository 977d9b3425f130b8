"""What this library was built on, claim by claim, as properties that run; docs/claims.md is written from here.

A docstring's first line is the claim, its second the formula. make claims measures and writes the page.
"""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import PAGE, claim, expected, listed, saw, written
from helpers import DEVICE, PATHS, SEEDS, make_qkv, to_numpy
from hypothesis import given
from hypothesis import strategies as st

import causalattn as ca
from causalattn.reference.attention import attention as reference_attention

BETAS = st.sampled_from([0.05, 0.3, 1.0, 3.0])
SIZES = st.tuples(st.integers(2, 40), st.sampled_from([2, 8, 24]))
BACKENDS = pytest.mark.parametrize("backend", PATHS)


@pytest.fixture(scope="module", autouse=True)
def page(request):
    yield
    if request.config.getoption("--claims"):
        Path(request.config.getoption("--claims")).write_text(written())


def precise(backend):
    """The dtype that a path is most exact in."""
    return torch.float64 if backend == "torch" else torch.float32


def memory(size, backend, seed):
    """Five states on the hull of patterns, most of them near one, and the patterns [N, d]."""
    N, d = size
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(N, d, generator=generator, dtype=torch.float64)
    mixed = torch.rand(5, N, generator=generator, dtype=torch.float64).pow(6)
    state = (mixed / mixed.sum(1, keepdim=True)) @ patterns
    return [x.to(DEVICE, precise(backend)) for x in (state, patterns)]


def rounding(x, beta=1.0):
    """A bound on what roundings move of a result the size of the patterns: their scores', and a few more."""
    M = x.double().norm(dim=-1).max().item()
    return torch.finfo(x.dtype).eps * (8 + 4 * beta * M**2) * M


@claim("largest difference from the formula, as a share of roundings allowed: {:.2f}")
@BACKENDS
@given(size=SIZES, beta=BETAS, seed=SEEDS)
def test_the_modern_update_is_attention(backend, size, beta, seed):
    """The update of a modern Hopfield network is attention from states to patterns.
    ξ⁺ = Xᵀ softmax(β Xξ) = attention(q = ξ, k = v = X, scale = β)
    """
    state, X = memory(size, backend, seed)
    update = ca.hopfield_retrieve(state, X, beta=beta, backend=backend).state
    arrays = [to_numpy(x)[None, None] for x in (state, X, X)]
    attended = reference_attention(*arrays, np.ones((1, len(state), len(X)), bool), scale=beta)[0][0, 0]
    share = np.abs(to_numpy(update) - attended).max() / rounding(X, beta)
    saw(test_the_modern_update_is_attention, share)
    assert share <= 1


@claim("smallest E(ξ) − E(ξ⁺) − ½‖ξ⁺ − ξ‖², in units of M²: {:.1e}", min)
@BACKENDS
@given(size=SIZES, beta=BETAS, seed=SEEDS)
def test_no_update_climbs(backend, size, beta, seed):
    """The energy falls by at least half the squared step.
    E(ξ) − E(ξ⁺) ≥ ½‖ξ⁺ − ξ‖²
    """
    state, X = memory(size, backend, seed)
    scale = X.norm(dim=-1).max() ** 2
    for _ in range(2):
        moved = ca.hopfield_retrieve(state, X, beta=beta, backend=backend)
        fallen = moved.energy - ca.hopfield_energy(moved.state, X, beta=beta, backend=backend)
        slack = (fallen - moved.change**2 / 2) / scale
        saw(test_no_update_climbs, slack.min())
        assert slack.min() >= -rounding(X, beta) / scale.sqrt() * (1 + 1 / (beta * scale))
        state = moved.state


@claim("energies seen reach {:.3f} of 2M²")
@BACKENDS
@given(size=SIZES, beta=BETAS, seed=SEEDS)
def test_energy_is_bounded_on_the_hull(backend, size, beta, seed):
    """On the convex hull of the patterns the energy is neither negative nor above twice the squared radius.
    0 ≤ E(ξ) ≤ 2M², M = max ‖x_i‖
    """
    state, X = memory(size, backend, seed)
    energy = ca.hopfield_energy(state, X, beta=beta, backend=backend)
    M2 = X.norm(dim=-1).max() ** 2
    saw(test_energy_is_bounded_on_the_hull, energy.max() / (2 * M2))
    slack = rounding(X, beta) * (1 + 1 / beta)
    assert energy.min() >= -slack and energy.max() <= 2 * M2 + slack


@claim("largest ratio of the error to its bound: {:.3f}")
@BACKENDS
@given(size=SIZES, beta=BETAS, noise=st.sampled_from([0.05, 0.3, 1.0]), seed=SEEDS)
def test_one_update_retrieves_within_its_bound(backend, size, beta, noise, seed):
    """One update lands near the pattern that is ahead of the others.
    ‖ξ⁺ − x_i‖ ≤ 2M·min(1, (N − 1) e^{−βD}), D = x_i·ξ − max_{j≠i} x_j·ξ
    """
    _, X = memory(size, backend, seed)
    state = X + noise * torch.randn_like(X)
    sure = ca.hopfield_certificate(state, X, beta=beta, backend=backend)
    update = ca.hopfield_retrieve(state, X, beta=beta, backend=backend).state
    error = (update - X[sure.nearest]).norm(dim=-1)
    slack = rounding(X, beta) * math.sqrt(size[1])
    saw(test_one_update_retrieves_within_its_bound, ((error - slack) / sure.bound).max())
    assert (error <= sure.bound * (1 + torch.finfo(X.dtype).eps * 1e4) + slack).all()


def sphere(N, d, radius, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=generator, dtype=torch.float64)
    return (radius * X / X.norm(dim=-1, keepdim=True)).to(DEVICE, precise(backend))


@claim("states that left their ball: {:.0f}")
@BACKENDS
@given(N=st.integers(2, 30), beta=st.sampled_from([1.0, 2.0]), seed=SEEDS)
def test_a_stored_pattern_keeps_its_ball(backend, N, beta, seed):
    """Around a pattern that is separated enough a ball is mapped into itself.
    Δ_i ≥ 2/(βN) + β⁻¹ ln(2(N − 1)NβM²) ⇒ ‖f(ξ) − x_i‖ ≤ 1/(βNM) for all ‖ξ − x_i‖ ≤ 1/(βNM)
    """
    X = sphere(N, 24, 5.0, backend, seed)
    sure = ca.hopfield_certificate(X, X, beta=beta, backend=backend)
    step = torch.randn_like(X)
    state = X + sure.radius[:, None] * step / step.norm(dim=-1, keepdim=True)
    slack = rounding(X, beta) * math.sqrt(24)
    for _ in range(4):
        state = ca.hopfield_retrieve(state, X, beta=beta, backend=backend).state
        left = sure.stored & ~((state - X).norm(dim=-1) <= sure.radius + slack)
        saw(test_a_stored_pattern_keeps_its_ball, left.sum())
        assert not left.any()
    assert sure.stored.any()


@claim("largest gap between fixed points reached from two starts, in units of M: {:.1e}")
@BACKENDS
@given(size=SIZES, share=st.sampled_from([0.1, 0.5, 0.7]), seed=SEEDS)
def test_a_hot_memory_has_one_fixed_point(backend, size, share, seed):
    """Where β is small every state goes to the same point.
    βM² < 1 ⇒ f is a contraction: one fixed point
    """
    state, X = memory(size, backend, seed)
    M = X.norm(dim=-1).max()
    beta = share / M.item() ** 2
    assert ca.hopfield_certificate(state, X, beta=beta, backend=backend).contraction.all()
    slack = rounding(X, beta) * math.sqrt(size[1])
    starts = torch.cat([state, X[:1]])
    ends = ca.hopfield_retrieve(starts, X, beta=beta, steps=400, tol=slack, backend=backend)
    gap = (ends.state - ends.state[:1]).norm(dim=-1).max()
    saw(test_a_hot_memory_has_one_fixed_point, gap / M)
    # a contraction by `share` leaves 1 / (1 − share) times a step, and as many roundings
    assert ends.converged.all() and gap <= 4 * slack / (1 - share)


@claim(
    "share of drawn memories that hold all their patterns (8, 118 and 1,925 in 20, 30 and 40 dimensions): {:.3f}", min
)
@pytest.mark.parametrize(("d", "draws", "expected"), [(20, 100, 8), (30, 4, 118), (40, 1, 1925)])
def test_capacity_grows_with_the_power_of_the_dimension(d, draws, expected):
    """Random patterns are stored in a number exponential in the dimension.
    N = √p · c^((d−1)/4) patterns of norm K√(d−1) are all stored with probability 1 − p, c = b / W₀(e^(a + ln b))
    """
    p, K, beta = 1e-3, 3.0, 1.0
    a = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1)))
    b = 2 * K**2 * beta / 5
    w = 1.0
    for _ in range(50):
        # Newton's method for w·e^w = e^(a + ln b)
        w -= (w * math.exp(w) - math.exp(a) * b) / (math.exp(w) * (w + 1))
    c = b / w
    N = math.ceil(math.sqrt(p) * c ** ((d - 1) / 4))
    assert N == expected and c >= (2 / math.sqrt(p)) ** (4 / (d - 1))
    patterns = sphere(draws * N, d, K * math.sqrt(d - 1), "torch", 0).unflatten(0, (draws, N))
    held = ca.hopfield_retrieve(patterns, patterns, beta=beta, steps=50, tol=1e-10)
    radius = ca.hopfield_certificate(held.state[:, :1], patterns, beta=beta).radius
    stored = (held.converged & ((held.state - patterns).norm(dim=-1) <= radius)).all(-1).double().mean()
    saw(test_capacity_grows_with_the_power_of_the_dimension, stored)
    assert stored >= 1 - p


def spins(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(DEVICE, torch.float64)


@claim("largest rise of the energy: {:.0f}")
@given(N=st.integers(1, 12), d=st.integers(2, 30), keep=st.booleans(), seed=SEEDS)
def test_asynchronous_spins_descend(N, d, keep, seed):
    """Spins turned one after another never raise the classical energy, and come to rest.
    W_ii ≥ 0: E(ξ⁺) ≤ E(ξ), E = −½ ξᵀWξ
    """
    xi, X = spins(seed, 6, d), spins(seed + 1, N, d)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        before = ca.classical_hopfield_energy(xi, X, keep_diagonal=keep)
        moved = ca.classical_hopfield_retrieve(xi, X, keep_diagonal=keep, steps=1, generator=generator)
        rise = (moved.energy - before).max()
        saw(test_asynchronous_spins_descend, rise)
        assert rise <= 0
        xi = moved.state
    assert ca.classical_hopfield_retrieve(xi, X, keep_diagonal=keep, steps=200).converged.all()


@claim("share of memories without diagonal in which a state cycles: {:.2f}; with it none", statistics.mean)
@given(N=st.integers(1, 6), d=st.integers(2, 16), seed=SEEDS)
def test_synchronous_spins_cycle_without_the_diagonal_alone(N, d, seed):
    """Spins turned all at once may follow each other in a circle of two; with the Hebbian diagonal they descend.
    W_ii = 0: ξ, ξ′, ξ, ξ′ … possible, as for W = [[0, 1], [1, 0]], ξ = (1, −1); W = XᵀX/N: E(ξ⁺) ≤ E(ξ)
    """
    xi, X = spins(seed, 12, d), spins(seed + 1, N, d)
    bare = ca.classical_hopfield_retrieve(xi, X, mode="sync")
    saw(test_synchronous_spins_cycle_without_the_diagonal_alone, bare.cycle.any())
    assert (bare.converged ^ bare.cycle).all()
    for _ in range(20):
        kept = ca.classical_hopfield_retrieve(xi, X, mode="sync", keep_diagonal=True, steps=1)
        assert (kept.energy <= ca.classical_hopfield_energy(xi, X, keep_diagonal=True)).all()
        xi = kept.state
    assert kept.converged.all()
    smallest = ca.classical_hopfield_retrieve(torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), mode="sync")
    assert smallest.cycle.all()
    cycling = bare.state[bare.cycle]
    twice = ca.classical_hopfield_retrieve(cycling, X, mode="sync", steps=2)
    assert twice.cycle.all()


@claim("largest difference: {:.1e}")
@BACKENDS
@given(size=SIZES, seed=SEEDS)
def test_hebbs_matrix_is_the_state_of_linear_attention(backend, size, seed):
    """Linear attention over the patterns accumulates Hebb's matrix, and reads the classical field from it.
    φ = id, k = v = x: S_N = Σ x xᵀ = N·W and φ(ξ)ᵀ S_N = N·Wξ
    """
    N, d = size
    X, xi = spins(seed, N, d), spins(seed + 1, N, d)
    x, state = (t.to(precise(backend))[None, None] for t in (X, xi))
    form = {"feature_map": "identity", "normalize": False, "backend": backend}
    out, (s, _) = ca.linear_attention(state, x, x, **form)
    W = X.T @ X
    difference = max((s[0, 0] - W).abs().max(), (out[0, 0, -1] - xi[-1] @ W).abs().max())
    saw(test_hebbs_matrix_is_the_state_of_linear_attention, difference)
    assert difference == 0


@claim("largest difference, as a share of the largest output: {:.1e}")
@BACKENDS
@given(T=st.sampled_from([1, 17, 64, 130]), decayed=st.booleans(), seed=SEEDS)
def test_the_prefix_sum_is_the_matrix(backend, T, decayed, seed):
    """Linear attention in O(T) is what its O(T²) matrix gives.
    φ(q_t)ᵀ Σ_{s ≤ t} φ(k_s) v_sᵀ / φ(q_t)ᵀ Σ_{s ≤ t} φ(k_s) = Σ_s A_ts v_s
    """
    q, k, v = make_qkv(1, 2, 1, T, T, 16, 8, precise(backend), seed)
    decay = -0.3 * torch.rand(1, 2, T, device=DEVICE) if decayed else None
    out = ca.linear_attention(q, k, v, decay=decay, backend=backend).out
    twin = ca.linear_attention_matrix(q, k, decay=decay) @ v
    share = (out - twin).abs().max() / twin.abs().max()
    saw(test_the_prefix_sum_is_the_matrix, share)
    assert share <= 64 * torch.finfo(q.dtype).eps * max(1, T) ** 0.5


@claim("largest difference, as a share of roundings allowed: {:.2f}")
@BACKENDS
@given(T=st.integers(1, 33), D=st.sampled_from([2, 16, 59]), seed=SEEDS)
def test_a_score_is_the_trace_of_an_outer_product(backend, T, D, seed):
    """A score is the trace of the hypothesis matrix of effect and cause, and attention its softmax.
    tr(q_i ⊗ k_j) = q_i·k_j, A_ij = softmax_j tr(q_i ⊗ k_j)/√D
    """
    q, k, _ = make_qkv(1, 2, 2, T, T, D, dtype=precise(backend), seed=seed)
    traces = torch.einsum("bhia,bhjc->bhijac", q.double(), k.double()).diagonal(dim1=-2, dim2=-1).sum(-1)
    probs = ca.attention(q, k, k, return_probs=True, backend=backend).probs
    allowed = torch.finfo(q.dtype).eps * (8 + 4 * q.norm(dim=-1).max() * k.norm(dim=-1).max() * D**-0.5)
    share = (probs - (traces * D**-0.5).softmax(-1)).abs().max() / allowed
    saw(test_a_score_is_the_trace_of_an_outer_product, share)
    assert share <= 1


@claim("largest |Σ_j A_ij − 1|: {:.1e}")
@BACKENDS
@given(T=st.integers(1, 40), S=st.integers(1, 40), seed=SEEDS)
def test_softmax_is_the_posterior_over_causes(backend, T, S, seed):
    """A row of attention is a posterior over candidate causes, and a prior moves it by Bayes' rule.
    A_ij = π_j e^{s_ij} / Σ_l π_l e^{s_il} with bias_j = log π_j, Σ_j A_ij = 1
    """
    q, k, _ = make_qkv(1, 2, 2, T, S, 16, dtype=precise(backend), seed=seed)
    prior = torch.rand(S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE) + 0.01
    uniform, moved = (
        ca.attention(q, k, k, bias=bias, return_probs=True, backend=backend).probs.double()
        for bias in (None, prior.log().to(q.dtype))
    )
    bayes = uniform * prior / (uniform * prior).sum(-1, keepdim=True)
    eps = torch.finfo(q.dtype).eps * (8 + 4 * q.norm(dim=-1).max() * k.norm(dim=-1).max() / 4)
    saw(test_softmax_is_the_posterior_over_causes, (uniform.sum(-1) - 1).abs().max())
    assert (uniform.sum(-1) - 1).abs().max() <= 8 * eps and (moved - bayes).abs().max() <= 8 * eps


@claim("largest difference: {:.1e}")
@BACKENDS
@given(T=st.integers(2, 33), seed=SEEDS)
def test_the_causal_mask_is_a_global_do(backend, T, seed):
    """A causal mask cuts every edge from the future at once, and gives the past what it had, renormalised.
    A^do_ij = A_ij / Σ_{l ≤ i} A_il for j ≤ i, else 0; the future reaches no row
    """
    q, k, v = make_qkv(1, 2, 2, T, T, 16, 8, precise(backend), seed)
    full, masked = (
        ca.attention(q, k, v, causal=causal, return_probs=True, backend=backend).probs.double()
        for causal in (False, True)
    )
    cut = full.tril()
    cut /= cut.sum(-1, keepdim=True)
    difference = (masked - cut).abs().max()
    saw(test_the_causal_mask_is_a_global_do, difference)
    eps = torch.finfo(q.dtype).eps * (8 + 4 * q.norm(dim=-1).max() * k.norm(dim=-1).max() / 4)
    # the part of the future that was removed may be nearly all of a row
    assert difference <= 8 * eps / full.tril().sum(-1).min()
    other = k.clone()
    other[:, :, -1] += 1
    past = [ca.attention(q, x, v, causal=True, backend=backend).out[:, :, :-1] for x in (k, other)]
    assert torch.equal(*past)


@claim("smallest asymmetry for W_q ≠ W_k: {:.2f}; for W_q = W_k at most 1e-7", min)
@given(T=st.integers(2, 40), D=st.sampled_from([2, 16, 59]), seed=SEEDS)
def test_two_projections_make_scores_asymmetric(T, D, seed):
    """Cause and effect are told apart by two projections, and by nothing where they are one.
    W_q ≠ W_k: q_i·k_j ≠ q_j·k_i; W_q = W_k: q_i·k_j = q_j·k_i
    """
    generator = torch.Generator().manual_seed(seed)
    x, W_q, W_k = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(DEVICE) for n in (T, D, D))
    q, k = (x @ W / D for W in (W_q, W_k))
    directed = ca.score_asymmetry(q[None, None], k[None, None])
    saw(test_two_projections_make_scores_asymmetric, directed)
    assert directed > 0
    assert ca.score_asymmetry(q[None, None], q[None, None]) <= 1e-7
    A = ca.attention(q[None, None], q[None, None], q[None, None], return_probs=True)
    scores = A.probs.log() + A.lse[..., None]
    assert torch.allclose(scores, scores.mT, rtol=0, atol=1e-9 * scores.abs().max().item())


@claim("the widest gap that the search found between two outputs that should be one: {:.2f}")
def test_normalised_outputs_do_not_compose():
    """No operator on normalised outputs alone joins two parts of a text; on (out, lse) one does, and it is associative.
    o(A) = o(A′), o(A ∪ B) ≠ o(A′ ∪ B); (o, l) ⊕ (o′, l′) = (e^{l − m} o + e^{l′ − m} o′, m), m = log(e^l + e^{l′})
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64).to(DEVICE)

    widest = 0.0
    for _ in range(60):
        q, key, other, value, k, v = normal(1, 4), normal(1, 4), normal(1, 4), normal(1, 4), normal(3, 4), normal(3, 4)
        # one key gives its value whatever its score
        alone = [ca.attention(q, x, value).out for x in (key, other)]
        assert torch.allclose(*alone, rtol=0, atol=1e-14)
        joined = [ca.attention(q, torch.cat([x, k], 2), torch.cat([value, v], 2)).out for x in (key, other)]
        widest = max(widest, (joined[0] - joined[1]).abs().max().item())
    saw(test_normalised_outputs_do_not_compose, widest)
    assert widest > 0.5

    def join(x, y):
        lse = torch.logaddexp(x[1], y[1])
        return (x[1] - lse).exp()[..., None] * x[0] + (y[1] - lse).exp()[..., None] * y[0], lse

    q, k, v = normal(5, 4), normal(9, 4), normal(9, 4)
    parts = [ca.attention(q, k[:, :, n : n + 3], v[:, :, n : n + 3])[:2] for n in (0, 3, 6)]
    left, right, whole = join(join(*parts[:2]), parts[2]), join(parts[0], join(*parts[1:])), ca.attention(q, k, v)
    for x, y, z in zip(left, right, whole, strict=False):
        assert torch.allclose(x, y, rtol=0, atol=1e-14) and torch.allclose(x, z, rtol=0, atol=1e-14)


def test_the_page_lists_every_claim():
    assert listed(PAGE.read_text()) == expected()

"""The specification of Hopfield memory, modern and classical, in NumPy float64: states [L, d], patterns [N, d]."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def hopfield_energy(state: np.ndarray, patterns: np.ndarray, beta: float | np.ndarray) -> np.ndarray:
    """E(ξ) = −β⁻¹ log Σ_i e^{β x_i·ξ} + ½ξ·ξ + β⁻¹ log N + ½M²: [L]; beta a number or [L]."""
    state, patterns = state.astype(np.float64), patterns.astype(np.float64)
    scores = np.asarray(beta, np.float64)[..., None] * (state @ patterns.T)
    top = scores.max(-1)
    lse = top + np.log(np.exp(scores - top[:, None]).sum(-1))
    largest = (patterns**2).sum(-1).max()
    return (state**2).sum(-1) / 2 + largest / 2 - (lse - np.log(len(patterns))) / beta


def hopfield_update(
    state: np.ndarray, patterns: np.ndarray, beta: float | np.ndarray, values: np.ndarray | None = None
) -> np.ndarray:
    """Vᵀ softmax(β Xξ), V the patterns by default: [L, V]."""
    state, patterns = state.astype(np.float64), patterns.astype(np.float64)
    scores = np.asarray(beta, np.float64)[..., None] * (state @ patterns.T)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    values = patterns if values is None else values.astype(np.float64)
    return weights @ values / weights.sum(-1, keepdims=True)


class Retrieval(NamedTuple):
    state: np.ndarray
    energy: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    change: np.ndarray


def hopfield_retrieve(
    state: np.ndarray, patterns: np.ndarray, beta: float | np.ndarray, steps: int = 1, tol: float = 0.0
) -> Retrieval:
    """So many updates of each state, or fewer where one is at most tol long; energies are those before the last."""
    state = state.astype(np.float64).copy()
    L = len(state)
    moving, made = np.ones(L, bool), np.zeros(L, int)
    energy, change = np.zeros(L), np.zeros(L)
    for _ in range(steps):
        new, descended = hopfield_update(state, patterns, beta), hopfield_energy(state, patterns, beta)
        length = np.linalg.norm(new - state, axis=-1)
        energy[moving], change[moving] = descended[moving], length[moving]
        state[moving] = new[moving]
        made += moving
        moving &= length > tol
    return Retrieval(state, energy, made, ~moving, change)


class Certificate(NamedTuple):
    nearest: np.ndarray
    weight: np.ndarray
    margin: np.ndarray
    bound: np.ndarray
    separation: np.ndarray
    stored: np.ndarray
    radius: np.ndarray
    contraction: np.ndarray


def hopfield_certificate(state: np.ndarray, patterns: np.ndarray, beta: float) -> Certificate:
    """What `causalattn.hopfield_certificate` says of each state, without the kind: [L]."""
    state, patterns = state.astype(np.float64), patterns.astype(np.float64)
    L, N = len(state), len(patterns)
    M = np.linalg.norm(patterns, axis=-1).max()
    scores = state @ patterns.T
    nearest = scores.argmax(-1)
    chosen = np.arange(L), nearest

    def gap(scores: np.ndarray) -> np.ndarray:
        others = scores.copy()
        others[chosen] = -np.inf
        return scores[chosen] - others.max(-1)

    weights = np.exp(beta * (scores - scores.max(-1, keepdims=True)))
    margin, separation = gap(scores), gap(patterns[nearest] @ patterns.T)
    with np.errstate(divide="ignore"):
        needed = 2 / (beta * N) + np.log(2 * (N - 1) * N * beta * M**2) / beta
    return Certificate(
        nearest=nearest,
        weight=1 / weights.sum(-1),
        margin=margin,
        bound=2 * M * np.minimum(1, (N - 1) * np.exp(-beta * margin)),
        separation=separation,
        stored=separation >= needed,
        radius=np.full(L, 1 / (beta * N * M)),
        contraction=np.full(L, beta * M**2 < 1),
    )


def hebbian(patterns: np.ndarray, keep_diagonal: bool = False) -> np.ndarray:
    """W = (1/N) Σ_i x_i x_iᵀ, its diagonal zeroed unless it is kept: [d, d]."""
    W = patterns.T.astype(np.float64) @ patterns / len(patterns)
    if not keep_diagonal:
        np.fill_diagonal(W, 0)
    return W


def classical_hopfield_energy(
    state: np.ndarray, patterns: np.ndarray, keep_diagonal: bool = False, threshold: np.ndarray | None = None
) -> np.ndarray:
    """E(ξ) = −½ ξᵀWξ + θ·ξ: [L]."""
    W = hebbian(patterns, keep_diagonal)
    field = 0.0 if threshold is None else state @ threshold
    return field - np.einsum("li,ij,lj->l", state, W, state) / 2


class ClassicalRetrieval(NamedTuple):
    state: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    cycle: np.ndarray


def classical_hopfield_retrieve(
    state: np.ndarray,
    patterns: np.ndarray,
    orders: Sequence[Sequence[int] | None],
    keep_diagonal: bool = False,
    threshold: np.ndarray | None = None,
) -> ClassicalRetrieval:
    """A step an entry of orders: in that order one after another, or all at once for None; a zero field keeps."""
    W, N = hebbian(patterns, keep_diagonal), len(patterns)
    threshold = np.zeros(state.shape[1]) if threshold is None else threshold
    state = state.astype(np.float64).copy()
    steps = np.zeros(len(state), int)
    converged, cycle = np.zeros(len(state), bool), np.zeros(len(state), bool)
    for n, xi in enumerate(state):
        trace = [xi.copy()]
        for order in orders:
            for spins in [slice(None)] if order is None else ([i] for i in order):
                # N times a field without threshold is an integer
                h = np.rint(N * (W[spins] @ xi)) - N * threshold[spins]
                xi[spins] = np.where(h == 0, xi[spins], np.sign(h))
            converged[n] = (xi == trace[-1]).all()
            cycle[n] = order is None and not converged[n] and len(trace) > 1 and (xi == trace[-2]).all()
            if converged[n] or cycle[n]:
                xi[:] = trace[-1]
                break
            steps[n] += 1
            trace.append(xi.copy())
    return ClassicalRetrieval(state, steps, converged, cycle)

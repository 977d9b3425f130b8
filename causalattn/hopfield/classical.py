"""Classical Hopfield memory: spins under a Hebbian matrix that is never formed."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator
from .arguments import check_patterns, check_steps


class ClassicalRetrieval(NamedTuple):
    """state [..., L, d], spins in their dtype; the others [..., L], a query each.

    energy: E of the state. steps: how many changed it. converged: whether a step was made that did not. cycle: whether
    a step was made that led back to the state before.
    """

    state: Tensor
    energy: Tensor
    steps: Tensor
    converged: Tensor
    cycle: Tensor


def classical_hopfield_energy(
    state: Tensor, patterns: Tensor, *, keep_diagonal: bool = False, threshold: Tensor | None = None
) -> Tensor:
    """Compute the energy of spins in a classical Hopfield network, [..., L], in O(N·d) a state.

        E(ξ) = −½ ξᵀWξ + θ·ξ, W = (1/N) Σ_i x_i x_iᵀ, its diagonal zeroed unless it is kept

    Args:
        state: ξ, spins ±1, [..., L, d].
        patterns: X, spins ±1, [..., N, d]; leading axes broadcast with state's.
        keep_diagonal: keep W's diagonal, which lowers every E by d/2.
        threshold: θ, [d]; none by default.

    Returns:
        float32 (float64 for float64 state).

    Raises:
        ValueError: a shape or device that does not fit, no pattern; on the CPU spins that are not ±1.
        TypeError: a dtype that does not fit.

    Source: Hopfield 1982 (doi:10.1073/pnas.79.8.2554).

    Example:
        >>> classical_hopfield_energy(torch.ones(1, 4), torch.ones(1, 4))
        tensor([-6.])
    """
    network = _Network(state, patterns, keep_diagonal, threshold)
    return network.energy(network.state).to(accumulator(state))


@torch.no_grad()
def classical_hopfield_retrieve(
    state: Tensor,
    patterns: Tensor,
    *,
    mode: Literal["async", "sync"] = "async",
    keep_diagonal: bool = False,
    threshold: Tensor | None = None,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> ClassicalRetrieval:
    """Retrieve spins by the updates of a classical Hopfield network, in O(N·d) time a state and step.

        ξ_i ← sign(h_i), h = Wξ − θ with W = (1/N) Σ_i x_i x_iᵀ; a field of zero keeps the spin

    "async" turns one spin after another, each under the fields of those before it, all d of them a step in an order
    drawn anew; no turn climbs, and it ends. "sync" turns all at once: with the diagonal kept it descends too, without
    it may end in two states that follow each other. Fields are sums of ±1, exact in float64.

    Args:
        state, patterns, keep_diagonal, threshold: as in `classical_hopfield_energy`.
        mode: "async" or "sync".
        steps: at most how many; on CUDA all are made.
        generator: draws the orders of "async", as many as steps, on the CPU; every state goes by the same ones.

    Returns:
        ClassicalRetrieval, without gradient. A cycle is left in one of its two states. On CUDA values are not read:
        what is not ±1 has fields that mean nothing.

    Raises:
        ValueError: as in `classical_hopfield_energy`; an unknown mode, steps < 1.
        TypeError: a dtype that does not fit.

    Source: Hopfield 1982 (doi:10.1073/pnas.79.8.2554); cycles in Bruck and Goodman 1988 (IEEE Trans. Inf. Theory 34).

    Example:
        >>> pattern = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
        >>> classical_hopfield_retrieve(torch.tensor([[1.0, 1.0, -1.0, 1.0]]), pattern).state
        tensor([[ 1.,  1., -1., -1.]])
    """
    if mode not in ("async", "sync"):
        raise ValueError(f"mode must be 'async' or 'sync', got {mode!r}")
    check_steps(steps, None, False)
    network = _Network(state, patterns, keep_diagonal, threshold)
    xi = before = network.state
    shape, device = xi.shape[:-1], xi.device
    made = torch.zeros(shape, dtype=torch.int64, device=device)
    converged, cycle = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    orders = [torch.randperm(xi.shape[-1], generator=generator) for _ in range(steps if mode == "async" else 0)]
    for step in range(steps):
        new = network.turned(xi) if mode == "sync" else network.turned_in(xi, orders[step])
        moving = ~(converged | cycle)
        stays = (new == xi).all(-1)
        # the state before the last one comes back
        returns = (new == before).all(-1) & ~stays if mode == "sync" and step else torch.zeros_like(stays)
        converged, cycle = converged | (moving & stays), cycle | (moving & returns)
        moving = moving & ~stays & ~returns
        before, xi = torch.where(moving[..., None], xi, before), torch.where(moving[..., None], new, xi)
        made += moving
        if not (xi.is_cuda or torch.compiler.is_compiling()) and not moving.any():
            break
    energy = network.energy(xi).to(accumulator(state))
    return ClassicalRetrieval(xi.to(state.dtype), energy, made, converged, cycle)


class _Network:
    """Spins and patterns in float64, in which N times a field is an exact integer."""

    def __init__(self, state: Tensor, patterns: Tensor, keep_diagonal: bool, threshold: Tensor | None):
        lead = check_patterns(state, patterns)
        for name, x in (("state", state), ("patterns", patterns)):
            _check_spins(name, x)
        if threshold is not None:
            _check_threshold(threshold, state)
        self.state = state.double().expand(*lead, -1, -1)
        self.patterns = patterns.double()
        self.N = patterns.shape[-2]
        # of N·W each entry of the diagonal is N
        self.dropped = 0.0 if keep_diagonal else float(self.N)
        self.threshold = 0.0 if threshold is None else self.N * threshold.double()

    def energy(self, xi: Tensor) -> Tensor:
        overlaps = xi @ self.patterns.mT
        field = (self.threshold * xi).sum(-1)
        return (field - (overlaps.square().sum(-1) - self.dropped * xi.shape[-1]) / 2) / self.N

    def turned(self, xi: Tensor) -> Tensor:
        h = (xi @ self.patterns.mT) @ self.patterns - self.dropped * xi - self.threshold
        return torch.where(h == 0, xi, h.sign())

    def turned_in(self, xi: Tensor, order: Tensor) -> Tensor:
        """Every spin in its turn; the overlaps with the patterns follow."""
        xi, overlaps = xi.clone(), xi @ self.patterns.mT
        threshold = torch.zeros(xi.shape[-1], dtype=xi.dtype, device=xi.device) + self.threshold
        for i in order.tolist():
            spin, column = xi[..., i].clone(), self.patterns[..., i]
            h = torch.linalg.vecdot(overlaps, column[..., None, :]) - self.dropped * spin - threshold[i]
            new = torch.where(h == 0, spin, h.sign())
            overlaps += (new - spin)[..., None] * column[..., None, :]
            xi[..., i] = new
        return xi


def _check_spins(name: str, x: Tensor) -> None:
    if not (x.is_cuda or torch.compiler.is_compiling()) and (x.abs() != 1).any():
        raise ValueError(f"{name} must hold spins, 1 or -1, got {x[x.abs() != 1][0].item():g}")


def _check_threshold(threshold: Tensor, state: Tensor) -> None:
    if not isinstance(threshold, Tensor) or not threshold.is_floating_point():
        raise TypeError(f"threshold must be a floating point torch.Tensor, got {threshold!r}")
    if threshold.shape != state.shape[-1:] or threshold.device != state.device:
        wanted = f"shape [{state.shape[-1]}] on {state.device}"
        raise ValueError(f"threshold must have {wanted}, got {list(threshold.shape)} on {threshold.device}")
    if not (threshold.is_cuda or torch.compiler.is_compiling()) and not threshold.isfinite().all():
        raise ValueError("threshold must be finite, got NaN or inf")

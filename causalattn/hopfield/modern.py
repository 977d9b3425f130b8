"""Modern Hopfield retrieval: attention whose queries are states and whose keys and values are the stored patterns."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import Backend
from ..attention import attention
from ..statistics import attention_stats
from .arguments import Memory, check_steps, resolve


class Retrieval(NamedTuple):
    """state [..., L, d], or [..., L, V] of values, in its dtype; the others [..., L], a query each.

    energy: E of the state that the last step read. steps: how many were made. converged: whether one was at most tol
    long, None without tol. change: length of the last update, None where values were read at once.
    """

    state: Tensor
    energy: Tensor
    steps: Tensor
    converged: Tensor | None
    change: Tensor | None


def hopfield_retrieve(
    state: Tensor,
    patterns: Tensor,
    values: Tensor | None = None,
    *,
    beta: float | Tensor | None = None,
    steps: int = 1,
    tol: float | None = None,
    backend: Backend = "auto",
) -> Retrieval:
    """Retrieve patterns by the update of a modern Hopfield network, which is attention, in O(N + L) memory.

        ξ ← Xᵀ softmax(β Xξ), one pass over the patterns a step, which yields E(ξ) too
        E(ξ) − E(ξ⁺) ≥ ½‖ξ⁺ − ξ‖²: no step climbs

    A query stops by itself, whatever the others do. On CUDA every step is made, and a query that has stopped stays.
    Differentiable in state, patterns, values and beta.

    Args:
        state: ξ, [..., L, d], any strides; float16, bfloat16, float32 or float64.
        patterns: X, [..., N, d]; its leading axes broadcast with state's.
        values: what a pattern stands for, [..., N, V]: the last step reads these in place of the patterns.
        beta: inverse temperature, a number or a tensor that broadcasts to [..., L]: [H, 1] for one a head, [L] for one
            a query. A tensor multiplies the states in their dtype, whose range β·ξ must not leave. d^−½ by default.
        steps: how many, or at most how many with tol.
        tol: a query stops after an update no longer than this; on a saddle, where updates are short, too soon.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        Retrieval. The energy comes from the last pass, and so is E before its update; that of the result is lower by at
        least ½ change² (`hopfield_energy`). On CUDA values are not read: a wrong beta or pattern gives NaN.

    Raises:
        ValueError: a shape or device that does not fit, no pattern, beta or tol that is not positive, steps < 1 (< 2
            with values and tol); on the CPU NaN or inf in patterns.
        TypeError: a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: Ramsauer et al. 2020 (arXiv:2008.02217), eq. 3.

    Example:
        >>> hopfield_retrieve(torch.tensor([[0.9, 0.2]]), torch.eye(2), beta=20.0).state
        tensor([[1.0000e+00, 8.3153e-07]])
    """
    check_steps(steps, tol, values is not None)
    memory = resolve(state, patterns, values, beta)
    moved = _updated(memory, steps if values is None else steps - 1, tol, backend)
    if values is not None:
        moved = _read(memory, moved, backend)
    return Retrieval(*(None if x is None else memory.restored(x) for x in moved))


def _updated(memory: Memory, steps: int, tol: float | None, backend: Backend) -> Retrieval:
    """Up to so many updates."""
    xi = memory.state
    moving = torch.ones(xi.shape[:3], dtype=torch.bool, device=xi.device)
    made, energy, change = torch.zeros_like(moving, dtype=torch.int64), None, None
    for _ in range(steps):
        q, scale = memory.queries(xi)
        out, lse, _ = attention(q, memory.patterns, memory.patterns, scale=scale, backend=backend)
        length = torch.linalg.vector_norm(out.to(lse.dtype) - xi.to(lse.dtype), dim=3)
        descended = memory.energy(xi, lse)
        energy = descended if energy is None else torch.where(moving, descended, energy)
        change = length if change is None else torch.where(moving, length, change)
        xi = torch.where(moving[..., None], out, xi)
        made = made + moving
        if tol is not None:
            moving = moving & ~(length <= tol)
            if not (xi.is_cuda or torch.compiler.is_compiling()) and not moving.any():
                break
    return Retrieval(xi, energy, made, None if tol is None else ~moving, change)


def _read(memory: Memory, moved: Retrieval, backend: Backend) -> Retrieval:
    """The values that the states point at."""
    q, scale = memory.queries(moved.state)
    out, lse, _ = attention(q, memory.patterns, memory.values, scale=scale, backend=backend)
    return moved._replace(state=out, energy=memory.energy(moved.state, lse), steps=moved.steps + 1)


def hopfield_energy(
    state: Tensor, patterns: Tensor, *, beta: float | Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Compute the energy of states in a modern Hopfield network, [..., L], in O(N + L) memory.

        E(ξ) = −β⁻¹ log Σ_i e^{β x_i·ξ} + ½ξ·ξ + β⁻¹ log N + ½M², M = max ‖x_i‖; 0 ≤ E ≤ 2M² on the patterns' hull

    Args:
        state, patterns, beta, backend: as in `hopfield_retrieve`.

    Returns:
        float32 (float64 for float64 state), differentiable; ∇E = ξ − Xᵀ softmax(β Xξ).

    Raises:
        ValueError, TypeError, NotImplementedError: as in `hopfield_retrieve`.

    Source: Ramsauer et al. 2020 (arXiv:2008.02217), eq. 2.

    Example:
        >>> hopfield_energy(torch.eye(2), torch.eye(2), beta=20.0)
        tensor([0.0347, 0.0347])
    """
    memory = resolve(state, patterns, None, beta)
    q, scale = memory.queries(memory.state)
    lse = attention_stats(q, memory.patterns, want=["lse"], scale=scale, backend=backend).lse
    return memory.restored(memory.energy(memory.state, lse))

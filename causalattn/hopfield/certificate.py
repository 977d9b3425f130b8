"""What can be said of a state before or after retrieval: margins, bounds, and the kind of fixed point it is at."""

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from ..attention import attention_topk
from .arguments import Memory, resolve


class FixedPoint(enum.IntEnum):
    """What a state that retrieval no longer moves is: one pattern, a mean of several, or the only one there is."""

    PATTERN = 0
    METASTABLE = 1
    GLOBAL = 2


class Certificate(NamedTuple):
    """All [..., L], of each state and the pattern nearest to it; floats are float32 (float64 for float64 states).

    nearest: the pattern i of the largest x_i·ξ, int64; weight: its share of the softmax.
    margin: D = x_i·ξ − max_{j≠i} x_j·ξ; bound: 2M·min(1, (N − 1) e^{−βD}) ≥ ‖ξ⁺ − x_i‖ after one update.
    separation: Δ = x_i·x_i − max_{j≠i} x_i·x_j; stored: Δ ≥ 2/(βN) + β⁻¹ ln(2(N − 1)NβM²), where no update leaves the
    ball ‖ξ − x_i‖ ≤ radius = 1/(βNM).
    contraction: βM² < 1, where every state goes to one fixed point.
    kind: a FixedPoint, of a state that retrieval no longer moves: GLOBAL under contraction, PATTERN where one weight is
    above ½, METASTABLE elsewhere.
    """

    nearest: Tensor
    weight: Tensor
    margin: Tensor
    bound: Tensor
    separation: Tensor
    stored: Tensor
    radius: Tensor
    contraction: Tensor
    kind: Tensor


@torch.no_grad()
def hopfield_certificate(
    state: Tensor, patterns: Tensor, *, beta: float | Tensor | None = None, backend: Backend = "auto"
) -> Certificate:
    """Certify retrieval from states of a modern Hopfield network, in two passes over the patterns and O(N + L) memory.

    Args:
        state: ξ, [..., L, d]; the patterns themselves certify every one of them, in O(N²d) time.
        patterns, beta, backend: as in `hopfield_retrieve`.

    Returns:
        Certificate, without gradient. With one pattern margin and separation are ∞.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `hopfield_retrieve`.

    Source: Ramsauer et al. 2020 (arXiv:2008.02217), appendix: separation, fixed points, retrieval error.

    Example:
        >>> hopfield_certificate(torch.tensor([[0.9, 0.2]]), 3 * torch.eye(2), beta=2.0).bound
        tensor([[0.0900]])
    """
    memory = resolve(state, patterns, None, beta)
    q, scale = memory.queries(memory.state)
    values, indices = attention_topk(q, memory.patterns, 2, scale=scale, backend=backend)
    if isinstance(memory.beta, Tensor):
        # β·ξ, rounded, need not have the order of ξ
        indices = attention_topk(memory.state, memory.patterns, 2, scale=1.0, backend=backend).indices
    first, second = indices.unbind(3)
    nearest = _rows(memory, first)
    margin = _gap(memory, memory.state, nearest, second)
    rivals = attention_topk(nearest, memory.patterns, 2, scale=1.0, backend=backend).indices
    # a longer pattern may be nearer to this one than this one is
    rival = torch.where(rivals[..., 0] == first, rivals[..., 1], rivals[..., 0])
    separation = _gap(memory, nearest, nearest, rival)

    M, N = memory.largest, memory.patterns.shape[2]
    beta = memory.beta if isinstance(memory.beta, Tensor) else torch.full_like(margin, memory.beta)
    others = math.log(N - 1) if N > 1 else -math.inf
    contraction = beta * M**2 < 1
    kind = torch.where(values[..., 0] > 0.5, FixedPoint.PATTERN, FixedPoint.METASTABLE)
    result = Certificate(
        nearest=first.long(),
        weight=values[..., 0],
        margin=margin,
        bound=2 * M * (others - beta * margin).clamp(max=0).exp(),
        separation=separation,
        stored=separation >= (2 / N + math.log(2 * N) + others + (beta * M**2).log()) / beta,
        radius=1 / (beta * N * M),
        contraction=contraction,
        kind=torch.where(contraction, FixedPoint.GLOBAL, kind),
    )
    return Certificate(*map(memory.restored, result))


def _rows(memory: Memory, indices: Tensor) -> Tensor:
    """Patterns by their indices [B, H, L], the first one for −1: [B, H, L, d]."""
    patterns = memory.patterns.expand(-1, indices.shape[1], -1, -1)
    return patterns.gather(2, indices.long().clamp(min=0)[..., None].expand(-1, -1, -1, patterns.shape[3]))


def _gap(memory: Memory, state: Tensor, pattern: Tensor, other: Tensor) -> Tensor:
    """By how much a state's product with one pattern exceeds that with another, by index; ∞ where there is none."""
    wide = accumulator(state)
    gap = (state.to(wide) * (pattern.to(wide) - _rows(memory, other).to(wide))).sum(-1)
    return gap.masked_fill(other < 0, math.inf)

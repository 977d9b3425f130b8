"""States, patterns and β as the attention operators take them, checked."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import accumulator
from .._checks import FLOATS, same


class Memory(NamedTuple):
    """state [B, H, L, d]; patterns [B, H or 1, N, d] and values [B, H or 1, N, V]; beta a number or [B, H, L].

    lead are the leading axes that B and H stand for; largest is the largest norm of a pattern, [B, H or 1, 1].
    """

    state: Tensor
    patterns: Tensor
    values: Tensor | None
    beta: float | Tensor
    lead: tuple[int, ...]
    largest: Tensor

    def queries(self, state: Tensor) -> tuple[Tensor, float]:
        """What is asked of the patterns, and its scale: β is applied to states where it is not one number."""
        if isinstance(self.beta, float):
            return state, self.beta
        return state * self.beta.to(state.dtype)[..., None], 1.0

    def energy(self, state: Tensor, lse: Tensor) -> Tensor:
        """E(ξ) of states whose log-sum-exp over the patterns is lse."""
        wide = state.to(lse.dtype)
        if isinstance(self.beta, Tensor):
            # of the states that β·ξ, rounded, stands for
            wide = self.queries(state)[0].to(lse.dtype) / self.beta[..., None]
        # a tensor: a number would be a constant of the compiled graph
        count = lse.new_full((), self.patterns.shape[2])
        return (wide.square().sum(-1) + self.largest**2) / 2 - (lse - count.log()) / self.beta

    def restored(self, x: Tensor) -> Tensor:
        """A result with the caller's leading axes."""
        return x.reshape(*self.lead, *x.shape[2:])


def resolve(state: Tensor, patterns: Tensor, values: Tensor | None, beta: float | Tensor | None) -> Memory:
    lead = check_patterns(state, patterns)
    if values is not None:
        _check_values(values, patterns)
    beta = _resolve_beta(beta, (*lead, state.shape[-2]), state)
    stored = [None if x is None else _stored(x, lead) for x in (patterns, values)]
    largest = torch.linalg.vector_norm(stored[0], dim=3, dtype=accumulator(state)).amax(2, keepdim=True)
    if not (state.is_cuda or torch.compiler.is_compiling()) and not largest.isfinite().all():
        raise ValueError("patterns must be finite and of finite norm, got NaN or inf")
    state = state.expand(*lead, -1, -1).reshape(*_folded(lead), *state.shape[-2:])
    return Memory(state, *stored, beta, lead, largest)


def check_patterns(state: Tensor, patterns: Tensor) -> tuple[int, ...]:
    """The leading axes that both broadcast to."""
    for name, x, axes in (("state", state, "[..., L, d]"), ("patterns", patterns, "[..., N, d]")):
        _check_matrix(name, x, axes)
    same("patterns", patterns, "state", state)
    d = state.shape[-1]
    if d == 0:
        raise ValueError("state must have a width of at least 1, got 0")
    if patterns.shape[-1] != d:
        raise ValueError(f"patterns must have shape [..., N, {d}], got {list(patterns.shape)}")
    if patterns.shape[-2] == 0:
        raise ValueError("patterns must hold at least one pattern, got 0")
    lead = state.shape[:-2]
    try:
        return tuple(torch.broadcast_shapes(lead, patterns.shape[:-2]))
    except RuntimeError:
        wanted = f"leading axes that broadcast with state's {list(lead)}"
        raise ValueError(f"patterns must have {wanted}, got {list(patterns.shape[:-2])}") from None


def _check_values(values: Tensor, patterns: Tensor) -> None:
    _check_matrix("values", values, "[..., N, V]")
    same("values", values, "patterns", patterns)
    if values.shape[:-1] != patterns.shape[:-1] or values.shape[-1] == 0:
        wanted = ", ".join(map(str, patterns.shape[:-1]))
        raise ValueError(f"values must have shape [{wanted}, V], V ≥ 1, got {list(values.shape)}")


def _folded(lead: tuple[int, ...]) -> tuple[int, int]:
    """B and H of leading axes."""
    return (0, 1) if 0 in lead else (math.prod(lead[:-1]), lead[-1] if lead else 1)


def _stored(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Patterns as [B, H or 1, N, d], a view unless they broadcast along one of several leading axes."""
    own = (1,) * (len(lead) - x.ndim + 2) + x.shape[:-2]
    x = x.view(*own, *x.shape[-2:])
    if not lead:
        return x[None, None]
    if 0 in lead:
        return x.new_empty(0, 1, *x.shape[-2:])
    return x.expand(*lead[:-1], -1, -1, -1).reshape(math.prod(lead[:-1]), own[-1], *x.shape[-2:])


def check_steps(steps: int, tol: float | None, reads_values: bool) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer from 1, got {steps}")
    if tol is not None and not (_is_number(tol) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a positive number, got {tol}")
    if tol is not None and reads_values and steps < 2:
        raise ValueError(f"steps must be at least 2 where values are read after a tol, got {steps}")


def _resolve_beta(beta: float | Tensor | None, shape: tuple[int, ...], state: Tensor) -> float | Tensor:
    if beta is None:
        return state.shape[-1] ** -0.5
    limits = torch.finfo(accumulator(state))
    if not isinstance(beta, Tensor):
        if not _is_number(beta):
            raise TypeError(f"beta must be a number or a torch.Tensor, got {type(beta).__name__}")
        if not limits.tiny <= beta <= limits.max:
            raise ValueError(f"beta must be positive and finite in {limits.dtype}, got {beta}")
        return float(beta)
    if not beta.is_floating_point():
        raise TypeError(f"beta must be floating point, got {beta.dtype}".replace("torch.", ""))
    if beta.device != state.device:
        raise ValueError(f"beta must be on state's device {state.device}, got {beta.device}")
    if beta.ndim > len(shape) or any(n not in (1, m) for n, m in zip(beta.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"beta must broadcast to {list(shape)}, got {list(beta.shape)}")
    beta = beta.to(accumulator(state))
    if not (beta.is_cuda or torch.compiler.is_compiling()) and not ((beta >= limits.tiny) & (beta <= limits.max)).all():
        raise ValueError(f"beta must be positive and finite in {limits.dtype} everywhere")
    return beta.expand(shape).reshape(*_folded(shape[:-1]), shape[-1])


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _check_matrix(name: str, x: Tensor, axes: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}".replace("torch.", ""))
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least the axes {axes}, got {list(x.shape)}")

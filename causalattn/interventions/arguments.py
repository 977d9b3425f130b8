"""What the methods of Do take, checked and made plain: numbers, places, vectors, probabilities."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from .address import is_span, parse_span

Where = int | Sequence[int] | slice | str | None
Probabilities = float | Sequence | Tensor
# by how much probabilities in 16 bits may sum to more than 1
ROUNDING = 0.01


def finite(name: str, x: float) -> float:
    x = x.item() if getattr(x, "ndim", None) == 0 and not isinstance(x, Tensor) else x
    if not isinstance(x, Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite (Do.cut is −∞ and Do.hard is ∞), got {value}")
    return value


def column(x: Where) -> tuple[int, ...] | str:
    return "[:]" if x is None else place("col", x)


def place(name: str, x: Where) -> tuple[int, ...] | str | None:
    if isinstance(x, slice):
        if x.step not in (None, 1):
            raise ValueError(f"{name} must be a span of step 1, got step {x.step}")
        if not all(end is None or _is_whole(end) for end in (x.start, x.stop)):
            raise TypeError(f"{name} must be a span between two numbers, got {x}")
        x = f"[{'' if x.start is None else x.start}:{'' if x.stop is None else x.stop}]"
    if isinstance(x, str):
        if is_span(x):
            span = parse_span(x)
            # one number is no span: −1 is the prompt's last token, and not what follows it too
            return numbers(name, span.start) if ":" not in x else x
        if not x.strip() or "<-" in x:
            raise ValueError(f"{name} must name a token, got {x!r}")
        return x
    return numbers(name, x)


def numbers(name: str, x) -> tuple[int, ...] | None:
    if x is None:
        return None
    listed = x.tolist() if hasattr(x, "tolist") else x
    listed = list(listed) if isinstance(listed, Iterable) and not isinstance(listed, str) else [listed]
    if not all(map(_is_whole, listed)):
        raise TypeError(f"{name} must be a number or numbers, got {x!r}")
    if not listed:
        raise ValueError(f"{name} must hold at least one number, got none")
    return tuple(dict.fromkeys(map(int, listed)))


def pairs(edges) -> tuple[tuple[int, int], ...]:
    listed = edges.tolist() if hasattr(edges, "tolist") else edges
    listed = list(listed) if isinstance(listed, Iterable) else [listed]
    if not all(isinstance(pair, Iterable) for pair in listed):
        raise TypeError(f"edges must hold (row, col) pairs of numbers, got {edges!r}")
    found = [tuple(pair) for pair in listed]
    if not found:
        raise ValueError("edges must hold at least one (row, col), got none")
    for pair in found:
        if len(pair) != 2 or not all(map(_is_whole, pair)):
            raise TypeError(f"edges must hold (row, col) pairs of numbers, got {pair}")
    return tuple((int(row), int(col)) for row, col in found)


def vector(delta: Tensor | Sequence[float]) -> Tensor:
    try:
        delta = delta if isinstance(delta, Tensor) else torch.as_tensor(delta, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"delta must be a vector of numbers, got {type(delta).__name__}") from None
    if delta.ndim != 1 or delta.dtype == torch.bool or delta.is_complex():
        raise ValueError(f"delta must be a vector of numbers, got shape {list(delta.shape)}")
    if not delta.is_cuda and not delta.isfinite().all():
        raise ValueError("delta must be finite, got NaN or inf")
    return delta if delta.is_floating_point() else delta.double()


def probabilities(source: Probabilities) -> Tensor:
    try:
        shares = source if isinstance(source, Tensor) else torch.as_tensor(source, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"source must hold probabilities, got {source!r}") from None
    if not shares.is_floating_point() or not shares.numel() or shares.ndim > 4:
        raise TypeError(f"source must hold probabilities, got {shares.dtype} of shape {list(shares.shape)}")
    if not shares.is_cuda and not ((shares >= 0) & (shares <= 1 + ROUNDING)).all():
        raise ValueError(f"source must hold probabilities, from 0 to 1, got {shares.min():.4g} to {shares.max():.4g}")
    return shares


def by_layer(source: Mapping) -> dict[int, Tensor]:
    """The probabilities of each layer, whose number is text in JSON."""
    if not source:
        raise ValueError("source must be of at least one layer, got none")
    for layer in source:
        if not str(layer).isdecimal():
            raise TypeError(f"source must map layer numbers to probabilities, got {layer!r}")
    return {int(layer): probabilities(x) for layer, x in source.items()}


def ablation(value: str) -> str:
    if value not in ("zero", "mean"):
        raise ValueError(f"value must be 'zero' or 'mean', got {value!r}")
    return value


def _is_whole(x) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)

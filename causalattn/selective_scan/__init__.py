"""Selective scan: the diagonal state-space recurrence of S4D and S6, in O(T)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import FLOATS
from .forward import scan

__all__ = ["ScanOutput", "selective_scan"]

DISCRETIZATIONS = ("zoh", "euler")


class ScanOutput(NamedTuple):
    """out [B, T, E] in u's dtype; state [B, E, N] after the last token, float32 (float64 for float64 u)."""

    out: Tensor
    state: Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    discretization: Literal["zoh", "euler"] = "zoh",
    backend: Backend = "auto",
) -> ScanOutput:
    """Scan a diagonal state space along time: N states a channel, steps and projections that may change every token.

        h_t = e^{Δ_t A} h_{t−1} + B̄_t u_t,  out_t = (Σ_n C_tn h_tn + D u_t)·silu(z_t)
        "zoh": B̄ = (e^{ΔA} − 1)/A·B, u held through the step, ΔB where A = 0; "euler": B̄ = ΔB, as in Mamba

    Splitting every step in two changes nothing under "zoh", and does under "euler". Δ is taken as it is: a softplus
    or a bias of Δ is the caller's. Differentiable in every tensor, through out and through the state.

    Args:
        u: inputs, [B, T, E], any strides; float16, bfloat16, float32 or float64.
        delta: step sizes Δ ≥ 0, [B, T, E], or [E] where time does not change them.
        A: decay rates ≤ 0 (of ΔA, the log-decay a step), [E, N], real.
        B: input projection, [B, T, N], or [N] where time does not change it.
        C: output projection, [B, T, N] or [N].
        D: skip, [E].
        z: gate, [B, T, E].
        initial_state: h before the first token, [B, E, N], float32 (float64 for float64 u); zeros by default.
        discretization: "zoh" or "euler".
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.
        The others may have float dtypes of their own, float64 only beside float64 u. Constant delta, B and C are not
        copied, whether passed as such or expanded; with all three constant this is S4D.

    Returns:
        ScanOutput. T = 0 gives an empty out and the initial state. On CUDA values are not read: a positive ΔA grows
        the state, up to inf and NaN.

    Raises:
        ValueError: a shape, device or discretization that does not fit; on the CPU a positive A or negative delta.
        TypeError: a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: Gu and Dao 2023 (arXiv:2312.00752); S4D in Gu et al. 2022 (arXiv:2206.11893).

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> selective_scan(one, one, -torch.ones(1, 1), one, one, discretization="euler").out.flatten()
        tensor([1.0000, 1.3679, 1.5032])
    """
    check_scan(u, delta, A, B, C, D, z, initial_state)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization must be 'zoh' or 'euler', got {discretization!r}")
    batch, T, _ = u.shape
    delta, B, C = (x.expand(batch, T, -1) if x.ndim == 1 else x for x in (delta, B, C))
    out, state, _ = scan(u, delta, A, B, C, D, z, initial_state, discretization == "zoh", backend)
    return ScanOutput(out, state)


def check_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, state: Tensor | None
) -> None:
    for name, x in (("u", u), ("A", A)):
        _check_float(name, x)
    if u.ndim != 3:
        raise ValueError(f"u must have 3 axes [B, T, E], got {list(u.shape)}")
    if A.ndim != 2 or A.shape[0] != u.shape[2] or 0 in A.shape:
        raise ValueError(f"A must have shape [{u.shape[2]}, N], neither of them 0, got {list(A.shape)}")
    batch, T, E = u.shape
    N = A.shape[1]
    allowed = {
        "delta": (delta, (batch, T, E), (E,)),
        "A": (A, (E, N)),
        "B": (B, (batch, T, N), (N,)),
        "C": (C, (batch, T, N), (N,)),
        "D": (D, (E,)),
        "z": (z, (batch, T, E)),
        "initial_state": (state, (batch, E, N)),
    }
    for name, (x, *shapes) in allowed.items():
        if x is None and name in ("D", "z", "initial_state"):
            continue
        _check_float(name, x)
        if tuple(x.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must have shape {expected}, got {list(x.shape)}")
        if x.device != u.device:
            raise ValueError(f"{name} must be on u's device {u.device}, got {x.device}")
        if x.dtype == torch.float64 != u.dtype:
            raise TypeError(f"{name} may be float64 only where u is, got u {_name(u)}")
    if state is not None and state.dtype != accumulator(u):
        wanted = str(accumulator(u)).removeprefix("torch.")
        raise TypeError(f"initial_state must be {wanted} where u is {_name(u)}, got {_name(state)}")
    if u.is_cuda or torch.compiler.is_compiling():
        return
    if (A > 0).any():
        raise ValueError(f"A must be at most 0, for delta · A is a log-decay, got {A.max().item():g}")
    if (delta < 0).any():
        raise ValueError(f"delta must be at least 0, for delta · A is a log-decay, got {delta.min().item():g}")


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {_name(x)}")


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")

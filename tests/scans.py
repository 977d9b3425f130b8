"""What the tests of selective_scan share: strided cases, the plain loop, groups short enough to interpret."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, to_numpy

from causalattn.reference.selective_scan import selective_scan as reference
from causalattn.selective_scan import backward, forward, groups

SHORT = 8
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "initial_state")


@pytest.fixture
def short_groups(monkeypatch):
    """Groups of SHORT tokens, so that a few tokens are several groups."""
    for module in (groups, forward, backward):
        monkeypatch.setattr(module, "GROUP", SHORT)


def make_case(B, T, E, N, dtype=torch.float32, seed=0, *, options="D z initial_state", step=1.0, strided=True):
    """The arguments by name: rates of 0.05 … 4, steps of 0 … step; strided ones share no layout."""
    generator = torch.Generator().manual_seed(seed)

    def random(make, *shape, wide=torch.float32):
        return make(*shape, generator=generator).to(DEVICE, torch.promote_types(dtype, wide))

    case = {
        "u": random(torch.randn, B, E, T, wide=dtype).mT,
        "delta": random(torch.rand, B, T, 2 * E, wide=dtype)[..., ::2] * step,
        "A": -torch.exp(random(torch.rand, N, E) * 4.4 - 3).mT,
        "D": random(torch.randn, 2 * E)[::2],
        "z": random(torch.randn, B, T, E + 3, wide=dtype)[..., 3:] * 2,
        "initial_state": random(torch.randn, B, N, E).mT,
    }
    case["B"], case["C"] = random(torch.randn, B, T, 2 * N + 1, wide=dtype)[..., 1:].split(N, -1)
    if not strided:
        case = {name: x.contiguous() for name, x in case.items()}
    return {name: case[name] for name in NAMES if name not in NAMES[5:] or name in options}


def tokens(case, start, stop):
    """The case cut to some of its tokens."""
    cut = ("u", "delta", "B", "C", "z")
    return {name: x[:, start:stop] if name in cut and x.ndim == 3 else x for name, x in case.items()}


def plain_scan(u, delta, A, B, C, D=None, z=None, *, initial_state=None, discretization="zoh", dtype=None):
    """out and the last state as a loop of eager torch gives them, in float32 (float64) or in dtype."""
    dtype = dtype or torch.promote_types(u.dtype, torch.float32)
    kept = u.dtype
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = [torch.zeros_like(u[:, 0])] if u.shape[1] == 0 else []
    for t in range(u.shape[1]):
        x = delta[:, t, :, None] * A
        held = torch.expm1(x) / A if discretization == "zoh" else delta[:, t, :, None]
        h = x.exp() * h + held * B[:, t, None] * u[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype))
    return y.to(kept), h


def expected_of(case, discretization="zoh"):
    return reference(**{name: to_numpy(x) for name, x in case.items()}, discretization=discretization)


def cancellation(case, discretization="zoh"):
    """How many roundings of each result one rounding of its summands may be."""
    sizes = {name: x if name in ("A", "z") else x.abs() for name, x in case.items()}
    pairs = zip(expected_of(sizes, discretization), expected_of(case, discretization), strict=True)
    return [2 + np.abs(size).max(initial=0) / max(np.abs(x).max(initial=0), 1e-30) for size, x in pairs]

"""selective_scan against mamba-ssm and a loop over tokens."""

import functools

import peers
import pytest
import torch
from cases import DEVICE, DTYPE, OURS, unmeasured

import causalattn as ca
from causalattn.reference.selective_scan import selective_scan as reference

TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2
# (B, T, E), 16 states a channel
if DEVICE == "cuda":
    SHAPES = [(1, T, 4096) for T in (512, 4096, 32768, 262144)] + [(16, 4096, 4096)]
else:
    SHAPES = [(1, T, 256) for T in (512, 4096, 32768)] + [(8, 512, 256)]
LOOP = 4096
FORWARD = {
    OURS: lambda *tensors: ca.selective_scan(*tensors, discretization="euler").out,
    "mamba-ssm": peers.mamba,
    "torch loop": peers.scan_loop,
}


@functools.lru_cache(1)
def case(shape):
    B, T, E = shape
    generator = torch.Generator(DEVICE).manual_seed(T)
    u, delta = (torch.randn(B, T, E, generator=generator, device=DEVICE) for _ in range(2))
    b, c = (torch.randn(B, T, 16, generator=generator, device=DEVICE) for _ in range(2))
    A = -torch.arange(1.0, 17.0, device=DEVICE).expand(E, 16).contiguous()
    step = torch.nn.functional.softplus(delta - 3)
    u, step, b, c = (x.to(DTYPE) for x in (u, step, b, c))
    return u, step, A, b, c


@functools.lru_cache(1)
def exact(shape):
    """The first eight channels in float64, a token at a time."""
    u, delta, A, B, C = (x.double().cpu().numpy() for x in case(shape))
    return torch.from_numpy(reference(u[:1, :, :8], delta[:1, :, :8], A[:8], B[:1], C[:1], discretization="euler")[0])


def amount(u, delta, A, B, C):
    """A multiply-add for the state and one for out, an exponential a state; u, Δ, B and C once and out once."""
    states = u.numel() * A.shape[1]
    return {"flops": 6 * states, "exps": states, "moved": 2 * u.nbytes + delta.nbytes + B.nbytes + C.nbytes}


@pytest.mark.parametrize("peer", FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-T{}-E{}".format(*shape))
def test_selective_scan(measure, shape, peer):
    tensors = case(shape)
    if peer == "torch loop" and shape[1] > LOOP:
        unmeasured("selective scan", peer, tensors[0], "too long, not run")
        return

    def check(result):
        expected = exact(shape)
        error = (result[:1, :, :8].double().cpu() - expected).abs().max()
        assert error < TOLERANCE * expected.abs().max()

    measure("selective scan", peer, FORWARD[peer], *tensors, **amount(*tensors), check=check)


def gradients(scan, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(scan(*leaves), leaves, tensors[0])


@pytest.mark.parametrize("peer", [OURS, "mamba-ssm"])
@pytest.mark.parametrize("shape", SHAPES[1:2], ids=lambda shape: "B{}-T{}-E{}".format(*shape))
def test_selective_scan_backward(measure, shape, peer):
    tensors = case(shape)

    def check(result):
        u, delta, A, B, C = (x[:1, -512:].double() if x.ndim == 3 else x.double() for x in tensors)
        # earlier tokens change nothing of du
        expected = gradients(peers.scan_loop, u, delta, A, B, C)[0]
        error = (result[0][:1, -512:].double() - expected).abs().max()
        assert error < 10 * TOLERANCE * expected.abs().max()

    work = amount(*tensors)
    work = {"flops": 5 * work["flops"], "exps": 2 * work["exps"], "moved": 3 * work["moved"]}
    measure(
        "selective scan + gradients", peer, functools.partial(gradients, FORWARD[peer]), *tensors, **work, check=check
    )

"""linear_attention against softmax attention, fla and a loop over tokens, of one text and at a constant B·T."""

import functools

import peers
import pytest
import torch
from cases import DEVICE, OURS, inputs, unmeasured

import causalattn as ca
from causalattn.reference.linear_attention import linear_attention as reference

TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2
if DEVICE == "cuda":
    # (B, heads, T, D)
    ONE = [(1, 32, T, D) for D in (64, 128) for T in (512, 1024, 4096, 32768, 262144)] + [(1, 16, 32768, 256)]
    CONSTANT = [(65536 // T, 16, T, 128) for T in (512, 1024, 4096, 16384)]
    TRAINED = ONE[1:3] + CONSTANT[:1]
    LONGEST = {"SDPA causal": 131072, "torch loop": 4096}
else:
    ONE = [(1, 4, T, 64) for T in (256, 512, 1024, 4096, 16384, 65536)]
    ONE += [pytest.param((1, 4, 262144, 64), marks=pytest.mark.long)]
    CONSTANT = [(16384 // T, 4, T, 64) for T in (512, 2048)]
    TRAINED = [(1, 4, 4096, 64), (1, 4, 16384, 64), CONSTANT[0]]
    LONGEST = {"SDPA causal": 16384, "torch loop": 16384}
DECAYS = pytest.mark.parametrize("decay", ["none", "step", "feature"])


def ours(q, k, v, decay):
    plain = {"feature_map": "identity", "normalize": False} if decay is not None else {}
    return ca.linear_attention(q, k, v, decay=decay, **plain).out


def softmax(q, k, v, decay):
    return peers.sdpa_forward(q, k, v, True)


FORWARD = {OURS: ours, "SDPA causal": softmax, "fla": peers.fla, "torch loop": peers.linear_loop}


@functools.lru_cache(1)
def case(shape, decay):
    """q, k, v and the log-decays, a twentieth a step on average."""
    B, H, T, D = shape
    q, k, v = inputs(H, T, D, B)
    size = {"none": None, "step": (B, H, T), "feature": (B, H, T, D)}[decay]
    return q, k, v, None if size is None else -torch.rand(size, device=DEVICE) / 10


@functools.lru_cache(1)
def exact(shape, decay):
    """The first head in float64, a token at a time."""
    arrays = [None if x is None else x[:1, :1].double().cpu().numpy() for x in case(shape, decay)]
    plain = {"feature_map": "identity", "normalize": False} if decay != "none" else {}
    return torch.from_numpy(reference(*arrays[:3], decay=arrays[3], **plain)[0])


def amount(q, k, v, decay, products):
    """Of forward: 4·D·V FLOPs a token and one reading of q, k, v and the decays and one writing of out."""
    moved = q.nbytes + k.nbytes + 2 * v.nbytes + (0 if decay is None else decay.nbytes)
    return {"flops": products * 2 * q.numel() * v.shape[3], "moved": moved}


@pytest.mark.parametrize("peer", FORWARD)
@DECAYS
@pytest.mark.parametrize("shape", ONE + CONSTANT, ids=lambda shape: "B{}-H{}-T{}-D{}".format(*shape))
def test_linear_attention(measure, shape, decay, peer):
    if peer == "SDPA causal" and decay != "none":
        pytest.skip("softmax attention knows no decay")
    tensors = case(shape, decay)
    name = "linear attention" + f" decayed a {decay}" * (decay != "none")
    if shape[2] > LONGEST.get(peer, shape[2]):
        unmeasured(name, peer, tensors[0], "too long, not run")
        return

    def check(result):
        expected = exact(shape, decay)
        error = (result[:1, :1].double().cpu() - expected).abs().max()
        assert error < TOLERANCE * expected.abs().max()

    measure(name, peer, FORWARD[peer], *tensors, **amount(*tensors, 2), check=None if peer == "SDPA causal" else check)


def gradients(attend, *tensors):
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return torch.autograd.grad(out, [x for x in leaves if x is not None], tensors[2])


@pytest.mark.parametrize("peer", [OURS, "SDPA causal", "fla"])
@DECAYS
@pytest.mark.parametrize("shape", TRAINED, ids=lambda shape: "B{}-H{}-T{}-D{}".format(*shape))
def test_linear_attention_backward(measure, shape, decay, peer):
    if peer == "SDPA causal":
        if decay != "none":
            pytest.skip("softmax attention knows no decay")
        tensors = case(shape, decay)[:3]
        tensors = (*tensors, None)
    else:
        tensors = case(shape, decay)
    q, k, v, g = tensors

    def check(result):
        leaves = [None if x is None else x[:1, :1, :2048].double() for x in tensors]
        # later tokens change nothing of dq
        expected = gradients(peers.linear_loop, *leaves)[0]
        error = (result[0][:1, :1, :2048].double() - expected).abs().max()
        assert error < 10 * TOLERANCE * expected.abs().max()

    name = "linear attention + gradients" + f" decayed a {decay}" * (decay != "none")
    work = amount(q, k, v, g, 8)
    # forward once more, dout and three gradients
    work["moved"] = 2 * work["moved"] + q.nbytes + k.nbytes + v.nbytes
    function = functools.partial(gradients, FORWARD[peer])
    measure(name, peer, function, *tensors, **work, check=None if peer == "SDPA causal" else check)

"""attention, its gradients, its probabilities, rows, top-k and map against SDPA, FlexAttention and eager torch."""

import peers
import pytest
import torch
from cases import DEVICE, OURS, SHORT, add_bandwidth, first_head, inputs, name_of, some_rows, work
from torch.nn.attention import SDPBackend

import causalattn as ca

TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
if DEVICE == "cuda":
    BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    ROWS_OF = [(32, T, D) for D in (64, 128) for T in (4096, 32768)]
    TOPK = [(shape, n) for shape in SHORT for n in (16, 128)] + [((32, 32768, 128), 16)]
else:
    BACKENDS = ("FLASH_ATTENTION", "MATH")
    ROWS_OF = [(4, T, 64) for T in (4096, 32768)]
    TOPK = [(ROWS_OF[0], n) for n in (16, 128)]
    TOPK += [pytest.param(ROWS_OF[1], n, marks=pytest.mark.long) for n in (16, 128)]


def assert_close(result, expected):
    """Compare with float64 heads, of which result may have more."""
    error = (result[:, : expected.shape[1]].double() - expected).abs().max()
    assert error < TOLERANCE * expected.abs().max()


def ours(q, k, v, causal):
    return ca.attention(q, k, v, causal=causal).out


FORWARD = {OURS: ours, "eager torch": peers.eager_attention, "FlexAttention": peers.flex}
FORWARD |= {f"SDPA {name}": peers.sdpa(SDPBackend.__members__[name]) for name in BACKENDS}


@pytest.mark.parametrize("peer", FORWARD)
@MASKS
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_attention(measure, shape, causal, peer):
    q, k, v = inputs(*shape)
    needs = peers.eager_bytes(q, k) if peer == "eager torch" else 0

    def check(result):
        assert_close(result, peers.eager_attention(*first_head(q, k, v), causal))

    measure(
        "attention" + " causal" * causal, peer, FORWARD[peer], q, k, v, causal,
        **work(q, k, 2, causal=causal, moved=2 * v.nbytes), needs=needs, check=check,
    )  # fmt: skip


GRADIENTS = {
    OURS: ours,
    "eager torch": peers.eager_attention,
    "SDPA": peers.sdpa_forward,
}


def gradients(attend, q, k, v, causal):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attend(*leaves, causal), leaves, q)


@pytest.mark.parametrize("peer", GRADIENTS)
@MASKS
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_attention_backward(measure, shape, causal, peer):
    q, k, v = inputs(*shape)
    needs = peers.eager_bytes(q, k, 4) if peer == "eager torch" else 0

    def check(result):
        expected = gradients(peers.eager_attention, *first_head(q, k, v), causal)
        for gradient, exact in zip(result, expected, strict=True):
            assert_close(gradient, exact)

    # two products forward; S, dP, dV, dK and dQ backward
    measure(
        "attention + gradients" + " causal" * causal, peer, lambda *args: gradients(GRADIENTS[peer], *args),
        q, k, v, causal, **work(q, k, 7, exps=2, causal=causal, moved=5 * v.nbytes), needs=needs, check=check,
    )  # fmt: skip


PROBS = {
    "plain write": peers.plain_write,
    OURS: lambda q, k, v, causal: ca.attention(q, k, v, causal=causal, return_probs=True)[::2],
    "eager torch": peers.eager_attention_probs,
}


# the write first: the others are compared with it
@pytest.mark.parametrize("peer", PROBS)
@MASKS
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_attention_probs(measure, shape, causal, peer):
    q, k, v = inputs(*shape)
    name, written = "attention with probs" + " causal" * causal, q.shape[1] * q.shape[2] ** 2 * q.element_size()
    if peer == "plain write":
        measure(name, peer, peers.plain_write, q, k, v, causal, flops=0)
        add_bandwidth(written, "plain write")
        return

    def check(result):
        for tensor, exact in zip(result, peers.eager_attention_probs(*first_head(q, k, v), causal), strict=True):
            assert_close(tensor, exact)

    needs = peers.eager_bytes(q, k) if peer == "eager torch" else 0
    amount = work(q, k, 2, causal=causal, moved=2 * v.nbytes + written)
    measure(name, peer, PROBS[peer], q, k, v, causal, **amount, needs=needs, check=check)
    add_bandwidth(written, "plain write")


CHOSEN = {OURS: ca.attention_rows, "eager torch": peers.eager_rows, "eager, those rows": peers.eager_chosen_rows}


@pytest.mark.parametrize("peer", CHOSEN)
@pytest.mark.parametrize("shape", ROWS_OF, ids=name_of)
def test_attention_rows(measure, shape, peer):
    q, k, _ = inputs(*shape)
    rows = some_rows(q)
    written = q.shape[1] * len(rows) * q.shape[2] * q.element_size()
    needs = peers.eager_bytes(q, k) if peer == "eager torch" else 0

    def check(result):
        assert_close(result, peers.eager_chosen_rows(*first_head(q, k), rows))

    amount = work(q[:, :, rows], k, 1, moved=written)
    measure("64 rows", peer, CHOSEN[peer], q, k, rows, **amount, needs=needs, check=check)


@pytest.mark.parametrize("peer", [OURS, "eager torch"])
@pytest.mark.parametrize(("shape", "n"), TOPK, ids=name_of)
def test_attention_topk(measure, shape, n, peer):
    q, k, _ = inputs(*shape)
    rows = some_rows(q)

    def check(result):
        values, indices = (x[:, :1, rows] for x in result)
        A = peers.eager_chosen_rows(*first_head(q, k), rows)
        assert_close(values, A.topk(n).values)
        assert_close(values, A.gather(-1, indices.long()))

    function, needs = ca.attention_topk, 0
    if peer != OURS:
        function, needs = peers.eager_topk, peers.eager_bytes(q, k)
    # a value and an index of four bytes each
    amount = work(q, k, 1, moved=8 * n * q.shape[1] * q.shape[2])
    measure(f"top-k n={n}", peer, function, q, k, n, **amount, needs=needs, check=check)


@pytest.mark.parametrize("peer", [OURS, "eager torch"])
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_attention_map(measure, shape, peer):
    q, k, _ = inputs(*shape)

    def check(result):
        for pooled, exact in zip(result, peers.eager_map(*first_head(q, k), 128), strict=False):
            assert_close(pooled, exact)

    function, needs = ca.attention_map, 0
    if peer != OURS:
        function, needs = peers.eager_map, peers.eager_bytes(q, k)
    # a pass for each row's sum and one that pools
    measure("map of 128 cells", peer, function, q, k, 128, **work(q, k, 2, exps=2), needs=needs, check=check)

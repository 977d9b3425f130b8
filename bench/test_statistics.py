"""dag_score, statistics and their gradients against eager torch, SDPA's forward and the stock-kernel identities."""

import functools

import peers
import pytest
import torch
from cases import DEVICE, LONG, OURS, SHORT, first_head, inputs, name_of, some_rows, unmeasured, work

import causalattn as ca
from causalattn.statistics import ROW_STATISTICS

if DEVICE == "cuda":
    CAUSAL = [(32, 16384, 64), (32, 16384, 128), (32, 131072, 128)]
    BACKWARD = SHORT
    HEAD_SET = LONG
else:
    CAUSAL, BACKWARD = [(4, 4096, 64)], [(4, 1024, 64), (4, 2048, 64)]
    HEAD_SET = [*LONG, pytest.param((4, 131072, 64), marks=pytest.mark.long)]


def exact_rows(q, k):
    """A in float64, 256 rows at a time."""
    q, k = q.double(), k.double()
    for rows in q.split(256, 2):
        yield torch.softmax(rows @ k.mT * q.shape[-1] ** -0.5, -1)


@functools.cache
def exact_dag_score(*shape):
    """The first head's, [1, 1]."""
    q, k, _ = first_head(*inputs(*shape))
    below = sum(A.tril(256 * i - 1).sum((-1, -2)) for i, A in enumerate(exact_rows(q, k)))
    return below / q.shape[2]


@functools.cache
def exact_received(*shape):
    q, k, _ = first_head(*inputs(*shape))
    return sum(A.sum(-2) for A in exact_rows(q, k))


def exact_entropy(q, k, rows, causal):
    x = q[:, :, rows].double() @ k.double().mT * q.shape[-1] ** -0.5
    if causal:
        x.masked_fill_(rows[:, None] < torch.arange(k.shape[2], device=k.device), -torch.inf)
    return torch.special.entr(torch.softmax(x, -1)).sum(-1)


def assert_near(result, expected, *, absolute=0.0, relative=0.0):
    """Compare with float64 heads, of which result may have more."""
    error = (result[:, : expected.shape[1]].double() - expected).abs().max()
    assert error < absolute + relative * expected.abs().max()


def rounding(peer, ours, low):
    """The tolerance of causalattn and of all float32 peers, and that of the others in 16 bits."""
    return ours if peer == OURS or DEVICE == "cpu" else low


def row_statistics(q, k, causal=False):
    return ca.attention_stats(q, k, want=ROW_STATISTICS, causal=causal)


DAG_SCORES = {
    OURS: ca.dag_score,
    "eager torch": peers.eager_dag_score,
    "stock kernel, two lse": peers.stock_dag_score,
}


@pytest.mark.parametrize("peer", [*DAG_SCORES, "SDPA forward"])
@pytest.mark.parametrize("shape", LONG, ids=name_of)
def test_dag_score(measure, shape, peer):
    q, k, v = inputs(*shape)
    if peer == "SDPA forward":
        measure("dag_score", peer, peers.sdpa_forward, q, k, v, False, **work(q, k, 2, moved=2 * v.nbytes))
        return

    def check(result):
        assert_near(result, exact_dag_score(*shape), absolute=rounding(peer, 1e-5, 1e-2))

    needs = peers.eager_bytes(q, k) if peer == "eager torch" else 0
    measure("dag_score", peer, DAG_SCORES[peer], q, k, **work(q, k, 1), needs=needs, check=check)


ENTROPIES = {
    OURS: lambda q, k, causal: row_statistics(q, k, causal).entropy,
    "eager torch": lambda q, k, causal: peers.eager_row_statistics(q, k, causal)["entropy"],
    "stock kernel, V = k": peers.stock_entropy,
}


def measure_entropy(measure, operator, shape, causal, peer):
    q, k, v = inputs(*shape)
    if peer == "SDPA forward":
        amount = work(q, k, 2, causal=causal, moved=2 * v.nbytes)
        measure(operator, peer, peers.sdpa_forward, q, k, v, causal, **amount)
        return
    rows = some_rows(q)

    def check(result):
        # the identity subtracts two large numbers, one of them rounded
        assert_near(result[:, :, rows], exact_entropy(q, k, rows, causal), absolute=rounding(peer, 1e-4, 0.3))

    needs = peers.eager_bytes(q, k) if peer == "eager torch" else 0
    measure(operator, peer, ENTROPIES[peer], q, k, causal, **work(q, k, 1, causal=causal), needs=needs, check=check)


@pytest.mark.parametrize("peer", [*ENTROPIES, "stock kernel, lse at 2s", "SDPA forward"])
@pytest.mark.parametrize("shape", HEAD_SET, ids=name_of)
def test_row_statistics(measure, shape, peer):
    if shape[1] > 32768 and peer.startswith("stock"):
        unmeasured("row statistics", peer, inputs(*shape)[0], "too long, not run")
        return
    if peer != "stock kernel, lse at 2s":
        measure_entropy(measure, "row statistics", shape, False, peer)
        return
    q, k, _ = inputs(*shape)
    rows = some_rows(q)
    expected = peers.eager_chosen_rows(q.double(), k.double(), rows).square().sum(-1)

    def check(result):
        assert_near(result[:, :, rows], expected, relative=rounding(peer, 1e-4, 2e-2))

    measure("row statistics", peer, peers.stock_sum_sq, q, k, **work(q, k, 4, exps=2), check=check)


@pytest.mark.parametrize("peer", [*ENTROPIES, "SDPA forward"])
@pytest.mark.parametrize("shape", CAUSAL, ids=name_of)
def test_causal_row_statistics(measure, shape, peer):
    measure_entropy(measure, "row statistics causal", shape, True, peer)


RECEIVED = {
    OURS: lambda q, k: ca.attention_stats(q, k, want="received").received,
    "stock kernel, dV": peers.stock_received,
    "flash-colreduce": peers.colreduce,
}


@pytest.mark.parametrize("peer", RECEIVED)
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_received(measure, shape, peer):
    q, k, _ = inputs(*shape)

    def check(result):
        assert_near(result, exact_received(*shape), relative=rounding(peer, 1e-4, 2e-2))

    # a pass for each row's sum and one for the columns
    measure("received", peer, RECEIVED[peer], q, k, **work(q, k, 2, exps=2), check=check)


@pytest.mark.parametrize("peer", [OURS, "eager torch"])
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_asymmetry(measure, shape, peer):
    q, k, _ = inputs(*shape)

    def check(result):
        result = result._asdict() if peer == OURS else result
        # torch's float32 norm of 16 million numbers loses three digits
        for name, exact in peers.eager_asymmetry(*first_head(q, k)).items():
            assert_near(result[name], exact, relative=1e-4 if peer == OURS else 5e-2)

    function, needs = ca.asymmetry, 0
    if peer != OURS:
        function, needs = peers.eager_asymmetry, peers.eager_bytes(q, k, 4)
    # a pass for each row's sum and one over pairs of tiles
    measure("asymmetry", peer, function, q, k, **work(q, k, 2, exps=2), needs=needs, check=check)


def entropy_received(q, k):
    stats = ca.attention_stats(q, k, want=("entropy", "received"))
    return stats.entropy, stats.received


def gradients(function, q, k):
    """Of Σ entropy + Σ received², which every A_ij has a part in."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    entropy, received = function(*leaves)
    return torch.autograd.grad(entropy.sum() + received.square().sum(), leaves)


@pytest.mark.parametrize("peer", [OURS, "eager torch"])
@pytest.mark.parametrize("shape", BACKWARD, ids=name_of)
def test_statistics_backward(measure, shape, peer):
    q, k, _ = inputs(*shape)

    def check(result):
        expected = gradients(peers.eager_entropy_received, *first_head(q, k))
        for gradient, exact in zip(result, expected, strict=True):
            assert_near(gradient, exact, relative=1e-4 if DEVICE == "cpu" else 5e-2)

    function, needs = entropy_received, 0
    if peer != OURS:
        function, needs = peers.eager_entropy_received, peers.eager_bytes(q, k, 6)
    # forward as for received; backward the sum of A ∘ G over each row, then S, dq and dk
    amount = work(q, k, 6, exps=4, moved=q.nbytes + k.nbytes)
    measure("statistics + gradients", peer, lambda q, k: gradients(function, q, k), q, k,
            **amount, needs=needs, check=check)  # fmt: skip

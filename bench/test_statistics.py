"""dag_score and the row statistics against eager torch, SDPA's forward and the stock-kernel identities."""

import peers
import pytest
import torch
import torch.nn.functional as F
from cases import LENGTHS, inputs, unmeasured

import causalattn as ca
from causalattn.statistics import ROW_STATISTICS

EAGER_LIMIT = 16384
SAMPLED = 64


def exact_dag_score(q, k):
    """float64, a block of rows at a time."""
    q, k = q.double(), k.double()
    below = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    for m in range(0, q.shape[2], 256):
        A = torch.softmax(q[:, :, m : m + 256] @ k.mT * q.shape[-1] ** -0.5, -1)
        below += A.tril(m - 1).sum((-1, -2))
    return below / q.shape[2]


def exact_entropy(q, k, rows):
    A = torch.softmax(q[:, :, rows].double() @ k.double().mT * q.shape[-1] ** -0.5, -1)
    return torch.special.entr(A).sum(-1)


def exact_received(q, k):
    """float64, a block of rows at a time."""
    q, k = q.double(), k.double()
    blocks = q.split(256, 2)
    return sum(torch.softmax(rows @ k.mT * q.shape[-1] ** -0.5, -1).sum(-2) for rows in blocks)


def row_statistics(q, k):
    return ca.attention_stats(q, k, want=ROW_STATISTICS)


DAG_SCORES = {
    "causalattn": ca.dag_score,
    "eager torch": peers.eager_dag_score,
    "stock kernel, two lse": peers.stock_dag_score,
}


@pytest.mark.parametrize("peer", [*DAG_SCORES, "SDPA forward"])
@pytest.mark.parametrize("T", LENGTHS)
def test_dag_score(measure, T, peer):
    q, k, v = inputs(T)
    flops = 2 * q.shape[1] * T * T * q.shape[3]
    if peer == "SDPA forward":
        measure("dag_score", peer, F.scaled_dot_product_attention, q, k, v, flops=2 * flops)
    elif peer == "eager torch" and T > EAGER_LIMIT:
        unmeasured("dag_score", peer, q, "estimated, not run", peak_mib=peers.eager_bytes(q, k) / 2**20)
    else:
        expected = exact_dag_score(q, k) if T <= 4096 else None

        def check(result):
            assert expected is None or (result - expected).abs().max() < 1e-5

        measure("dag_score", peer, DAG_SCORES[peer], q, k, flops=flops, check=check)


ENTROPIES = {
    "causalattn": lambda q, k: row_statistics(q, k).entropy,
    "eager torch": lambda q, k: peers.eager_row_statistics(q, k)["entropy"],
    "stock kernel, V = k": peers.stock_entropy,
}


@pytest.mark.parametrize("peer", [*ENTROPIES, "stock kernel, lse at 2s", "SDPA forward"])
@pytest.mark.parametrize("T", LENGTHS)
def test_row_statistics(measure, T, peer):
    q, k, v = inputs(T)
    flops = 2 * q.shape[1] * T * T * q.shape[3]
    rows = torch.arange(0, T, T // SAMPLED, device=q.device)
    if peer == "SDPA forward":
        measure("row statistics", peer, F.scaled_dot_product_attention, q, k, v, flops=2 * flops)
    elif peer == "stock kernel, lse at 2s":
        measure("row statistics", peer, peers.stock_sum_sq, q, k, flops=4 * flops)
    elif peer == "eager torch" and T > EAGER_LIMIT // 2:
        unmeasured("row statistics", peer, q, "estimated, not run", peak_mib=peers.eager_bytes(q, k) / 2**20)
    else:
        expected = exact_entropy(q, k, rows)

        def check(result):
            assert (result[:, :, rows] - expected).abs().max() < (1e-4 if q.dtype == torch.float32 else 0.1)

        measure("row statistics", peer, ENTROPIES[peer], q, k, flops=flops, check=check)


@pytest.mark.parametrize("peer", ["causalattn", "stock kernel, dV"])
@pytest.mark.parametrize("T", LENGTHS[:2])
def test_received(measure, T, peer):
    q, k, _ = inputs(T)
    expected = exact_received(q, k)

    def check(result):
        assert (result - expected).abs().max() < (1e-4 if q.dtype == torch.float32 else 2e-2) * expected.max()

    function = {"causalattn": lambda q, k: ca.attention_stats(q, k, want="received").received}.get(
        peer, peers.stock_received
    )
    measure("received", peer, function, q, k, flops=4 * q.shape[1] * T * T * q.shape[3], check=check)

"""C = A Aᵀ from q and k: beside the product of an A that is stored already, and beside forming A first."""

import peers
import pytest
import torch
from cases import DEVICE, OURS, SHORT, first_head, inputs, name_of, some_rows

import causalattn as ca

DTYPES = {"float64": torch.float64, "float32": torch.float32}
PEERS = [OURS, "matmul of a stored A", "A formed, then matmul"]
CAUSAL = [False, True]


def amount(q, k, causal):
    """FLOPs of the products above the diagonal, over the keys that both rows may attend."""
    B, H, T, _ = q.shape
    return B * H * T * T * k.shape[2] * (1 / 3 if causal else 1 / 2) * 2


def near(result, q, k, causal, dtype):
    """Some rows of the first head."""
    rows = some_rows(q)
    A = peers.eager_probs(*first_head(q, k), causal)[0, 0]
    expected = A[rows] @ A.T
    tolerance = 1e-5 if dtype == torch.float64 or DEVICE == "cpu" else 1e-4
    assert (result[0, 0, rows].double() - expected).abs().max() < tolerance * expected.max()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("causal", CAUSAL, ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_covariance(measure, shape, dtype, causal, peer):
    q, k, _ = inputs(*shape)
    name = f"covariance {dtype}{' causal' if causal else ''}"
    dtype = DTYPES[dtype]

    def ours(q, k):
        return ca.attention_covariance(q, k, causal=causal, dtype=dtype)

    def formed(q, k):
        A = peers.eager_probs(q.float(), k.float(), causal).to(dtype)
        return A @ A.mT

    function, needs = ours if peer == OURS else formed, 0
    if peer != OURS:
        needs = q.shape[1] * q.shape[2] * k.shape[2] * (2 * 4 + 2 * dtype.itemsize)
    if peer == "matmul of a stored A":
        A = peers.eager_probs(q.float(), k.float(), causal).to(dtype)

        def function(q, k):
            return A @ A.mT

    def check(result):
        near(result, q, k, causal, dtype)

    measure(name, peer, function, q, k, flops=amount(q, k, causal), needs=needs, check=check)


@pytest.mark.parametrize("peer", [OURS, "A formed, then matmul"])
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_correlation_of_some_tokens(measure, shape, peer):
    """128 tokens of the sequence, as a discovery takes them."""
    q, k, _ = inputs(*shape)
    tokens = torch.arange(0, q.shape[2], q.shape[2] // 128, device=q.device)

    def ours(q, k):
        return ca.attention_correlation(q, k, tokens=tokens, mask=ca.full())

    def formed(q, k):
        A = peers.eager_probs(q[:, :, tokens].float(), k.float(), False).double()
        C = A @ A.mT
        deviation = C.diagonal(dim1=-2, dim2=-1).sqrt()
        return C / (deviation[..., :, None] * deviation[..., None, :])

    flops = q.shape[1] * 128 * 128 * k.shape[2]
    measure("correlation of 128 tokens", peer, ours if peer == OURS else formed, q, k, flops=flops)

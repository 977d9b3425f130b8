"""attention (out and lse) against SDPA's forward and eager torch."""

import peers
import pytest
import torch
import torch.nn.functional as F
from cases import LENGTHS, inputs

import causalattn as ca

PEERS = {
    "causalattn": lambda q, k, v, causal: ca.attention(q, k, v, causal=causal).out,
    "SDPA forward": lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    "eager torch": lambda q, k, v, causal: peers.eager_probs(q, k, causal).to(v.dtype) @ v,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("T", LENGTHS[:2])
def test_attention(measure, T, causal, peer):
    q, k, v = inputs(T)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)

    def check(result):
        assert (result - expected).abs().max() < (1e-5 if q.dtype == torch.float32 else 2e-2)

    flops = 4 * q.shape[1] * T * T * q.shape[3] / (2 if causal else 1)
    measure("attention" + " causal" * causal, peer, PEERS[peer], q, k, v, causal, flops=flops, check=check)

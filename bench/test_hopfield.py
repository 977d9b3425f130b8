"""hopfield_retrieve of 1,024 queries against attention of that shape, SDPA, and torch that forms the associations."""

import functools

import peers
import pytest
import torch
from cases import DEVICE, DTYPE, OURS

import causalattn as ca

TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2
QUERIES, D = 1024, 64
BETA = D**-0.5
STORED = [1024, 16384, 262144, 1048576] + [10_000_000] * (DEVICE == "cuda")


def ours(patterns, state):
    return ca.hopfield_retrieve(state, patterns, beta=BETA).state


def attention(patterns, state):
    return ca.attention(state[None, None], patterns[None, None], patterns[None, None], scale=BETA).out[0, 0]


FORMED = "hflayers style, associations formed"
PEERS = {
    OURS: ours,
    "causalattn attention": attention,
    FORMED: peers.eager_hopfield,
    "SDPA": peers.sdpa_hopfield,
}


@functools.lru_cache(1)
def case(N):
    """Patterns, and states that are some of them under noise."""
    generator = torch.Generator(DEVICE).manual_seed(N)
    patterns = torch.randn(N, D, generator=generator, device=DEVICE, dtype=DTYPE)
    noise = torch.randn(QUERIES, D, generator=generator, device=DEVICE, dtype=DTYPE)
    return patterns, patterns[:: N // QUERIES][:QUERIES] + noise / 2


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("N", STORED)
def test_hopfield_retrieve(measure, N, peer):
    patterns, state = case(N)

    def check(result):
        expected = peers.eager_hopfield(patterns.double(), state[:8].double())
        assert (result[:8].double() - expected).abs().max() < TOLERANCE * expected.abs().max()

    scores = QUERIES * N
    measure(
        "hopfield retrieve", peer, PEERS[peer], patterns, state,
        flops=4 * scores * D, exps=scores, moved=patterns.nbytes + 2 * state.nbytes,
        needs=2 * 4 * scores if peer == FORMED else 0, check=check,
    )  # fmt: skip

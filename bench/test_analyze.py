"""Statistics of every head of a 6-layer encoder: `analyze`, and transformers with output_attentions, eager."""

import functools

import pytest
import torch
from cases import DEVICE, OURS

import causalattn as ca

transformers = pytest.importorskip("transformers")

LENGTHS = (512, 2048, 4096, 8192, pytest.param(32768, marks=pytest.mark.long))
LONGEST = 32768
LAYERS, HEADS, WIDTH = 6, 12, 384
WANT = ("entropy", "sum_sq", "below", "received")


@functools.cache
def encoder():
    """MiniLM's shape with room for long texts, random weights."""
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        max_position_embeddings=LONGEST,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config).eval().to(DEVICE)


def ours(ids):
    layers = ca.analyze(encoder(), {"input_ids": ids}, want=WANT, null=False).layers
    return [getattr(stats, name) for stats in layers for name in WANT]


def eager(ids):
    """Every map of every layer is there at once, as output_attentions returns them."""
    model = encoder()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    return [x for A in maps for x in (torch.special.entr(A).sum(-1), A.square().sum(-1), A.tril(-1).sum(-1), A.sum(-2))]


@pytest.mark.parametrize("peer", [OURS, "transformers eager, output_attentions"])
@pytest.mark.parametrize("T", LENGTHS)
def test_analyze(measure, T, peer):
    ids = torch.randint(1000, (1, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    matrix = 4 * HEADS * T * T

    def check(result):
        if T == LENGTHS[0] and peer == OURS:
            for got, expected in zip(result, eager(ids), strict=True):
                expected = expected.cpu()
                assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()

    flops = LAYERS * T * (24 * WIDTH * WIDTH + 4 * T * WIDTH)
    function, needs = (ours, 0) if peer == OURS else (eager, (LAYERS + 3) * matrix)
    measure("analyze of 6 layers", peer, function, ids, flops=flops, needs=needs, check=check)

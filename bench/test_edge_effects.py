"""Every edge cut: beside one forward of attention, eager torch with the whole matrix, and a forward for each edge."""

import time

import peers
import pytest
import torch
from cases import DEVICE, LONG, OURS, SHORT, first_head, inputs, name_of, some_rows, unmeasured, work

import causalattn as ca

# of LONG what a sweep takes a minute for stands aside
SWEPT = LONG if DEVICE == "cuda" else [*SHORT, pytest.param((4, 16384, 64), marks=pytest.mark.long)]
TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2


def cut(q, k, v):
    return ca.edge_effects(q, k, v, want=("row", "column", "topk"))


def readout(q, k, v):
    return ca.edge_effects(q, k, v, measure="readout", readout=v, want=("row", "column", "topk"))


def forward(q, k, v):
    return ca.attention(q, k, v).out


def exact_rows(q, k, v, rows):
    """Σ_j p / (1 − p)·‖v_j − o_i‖ of some rows in float64."""
    A = peers.eager_chosen_rows(q, k, rows)
    return (A / (1 - A) * torch.cdist(A @ v, v)).sum(-1)


SWEEPS = {OURS: cut, "attention forward": forward, "eager, whole matrix": peers.eager_edge_effects}


@pytest.mark.parametrize("peer", SWEEPS)
@pytest.mark.parametrize("shape", SWEPT, ids=name_of)
def test_cut_of_every_edge(measure, shape, peer):
    q, k, v = inputs(*shape)
    rows = some_rows(q)
    needs = peers.eager_bytes(q, k, 4) if peer.startswith("eager") else 0

    def check(result):
        if peer != "attention forward":
            expected = exact_rows(*first_head(q, k, v), rows)
            error = (result[0][:, :1, rows].double() - expected).abs().max()
            assert error < TOLERANCE * expected.abs().max()

    # q·k and p·v, then q·k and o·v
    products = 2 if peer == "attention forward" else 4
    amount = work(q, k, products, exps=products // 2, moved=2 * v.nbytes)
    measure("cut of every edge", peer, SWEEPS[peer], q, k, v, **amount, needs=needs, check=check)


@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_cut_of_every_edge_by_a_forward_each(shape):
    q, k, v = inputs(*shape)
    forward(q, k, v)
    start = time.perf_counter()
    forward(q, k, v).sum().item()
    one = time.perf_counter() - start
    edges = q.shape[1] * q.shape[2] * k.shape[2]
    unmeasured(
        "cut of every edge", "a forward an edge", q, f"estimated: {edges} times {one:.3g} s", hours=one * edges / 3600
    )


@pytest.mark.parametrize("peer", [OURS, "attention forward"])
@pytest.mark.parametrize("shape", SHORT, ids=name_of)
def test_readout_of_every_edge(measure, shape, peer):
    q, k, v = inputs(*shape)
    rows = some_rows(q)

    def check(result):
        if peer == OURS:
            heads = first_head(q, k, v)
            A = peers.eager_chosen_rows(*heads[:2], rows)
            pull = heads[2][:, :, rows] @ heads[2].mT
            expected = (A / (1 - A) * (pull - (A * pull).sum(-1, keepdim=True))).abs().sum(-1)
            assert (result.row[:, :1, rows].double() - expected).abs().max() < TOLERANCE * expected.max()

    products = 4 if peer == OURS else 2
    amount = work(q, k, products, exps=products // 2, moved=(2 + (peer == OURS)) * v.nbytes)
    function = readout if peer == OURS else forward
    measure("readout of every edge", peer, function, q, k, v, **amount, check=check)

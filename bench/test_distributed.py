"""A sequence over 1 to 4 processes of one thread: time beside one process, what is sent beside the formula, errors."""

import pytest
import scaling
import torch
from cases import DEVICE, OURS, ROWS, case_of, inputs, quantile, versions
from processes import Ranks

import causalattn as ca

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="of processes on a CPU")

HEADS, TOKENS, D = 4, 8192, 64
OPERATORS = {"attention": "attention", "attention_stats": "row statistics", "linear_attention": "linear attention"}
WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def processes():
    started = Ranks(WORLDS[-1])
    yield started
    started.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_distributed(processes, name, world):
    q, k, v = inputs(HEADS, TOKENS, D)
    given = (q, k) if name == "attention_stats" else (q, k, v)
    options = {"want": ["entropy"]} if name == "attention_stats" else {"causal": True}
    if name == "attention":
        options["order"] = "zigzag"
    answers = processes.run(world, "timed", name, given, 3, **options)
    alone = getattr(ca, name)(*given, **{key: value for key, value in options.items() if key != "order"})
    field = "entropy" if name == "attention_stats" else "out"
    found = torch.cat([getattr(result, field) for result, _, _ in answers], 2)
    if name == "attention":
        runs = torch.arange(TOKENS).tensor_split(2 * world)
        found = found[:, :, torch.cat([runs[n] for r in range(world) for n in (r, -1 - r)]).argsort()]
    error = (found - getattr(alone, field)).abs().max()
    assert error < 1e-4 * getattr(alone, field).abs().max()
    size = scaling.Size(TOKENS, world, HEADS, HEADS, D, D, 4)
    sent = max(x.ring + x.gathered for _, x, _ in answers)
    if TOKENS % world == 0:
        volume = scaling.ring_bytes(OPERATORS[name], size) + scaling.gathered_bytes(OPERATORS[name], size)
        assert sent == volume
    # the slowest rank of each round
    times = [max(rounds) for rounds in zip(*(seconds for _, _, seconds in answers), strict=True)]
    ROWS.append({
        **case_of(f"distributed {OPERATORS[name]}", OURS if world == 1 else f"{world} processes", q),
        "ms": {f"p{p}": 1e3 * quantile(times, p / 100) for p in (20, 50, 80)},
        "sent_mib": sent / 2**20, "largest_error": error.item(), **versions(),
    })  # fmt: skip

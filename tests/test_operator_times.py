"""causalattn bench operators: both sides agree before they are timed, and what would not fit is not run."""

import json

import pytest
import torch
from test_cli import refused

from causalattn import cli, operator_times
from causalattn.operator_times import CASES, measure_operators, table


@pytest.fixture
def untimed(monkeypatch):
    """Every call made once, and counted."""
    calls = []

    def once(function, inputs):
        calls.append(function)
        function(*inputs)
        return 2.0 if len(calls) % 2 else 6.0

    monkeypatch.setattr(operator_times, "milliseconds", once)
    return calls


def test_every_operator_agrees_with_plain_torch(untimed):
    told = []
    result = measure_operators(256, heads=2, dim=16, device="cpu", progress=lambda *x: told.append(x))
    assert [row.name for row in result.rows] == [case[0] for case in CASES] and len(untimed) == 2 * len(CASES)
    assert told[0] == (0, len(CASES)) and told[-1] == (len(CASES), len(CASES))
    assert all(row.ratio == 3 for row in result.rows)
    lines = [*table(result)]
    assert lines[0].endswith("T = 256, 2 heads, D = 16, float32") and len(lines) == len(CASES) + 3
    assert lines[2].split()[-3:] == ["2.00", "6.00", "3.00"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_wrong_operator_is_not_timed(untimed, monkeypatch, number):
    name, ours, plain, whole = CASES[number]

    def shifted(q, k, v):
        return ours(q.roll(1, 2) if "tests" not in name else q, k, v) + (0.1 if "tests" in name else 0)

    # score_asymmetry does not see the order of queries alone
    monkeypatch.setattr(operator_times, "CASES", [(name, shifted, plain, whole)])
    with pytest.raises(RuntimeError, match="differs from plain torch by"):
        measure_operators(256, heads=1, dim=16, device="cpu")
    assert not untimed


def test_a_matrix_that_would_not_fit_is_not_formed(untimed, monkeypatch):
    monkeypatch.setattr(operator_times, "ROOM", 4 * 256 * 256 - 1)
    result = measure_operators(256, heads=1, dim=16, device="cpu")
    assert [row.plain is None for row in result.rows] == [whole for *_, whole in CASES]
    assert [line.split()[-1] == "run" for line in [*table(result)][2:-1]] == [whole for *_, whole in CASES]
    assert json.loads(result.to_json())["rows"][1]["plain"] is None


def test_the_command(untimed, capsys):
    assert cli.main(["bench", "operators", "--tokens", "256", "--heads", "1", "--dim", "16"]) == 0
    out = capsys.readouterr().out
    assert "attention, causal" in out and f"torch {torch.__version__}" in out
    assert cli.main(["bench", "operators", "--tokens", "256", "--heads", "1", "--dim", "16", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(CASES)
    assert refused(capsys, "bench", "operators", "--tokens", "255") == "T must be at least 256, got 255"

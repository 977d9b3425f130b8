"""causalattn analyze --distributed: under torchrun the first process prints what one process prints."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import save_checkpoint

from causalattn import cli

ROOT = Path(cli.__file__).parents[2]
SENTENCE = "Because the storm intensified , the ship finally sank . " * 3


@pytest.fixture(scope="module", params=[pytest.param("bert", marks=pytest.mark.full), "gpt2"])
def model(request, tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param))


def torchrun(processes, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, "-m", "causalattn", *argv], env=env, capture_output=True, encoding="utf-8")


def test_the_first_process_prints_what_one_would(model, capsys, tmp_path):
    page = tmp_path / "page.html"
    argv = ["analyze", "--model", model, "--text", SENTENCE, "--json"]
    done = torchrun(3, *argv, "--distributed", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert cli.main(argv) == 0
    found, alone = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert found["tokens"] == alone["tokens"] and len(found["rows"]) == len(alone["rows"])
    for row, other in zip(found["rows"], alone["rows"], strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert math.isclose(row[name], value, rel_tol=2e-3, abs_tol=2e-4), name
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_a_refusal_is_one_line_of_the_first_process(model):
    done = torchrun(2, "analyze", "--model", model, "--text", "storm storm", "--distributed")
    assert done.returncode == 1 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("causalattn: error: ")]
    assert said == ["causalattn: error: inputs must hold at least two tokens a rank, 4, got 2"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ([], "--distributed needs RANK, which torchrun sets: torchrun --nproc-per-node 4 -m causalattn analyze"),
        (["--figures", "out"], "--figures cannot be with --distributed"),
        (["--heads", "0"], "--heads cannot be with --distributed"),
    ],
)
def test_what_cannot_be_is_refused(model, option, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["analyze", "--model", model, "--text", SENTENCE, "--distributed", *option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"causalattn: error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

"""causalattn analyze --corpus: its line, its JSON, its progress and its refusals."""

import importlib.util
import io
import json
import sys

import pytest
import torch
from corpora import contents, rows_of, texts, write_jsonl
from test_cli import refused
from tiny_checkpoint import save_checkpoint

from causalattn import cli
from causalattn.console import Progress


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / "tinybert"))


@pytest.fixture
def command(bert, tmp_path):
    """Seven documents, one of them bad, by the names of another corpus."""
    lines = [{"body": text, "url": f"u{n}"} for n, text in enumerate(texts(6))]
    source = write_jsonl(tmp_path / "a.jsonl", [*lines, {"body": None, "url": "u6"}])
    fields = ["--text-field", "body", "--id-field", "url", "--documents-per-shard", "3"]
    return ["analyze", "--model", bert, "--corpus", str(source), *fields, "--out", str(tmp_path / "out")]


def test_one_line_says_what_there_is(command, tmp_path, capsys):
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "out"
    said = "documents: 6, skipped: 1, rows: 24, shards: 3 (0 were there), "
    assert out.startswith(said) and out.endswith(f" documents a second, in {folder}\n") and out.count("\n") == 1
    assert err == f"causalattn: why documents were skipped: {folder / '_part-*.json'}\n"
    assert [row["id"] for row in rows_of(folder)[::4]] == [f"u{n}" for n in range(6)]
    assert cli.main(command) == 0
    assert "shards: 3 (3 were there), 0.0 documents a second" in capsys.readouterr().out


def test_json_and_the_options_of_analyze(command, tmp_path, capsys):
    assert cli.main([*command, "--json", "--layers", "1", "--heads", "1", "--max-tokens", "2", "--long", "cut"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found | {"seconds": 0, "documents_per_second": 0} == {
        "out": str(tmp_path / "out"), "rank": 0, "world_size": 1, "documents": 6, "skipped": 1, "rows": 6, "shards": 3,
        "resumed": 0, "seconds": 0, "documents_per_second": 0,
    }  # fmt: skip
    assert {(row["layer"], row["head"]) for row in rows_of(tmp_path / "out")} == {(1, 1)}
    assert max(row["tokens"] for row in rows_of(tmp_path / "out")) == 2


def test_ranks_come_from_torchrun(command, tmp_path, capsys, monkeypatch):
    assert cli.main([*command[:-1], str(tmp_path / "whole")]) == 0
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cli.main([*command, "--distributed"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("rank 0 of 2: documents: 3, skipped: 1, rows: 12, shards: 2 (0")
    assert lines[1].startswith("rank 1 of 2: documents: 3, skipped: 0, rows: 12, shards: 1 (0")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_progress_and_throughput_are_shown_on_a_terminal(command, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(command) == 0
    assert "corpus:" in terminal.getvalue() and "0/7 documents" in terminal.getvalue()
    assert "7/7 documents, " in terminal.getvalue() and " a second" in terminal.getvalue()


def test_a_rate_counts_from_the_first_call(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("causalattn.console.time.monotonic", lambda: next(times))
    progress = Progress("corpus", "documents", rate=True)
    for done in (100, 103, 112):
        progress(done, 200)
    shown = [line.rstrip("\033[K") for line in terminal.getvalue().split("documents")[1:]]
    assert [line.split("\033")[0] for line in shown] == ["", ", 1.5 a second", ", 3.0 a second"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "a"], "not allowed with argument --corpus"),
        (["--html", "x.html"], "--html cannot be with --corpus"),
        (["--figures", "x"], "--figures cannot be with --corpus"),
        (["--distributed"], "--distributed needs RANK and WORLD_SIZE, as torchrun sets them"),
        (["--device", "sofa"], "--device sofa: "),
        (["--layers", "9"], "layers must be among [0, 1], got [9]"),
        (["--heads", "9"], "heads must be different numbers from 0 to 1, got [9]"),
        (["--long", "fold"], "invalid choice: 'fold'"),
        (["--documents-per-shard", "0"], "expected a number from 1, got '0'"),
        (["--corpus", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
        (["--corpus", "notes.txt"], "sources must end in .jsonl, .ndjson or .parquet, got notes.txt"),
        (["--model", "/no/such/model"], "model folder not found: /no/such/model"),
    ],
)
def test_bad_input_is_one_line_and_no_folder(command, tmp_path, capsys, monkeypatch, more, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert message in refused(capsys, *command, *more)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_needed_and_a_corpus_for_it(command, bert, tmp_path, capsys):
    assert refused(capsys, *command[:-2]) == "--corpus needs --out"
    text = ["analyze", "--model", bert, "--text", "the ship"]
    assert refused(capsys, *text, "--out", str(tmp_path)) == "--out needs --corpus"
    assert refused(capsys, *text, "--documents-per-shard", "3") == "--documents-per-shard needs --corpus"


def test_another_job_and_an_interruption_are_one_line(command, tmp_path, capsys, monkeypatch):
    assert cli.main(command) == 0
    capsys.readouterr()
    before = contents(tmp_path / "out")
    changed = refused(capsys, *command, "--max-tokens", "3")
    assert changed == f"{tmp_path / 'out'} was begun with max_tokens = None, got 3"
    (tmp_path / "out" / "_part-00001.json").unlink()

    for error, said in ((KeyboardInterrupt(), "interrupted"), (torch.OutOfMemoryError("no memory"), "no memory")):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("causalattn.corpus.scores.analyze", fail)
            assert refused(capsys, *command) == f"{said}; what is done is kept, and the same command goes on"
    assert cli.main(command) == 0 and contents(tmp_path / "out") == before


def test_pyarrow_is_named_where_it_is_missing(command, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    assert refused(capsys, *command) == "pyarrow is not installed: pip install 'causalattn[corpus]'"

"""The command line: what it prints, what it writes, and how it refuses."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import save_checkpoint, words

from causalattn import cli
from causalattn.cli.model import DEMO_PACKAGE
from causalattn.cli.model import SENTENCE as DEMO_SENTENCE

SENTENCE = "Because the storm intensified , the ship finally sank ."
FIGURES = {"attention.png", "outer-product.png", "scores.png", "edges.png", "z-grid.png"}
LONG = {"map.png", "top-edges.png"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / "tinybert"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / "tinygpt2", "gpt2"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as it is run without arguments: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("demo")
    place = {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "causalattn", "demo"]
    done = subprocess.run(command, cwd=folder, env=os.environ | place, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder / "causalattn-demo", done.stdout, done.stderr


def refused(capsys, *argv):
    """The one line of a refusal; nothing may stand on stdout."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n")
    last = err.splitlines()[-1]
    assert last.startswith("causalattn: error: ")
    return last.removeprefix("causalattn: error: ")


def test_the_table_has_a_line_for_every_head(bert, capsys):
    assert cli.main(["analyze", "--model", bert, "--text", SENTENCE]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1] == "text: 10 tokens" and err == ""
    assert lines[2].split()[:6] == ["layer", "head", "DAG", "score", "null", "z"] and "unmasked" not in lines[2]
    assert [line.split()[:2] for line in lines[3:7]] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert all("@" in line for line in lines[3:7])


def test_a_causal_table_has_the_unmasked_scores_and_a_note(gpt2, capsys):
    assert cli.main(["analyze", "--model", gpt2, "--text", SENTENCE]) == 0
    out = capsys.readouterr().out
    assert "unmasked" in out.splitlines()[2] and "1 − mean A_ii" in out


def test_json_is_all_there_is_on_stdout(bert, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["analyze", "--model", bert, "--text", SENTENCE, "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [SENTENCE.split()] and len(found["rows"]) == 4
    assert {"dag_score", "null", "z", "sink_removed", "asymmetry", "entropy", "received"} <= set(found["rows"][0])
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_layers_and_heads_are_chosen(bert, capsys):
    options = ["--layers", "1", "--heads", "1,0", "--json"]
    assert cli.main(["analyze", "--model", bert, "--text", SENTENCE, *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["layer"], row["head"]) for row in rows] == [(1, 1), (1, 0)]


def test_a_file_is_read_and_cut_to_its_limit(bert, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(words(50), "utf-8")
    assert cli.main(["analyze", "--model", bert, "--file", str(file), "--max-tokens", "9", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == [words(50).split()[:9]]
    assert err == "causalattn: the text has 50 tokens; the first 9 are analyzed\n"
    file.write_text(words(70), "utf-8")
    assert cli.main(["analyze", "--model", bert, "--file", str(file), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) == 64


def test_figures_are_written_under_their_names_and_nothing_else(bert, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    assert cli.main(["analyze", "--model", bert, "--text", SENTENCE, "--layers", "0", "--figures", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote")]


def test_progress_is_shown_on_a_terminal_only(bert, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["analyze", "--model", bert, "--text", SENTENCE, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert "1/2 layers" in terminal.getvalue() and "2/2 layers" in terminal.getvalue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "/no/such/model", "--text", "a"], "model folder not found: /no/such/model"),
        (["--model", "{bert}", "--file", "{tmp}/none.txt"], "none.txt could not be read: No such file or directory"),
        (["--model", "{bert}", "--file", "{tmp}"], "could not be read: Is a directory"),
        (["--model", "{bert}", "--file", "{tmp}/empty.txt"], "the text is empty: "),
        (["--model", "{bert}", "--text", " \n"], "the text is empty: --text"),
        (["--model", "{bert}", "--text", "a\udcff"], "the text is not valid UTF-8"),
        (["--model", "{bert}", "--file", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text: "),
        (["--model", "{tmp}", "--text", "a"], "could not be loaded: "),
        (["--model", "{bert}", "--text", "a", "--layers", "0,7"], "layers must be among [0, 1], got [7]"),
        (["--model", "{bert}", "--text", "a", "--heads", "2"], "heads must be different numbers from 0 to 1, got [2]"),
        (["--model", "{bert}", "--text", "a", "--layers", "x"], "expected numbers such as 0,5, got 'x'"),
        (["--model", "{bert}", "--text", "a", "--max-tokens", "0"], "expected a number from 1, got '0'"),
        (["--model", "{bert}"], "one of the arguments --text --file --corpus is required"),
        (["--text", "a"], "the following arguments are required: --model"),
    ],
)
def test_bad_input_is_one_line_and_no_file(bert, tmp_path, capsys, argv, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    argv = [part.format(bert=bert, tmp=tmp_path) for part in argv]
    outputs = ["--figures", str(tmp_path / "figures"), "--html", str(tmp_path / "page.html")]
    assert message in refused(capsys, "analyze", *argv, *outputs)
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "latin.txt"}


def test_a_family_that_is_not_supported_is_named(tmp_path, capsys):
    folder = str(save_checkpoint(tmp_path, "bloom"))
    assert "bloom is not supported" in refused(capsys, "analyze", "--model", folder, "--text", SENTENCE)


def test_no_command_and_an_unknown_one_are_refused(capsys):
    assert "required" in refused(capsys)
    assert "invalid choice" in refused(capsys, "paint")


@pytest.mark.parametrize(
    ("package", "extra", "argv"),
    [
        ("transformers", "causalattn[transformers]", ["analyze", "--model", "m", "--text", "a"]),
        ("matplotlib", "causalattn[plot]", ["analyze", "--model", "m", "--text", "a", "--html", "x"]),
        (DEMO_PACKAGE, "causalattn[demo]", ["demo"]),
    ],
)
def test_a_package_that_is_missing_is_named(package, extra, argv, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    message = refused(capsys, *argv)
    assert message.startswith(f"{package} is not installed") and extra in message


def test_a_failure_while_writing_leaves_what_was_there(bert, tmp_path, capsys, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if "edges" in path.name:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    (tmp_path / "scores.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    message = refused(capsys, "analyze", "--model", bert, "--text", SENTENCE, "--figures", str(tmp_path))
    assert "No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]
    assert (tmp_path / "scores.png").read_bytes() == b"old"


def test_a_folder_where_the_page_should_go_is_refused(bert, tmp_path, capsys):
    (tmp_path / "page.html").mkdir()
    message = refused(capsys, "analyze", "--model", bert, "--text", SENTENCE, "--html", str(tmp_path / "page.html"))
    assert message == f"a folder is in the way: {tmp_path / 'page.html'}"


def test_a_reader_that_leaves_early_is_no_error(bert, tmp_path):
    place = {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    figure = tmp_path / "graph.png"
    for arguments in (["analyze"], ["discover", "--draws", "1", "--max-order", "0", "--figure", str(figure)]):
        command = [sys.executable, "-m", "causalattn", *arguments, "--model", bert, "--text", SENTENCE]
        process = subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == b""
    # and what was asked for is there
    assert figure.stat().st_size > 5000


def test_the_demo_leaves_its_figures_its_page_and_two_tables(demo):
    folder, out, err = demo
    names = {f"sentence-{figure}" for figure in FIGURES} | {f"passage-{figure}" for figure in FIGURES | LONG}
    assert {path.name for path in folder.iterdir()} == names | {"report.html"}
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "sentence: 12 tokens" in out and "passage: 512 tokens" in out
    assert sum(line.split()[:1] in (["0"], ["5"]) for line in out.splitlines()) == 2 * 2 * 12
    assert "first 512 are analyzed" in err and "last layer" not in out


def test_the_demo_of_a_causal_model_sets_its_score_beside_uniform_attention(gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("causalattn.cli.demo.PASSAGE_TOKENS", 20)
    assert cli.main(["demo", "--model", gpt2, "--html", str(tmp_path / "page.html")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("last layer"))
    T = len(DEMO_SENTENCE.split())
    uniform = 1 - sum(1 / n for n in range(1, T + 1)) / T
    assert f"T = {T}: {uniform:.3f}" in line and line.endswith("published for gpt2: 0.810")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]

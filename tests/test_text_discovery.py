"""causalattn discover: the table, the JSON, the figure and the refusals."""

import json

import pytest
import torch
from test_cli import SENTENCE, refused
from tiny_checkpoint import save_checkpoint
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

import causalattn as ca
from causalattn import cli
from causalattn.discovery import discover
from causalattn.text_discovery import discover_text, draw, table


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / "tinybert"))


@pytest.fixture(scope="module")
def loaded(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    return AutoModel.from_pretrained(bert).eval(), dict(tokenizer(SENTENCE, return_tensors="pt"))


def test_a_graph_a_head(loaded):
    model, inputs = loaded
    tokens = SENTENCE.split()
    told = []
    result = discover_text(model, inputs, tokens, cut=0.2, draws=3, progress=lambda *x: told.append(x))
    call = ca.capture(model, inputs)[1]
    R = ca.attention_correlation(call.q, call.k, **call.options())[0]
    assert result.layer == 1 and not result.ordered and [head.head for head in result.heads] == [*range(len(R))]
    assert told[-1] == (len(R), len(R))
    for head in result.heads:
        alone = discover(R[head.head], cut=0.2, names=result.tokens)
        assert head.found.pag == alone.pag and len(head.null_edges) == 3
        assert head.edges == len(list(alone.pag.edges()))
    best = result.best()
    lines = table(result)
    assert lines[0].startswith("layer 1, 10 tokens, 45 pairs, independent below |r| = 0.2000")
    assert len(lines) == 4 + len(R) + best.edges and lines[-1].endswith("says nothing of the model.")
    drawing = draw(result)
    assert drawing.name == "pag" and len(drawing.png()) > 5000


def test_special_tokens_are_in_no_graph_but_in_the_maps(loaded):
    model, inputs = loaded
    tokens = SENTENCE.split()
    result = discover_text(model, inputs, tokens, special=["storm"], heads=[1], cut=0.2, draws=1, max_order=1)
    assert len(result.tokens) == 9 and "storm" not in result.tokens and [x.head for x in result.heads] == [1]
    call = ca.capture(model, inputs)[1]
    rest = [t for t, token in enumerate(tokens) if token != "storm"]
    R = ca.attention_correlation(call.q, call.k, tokens=rest, heads=[1], **call.options())[0, 0]
    assert result.heads[0].found.pag == discover(R, cut=0.2, names=result.tokens, max_order=1).pag


def test_a_causal_model_is_searched_in_order():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)).eval()
    inputs = {"input_ids": torch.arange(8)[None]}
    result = discover_text(model, inputs, list("abcdefgh"), n=64, alpha=0.01, draws=1, max_order=2)
    assert result.ordered
    for head in result.heads:
        marks = head.found.pag.marks
        upper = marks[~torch.ones(8, 8).tril().bool().numpy()]
        assert set(upper[upper != 0].tolist()) <= {2}
    assert table(result)[0].endswith(", in the order of the text")


def test_the_command(bert, tmp_path, capsys):
    figure = tmp_path / "graph.png"
    command = ["discover", "--model", bert, "--text", SENTENCE, "--draws", "2", "--max-order", "1"]
    assert cli.main([*command, "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["head", "edges", "null"] and lines[-1] == f"wrote {figure}"
    assert figure.stat().st_size > 5000
    assert cli.main([*command, "--cut", "0.3", "--null", "permute", "--heads", "0", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    (head,) = whole["heads"]
    assert whole["null"] == "permute" and head["cuts"] == [0.3, 0.3] and len(head["null_edges"]) == 2
    pairs = {tuple(edge["tokens"]) for edge in head["edges"]} | {tuple(x["tokens"]) for x in head["separated"]}
    assert len(pairs) == 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cut", "1.5"], "cut must lie between 0 and 1, got 1.5"),
        (["--cut", "0.2", "--alpha", "0.1"], "give cut, or n and alpha"),
        (["-n", "2"], "n must be greater than order + 3"),
        (["--heads", "9"], "heads must lie in 0…"),
        (["--layer", "7"], "7"),
        (["--text", "storm"], "a graph needs at least 2 tokens"),
        (["--text", " "], "the text is empty: --text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(bert, capsys, arguments, message):
    command = ["discover", "--model", bert, "--draws", "1", *arguments]
    assert message in refused(capsys, *command)

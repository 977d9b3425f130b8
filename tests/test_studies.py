"""Every study's page has its script's question and method, and docs/discovery.md quotes what the pages say."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import study

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "studies").glob("*.py") if "\nSTUDY = " in path.read_text(encoding="utf-8")
)


def test_every_page_has_its_script():
    pages = ROOT / "docs" / "studies"
    assert sorted(path.stem for path in pages.glob("*.md")) == SCRIPTS
    assert sorted(path.stem for path in pages.glob("*.png")) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_what_its_script_writes(name):
    STUDY = import_module(name).STUDY
    page = (ROOT / "docs" / "studies" / f"{name}.md").read_text(encoding="utf-8")
    assert STUDY.name == name
    assert page.startswith(f"# {STUDY.question}\n\n{STUDY.method}\n\n**")
    assert page.endswith(f"\n\nMade by `python studies/{name}.py`.\n")
    # a row of every table has as many cells as its head
    for block in re.findall(r"(?:^\|.*\|\n)+", page, re.M):
        cells = {line.count(" | ") for line in block.splitlines()}
        assert len(cells) == 1, block


def tables(name):
    """title → rows as dicts, of a page."""
    page = (ROOT / "docs" / "studies" / f"{name}.md").read_text(encoding="utf-8")
    found = {}
    for title, block in re.findall(r"^\*\*(.*)\*\*\n\n((?:\|.*\|\n)+)", page, re.M):
        heads, _, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines())
        found[title] = [dict(zip(heads, line, strict=True)) for line in lines]
    return found


# page, table's beginning, cells of a row, column, what docs/discovery.md says
FIRST = {"systems": "weights 0.5 … 2"}
QUOTED = [
    ("linear_models", "F1", FIRST | {"search": "discover"}, "100", "F1 .68"),
    ("linear_models", "F1", FIRST | {"search": "discover"}, "10000", ".92 at n"),
    ("linear_models", "F1", FIRST | {"search": "causal-learn fci"}, "1000", ".80 and .89, every"),
    ("linear_models", "F1", {"systems": "weights 0.1 … 0.5", "search": "discover"}, "100", "finds less (.50)"),
    ("linear_models", "F1", {"systems": "weights 0.1 … 0.5", "search": "correlated at all"}, "100", "gives (.57)"),
    ("hard_models", "Saturating", {"n": "100000", "strength": "1"}, "F1", "F1 is .75"),
    ("hard_models", "Sign", {"n": "100000", "strength": "1"}, "F1", ".74 and .57 at"),
    ("hard_models", "Square", {"n": "100000", "strength": "1"}, "F1", "and .57 at n"),
    ("hard_models", "Square", {"n": "100000", "strength": "1"}, "correlated at all", ".70, .70 and .59"),
    ("trained_transformer", "One sequence, deepest", {"step": "0"}, "F1", "F1 .45 ± .04"),
    ("trained_transformer", "One sequence, deepest", {"step": "1600"}, "F1", ".57 ± .03"),
    ("trained_transformer", "One sequence, deepest", {"step": "1600"}, "complete graph", "(.52 ± .05)"),
    ("trained_transformer", "One sequence beside", {"step": "1600"}, "models with p ≤ 0.05", "6 of 8 models"),
    ("trained_transformer", "One sequence beside", {"step": "1600"}, "shuffled", "against .43"),
    ("trained_transformer", "The chance", {"step": "1600"}, "A + Aᵀ", "better (.72)"),
    ("trained_transformer", "The chance", {"step": "1600"}, "R of A Aᵀ", "do (.63)"),
    ("embeddings", "r of", {"embedding": "Z", "map": "model"}, "r", "(r = .63"),
    ("embeddings", "r of", {"embedding": "Z", "map": "random logits, its own Z"}, "r", "(.59)"),
    ("embeddings", "r of", {"embedding": "hidden", "map": "model"}, "r", "r is .40"),
    ("layers", "Rank", {"layer": "5"}, "edge 0.093", "at most .12"),
    ("layers", "Rank", {"layer": "4"}, "A + Aᵀ", "reaches .68"),
    ("layers", "Rank", {"layer": "with depth"}, "edge 0.093", "(.08 ± .12)"),
    ("layers", "Rank", {"layer": "with depth"}, "edge, words' keys", "(.35 ± .08)"),
    ("layers", "Chosen", {"score": "graph of permuted rows"}, "read", "(.37)"),
    ("explanations", "sentiment", {"method": "CLEANN"}, "size", "(1.58"),
    ("explanations", "recommendation", {"method": "attention top-k"}, "size", "against 5.12"),
    ("explanations", "recommendation", {"method": "CLEANN"}, "replaced by 2nd or 3rd", "CLEANN .77"),
    ("explanations", "next token", {"method": "CLEANN, null graphs"}, "found", "against .81"),
]


@pytest.mark.parametrize(("name", "title", "cells", "column", "words"), QUOTED)
def test_what_is_quoted_is_on_the_page(name, title, cells, column, words):
    (rows,) = [rows for head, rows in tables(name).items() if head.startswith(title)][:1]
    (row,) = [row for row in rows if cells.items() <= row.items()]
    mean = row[column].split(" ± ")[0]
    assert re.sub(r"^0\.", ".", mean) in words
    assert words in (ROOT / "docs" / "discovery.md").read_text(encoding="utf-8")


def test_a_table_is_markdown():
    table = study.Table("rows", [{"a": 1, "b": 0.123}, {"a": "x", "b": float("nan")}])
    lines = ["**rows**", "", "| a | b |", "| --- | --- |", "| 1 | 0.12 |", "| x | – |"]
    assert study.markdown(table).splitlines() == lines


def test_means_leave_out_what_is_not_known():
    assert study.spread([1.0, float("nan"), 3.0]) == "2.00 ± 1.00"
    assert study.spread([float("nan")]) == "–" and study.spread([2.0]) == "2.00"


def test_a_study_writes_its_page_and_its_figure(tmp_path, capsys):
    from causalattn.plot.drawing import Drawing, sheet

    asked = []

    def measure(quick, progress):
        asked.append(quick)
        progress(1, 1)
        return [{"n": 1.0}]

    tiny = study.Study(
        "tiny", "Is it so?", "By looking.", measure, lambda rows: [study.Table("all", rows)],
        lambda rows: Drawing("tiny", sheet(2, 2, "tiny"), "One."),
    )  # fmt: skip
    study.run(tiny, ["--quick"])
    assert "| 1.00 |" in capsys.readouterr().out and not [*tmp_path.iterdir()]
    study.run(tiny, ["--out", str(tmp_path)])
    page = (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert page.startswith("# Is it so?\n\nBy looking.\n\n**all**\n") and "![One.](tiny.png)" in page
    assert (tmp_path / "tiny.png").stat().st_size > 1000 and asked == [True, False]

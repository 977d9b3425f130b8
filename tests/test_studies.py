"""Every study's page is the one its script writes: the question, the method, tables of the same shape, the figure."""

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

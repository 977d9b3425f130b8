"""README's table and docs/speed.md are what bench/results gives, and differ as soon as a row does."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import report as bench_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows():
    return bench_report.measured()


def test_what_is_written_is_what_was_measured(rows):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert bench_report.with_table(readme, bench_report.readme_table(rows)) == readme
    assert bench_report.page(rows) == (ROOT / "docs" / "speed.md").read_text("utf-8")


def test_every_row_is_on_the_page_with_its_median(rows):
    lines = [line for line in bench_report.page(rows).splitlines() if re.match(r"\| [\d,]+( × [\d,]+)* \|", line)]
    assert len(lines) == len(rows)
    assert {line.count(" | ") for line in lines} == {7}
    for row in rows:
        if row["ms"]:
            assert row["ratio"] > 0 and row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        else:
            assert row["reason"]


@pytest.mark.parametrize("field", ["ms", "ratio", "reason"])
def test_a_changed_row_changes_the_table(rows, field):
    operator, shape = bench_report.SHOWN[5]
    changed = json.loads(json.dumps(rows))
    for row in changed:
        if row["operator"] == operator and row["shape"] == shape:
            if field == "ms" and row["peer"] == bench_report.OURS:
                row["ms"]["p50"] *= 2
            elif field == "ratio" and row["ms"]:
                row["ratio"] *= 1.5
            elif field == "reason" and row["ms"] is None:
                row["reason"] = "other"
    assert bench_report.readme_table(changed) != bench_report.readme_table(rows)
    assert bench_report.page(changed) != bench_report.page(rows)


def test_the_command_checks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        bench_report.main()
    assert stopped.value.code == 0
    monkeypatch.setattr(bench_report, "measured", list)
    with pytest.raises(SystemExit) as stopped:
        bench_report.main()
    assert stopped.value.code == 1 and "README.md differs from bench/results" in capsys.readouterr().err


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README must hold"):
        bench_report.with_table("no table", "")


def test_the_figure_marks_what_was_not_run(rows):
    left, right = bench_report.draw(rows).figure.axes
    assert len(left.lines) == 3 and {left.get_yscale(), right.get_yscale()} == {"log"}
    # a peak that was not seen to grow is no point
    assert min(line.get_ydata().min() for line in right.lines if len(line.get_ydata())) > 1
    hollow = [line for line in right.lines if line.get_fillstyle() == "none"]
    assert sum(len(line.get_xdata()) for line in hollow) == 2


def test_a_partial_run_keeps_the_other_rows():
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    one, two, three = ({"operator": "a", "shape": [n], "peer": "p", "ms": n} for n in (1, 2, 3))
    assert conftest.joined([one, two], [two | {"ms": 9}, three]) == [one, two | {"ms": 9}, three]
    assert conftest.joined([], [one]) == [one]

"""README's blocks, docs/speed.md and docs/predicted.md are what was measured, and differ as soon as a row does."""

import importlib.util
import json
import re
from pathlib import Path

import figures as bench_figures
import predict as bench_predict
import pytest
import report as bench_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows():
    return bench_report.measured()


def test_what_is_written_is_what_was_measured(rows):
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = {"speed": bench_report.readme_table(rows), "linear": bench_report.softmax_or_linear(rows)}
    assert bench_report.with_blocks(readme, blocks) == readme
    assert bench_report.page(rows) == (ROOT / "docs" / "speed.md").read_text("utf-8")
    predicted = bench_predict.page(bench_predict.stored(), rows)
    assert predicted == (ROOT / "docs" / "predicted.md").read_text("utf-8")


def test_every_row_is_on_the_page_with_its_median(rows):
    lines = [line for line in bench_report.page(rows).splitlines() if re.match(r"\| [\d,]+( × [\d,]+)* \|", line)]
    assert len(lines) == len(rows)
    assert {line.count(" | ") for line in lines} == {7}
    for row in rows:
        assert {"operator", "peer", "shape", "dtype", "device", "torch", "triton", "commit"} <= row.keys()
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


def test_the_command_checks(rows, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        bench_report.main()
    assert stopped.value.code == 0
    monkeypatch.setattr(bench_report, "measured", lambda: rows[1:])
    with pytest.raises(SystemExit) as stopped:
        bench_report.main()
    assert stopped.value.code == 1 and "docs/speed.md differs from bench/results" in capsys.readouterr().err


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README must hold"):
        bench_report.with_blocks("no table", {"speed": ""})


def test_the_figure_marks_what_was_not_run(rows):
    left, right = bench_figures.growth(rows).figure.axes
    assert len(left.lines) == 3 and {left.get_yscale(), right.get_yscale()} == {"log"}
    # a peak that was not seen to grow is no point
    assert min(line.get_ydata().min() for line in right.lines if len(line.get_ydata())) > 1
    hollow = [line for line in right.lines if line.get_fillstyle() == "none"]
    assert sum(len(line.get_xdata()) for line in hollow) == 3


def test_nothing_stands_above_the_roof(rows):
    (axes,) = bench_figures.roofline(rows).figure.axes
    roof, *points = (line for line in axes.lines if len(line.get_xdata()))
    x, y = roof.get_data()
    assert len(points) > 20 and y[0] < y[1] == y[2]
    for point in points:
        (intensity,), (rate,) = point.get_data()
        assert rate <= min(y[2], y[0] / x[0] * intensity)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({256: (1, 2), 512: (4, 4.1), 1024: (16, 8)}, "softmax is the faster below about 520 tokens, and at 1,024"),
        ({256: (1, 2), 512: (4, 8)}, "softmax is the faster at every length timed, and at 512 tokens takes 0.5 times"),
    ],
)
def test_softmax_or_linear_is_read_off_the_rows(times, said):
    rows = [
        {"operator": "linear attention", "peer": peer, "shape": [1, 4, T, 64], "dtype": "float32", "device": "one",
         "ms": {"p50": ms}}
        for T, pair in times.items() for peer, ms in zip(("SDPA causal", bench_report.OURS), pair, strict=True)
    ]  # fmt: skip
    assert said in bench_report.softmax_or_linear(rows)
    assert bench_report.softmax_or_linear(rows).startswith("One text, 4 heads, D = 64, float32, on one: softmax")


def test_devices_are_not_mixed(rows):
    other = [row | {"device": "another"} for row in rows]
    table = bench_report.readme_table([*rows, *other])
    assert table.count("| | shape | ms |") == 2 and "another." in table
    assert bench_report.page([*rows, *other]).count("\n## row statistics\n") == 2


def test_a_partial_run_keeps_the_other_rows_of_its_device():
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    one, two, three = ({"operator": "a", "shape": [n], "peer": "p", "ms": n, "device": "d"} for n in (1, 2, 3))
    assert conftest.joined([one, two], [two | {"ms": 9}, three]) == [one, two | {"ms": 9}, three]
    assert conftest.joined([], [one]) == [one]
    assert conftest.joined([one | {"device": "another"}], [two]) == [two]
    with pytest.raises(pytest.UsageError, match="the rows there are of another, these 1 of d: run all, or set RESULTS"):
        conftest.joined([row | {"device": "another"} for row in (one, two, three)], [two])

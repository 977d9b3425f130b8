"""How growth is fitted and where two curves cross, on made-up times; the measurement itself on short texts."""

import io
import json

import pytest
import torch
from helpers import DEVICE
from matplotlib.image import imread

from causalattn import cli, complexity
from causalattn.complexity import Complexity, Point, crossover, fitted_exponent, measure_complexity, table, verdict
from causalattn.plot.complexity import draw_complexity

LENGTHS = [2**n for n in range(8, 15)]
# they meet at T = 1000
POINTS = tuple(Point(T, 1e-6 * T**2, 1e-3 * T) for T in LENGTHS)


def result_of(points):
    exponents = {name: fitted_exponent(points, name) for name in ("softmax", "linear")}
    return Complexity(tuple(points), exponents, crossover(points), "B = 1, 4 heads", "a machine")


def test_the_fit_finds_the_powers():
    assert fitted_exponent(POINTS, "softmax") == pytest.approx(2)
    assert fitted_exponent(POINTS, "linear") == pytest.approx(1)


def test_only_the_last_factor_16_of_what_was_run_counts():
    flat = [point._replace(softmax=1.0) if point.T < 512 else point for point in POINTS]
    assert fitted_exponent([*flat[:-1], flat[-1]._replace(softmax=None)], "softmax") == pytest.approx(2)
    assert fitted_exponent([point._replace(softmax=1.0) for point in POINTS], "softmax") == pytest.approx(0)
    assert fitted_exponent(POINTS[:1], "softmax") is None


def test_the_crossing_is_where_the_logs_meet():
    assert crossover(POINTS) == pytest.approx(1000)
    assert crossover([point._replace(softmax=point.linear / 2) for point in POINTS]) is None
    assert crossover([point._replace(softmax=point.linear * 2) for point in POINTS]) == 0
    assert crossover([point._replace(softmax=None) for point in POINTS]) is None


def test_the_verdict_names_the_faster_choice():
    assert verdict(result_of(POINTS)) == (
        "Below T ≈ 1000 softmax attention is the faster choice, above it linear attention."
    )
    assert "Softmax" in verdict(result_of([point._replace(softmax=point.linear / 2) for point in POINTS]))
    assert "Linear" in verdict(result_of([point._replace(softmax=point.linear * 2) for point in POINTS]))


def test_every_length_is_measured():
    seen = []
    result = measure_complexity([64, 100], heads=2, dim=16, progress=lambda *at: seen.append(at))
    assert [point.T for point in result.points] == [64, 100]
    assert all(point.softmax > 0 and point.linear > 0 for point in result.points)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert result.shape.startswith("B = 1, 2 heads, D = 16")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    assert result.shape.endswith(str(dtype).removeprefix("torch."))


def test_a_call_that_would_take_too_long_is_not_made(monkeypatch):
    calls = []
    monkeypatch.setattr(complexity, "milliseconds", lambda function, args: calls.append(args[0].shape) or 600.0)
    result = measure_complexity([64, 128, 256, 512], heads=1, dim=16, longest=1.5)
    assert [point.softmax for point in result.points] == [600.0, None, None, None]
    assert [point.linear for point in result.points] == [600.0, 600.0, 600.0, 600.0]
    assert len(calls) == 5
    assert "not run" in "\n".join(table(result))
    calls.clear()
    # with B·T constant softmax grows as T, linear attention not at all
    measure_complexity([64, 128, 256], heads=1, dim=16, tokens=512, longest=1.3)
    assert [list(shape[::2]) for shape in calls] == [[8, 64], [8, 64], [4, 128], [4, 128], [2, 256], [2, 256]]


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(complexity, "_linear", lambda q, k, v: v)
    with pytest.raises(AssertionError):
        measure_complexity([64], dim=16)


@pytest.mark.parametrize("lengths", [[], [0, 1], [8, 8], [16, 8]])
def test_lengths_must_increase(lengths):
    with pytest.raises(ValueError, match="lengths must be positive and increasing, got"):
        measure_complexity(lengths)


@pytest.mark.parametrize("points", [POINTS, [point._replace(softmax=None) for point in POINTS], POINTS[:1]])
def test_the_figure_can_be_drawn(points):
    image = imread(io.BytesIO(draw_complexity(result_of(points)).png(dpi=50)))
    assert image.std() > 0


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    figure = tmp_path / "new" / "growth.png"
    options = ["--lengths", "32,64", "--heads", "1", "--dim", "16", "--figure", str(figure)]
    assert cli.main(["bench", "complexity", *options]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["32", "64"]
    assert lines[-1] == f"wrote {figure}" and figure.stat().st_size > 0 and err == ""


def test_the_command_prints_nothing_but_json(tmp_path, capsys):
    options = ["--lengths", "32,64", "--dim", "16", "--tokens", "128", "--figure", str(tmp_path / "a.png"), "--json"]
    assert cli.main(["bench", "complexity", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [point["T"] for point in result["points"]] == [32, 64]
    assert result["points"][0]["ratio"] == pytest.approx(result["points"][0]["softmax"] / result["points"][0]["linear"])
    assert result["exponents"].keys() == {"softmax", "linear"} and "B·T = 128" in result["shape"]


@pytest.mark.parametrize("options", [["--lengths", "64,32"], ["--lengths", "a"], ["--heads", "0"], ["--dim", "-1"], []])
def test_the_command_refuses_in_one_line(options, capsys):
    argv = ["bench", "complexity", *options] if options else ["bench"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("causalattn: error: ")

"""bench/compare.py: the least of every run, what fails where, and no worktree left behind."""

import subprocess
from pathlib import Path

import compare as bench_compare
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def timed(monkeypatch):
    """Times of the base and of here, by which tree is asked."""
    found = {
        "here": 2 * [{"a": 2.0, "b": 5.0}, {"a": 1.0, "b": 9.0}],
        "base": 2 * [{"a": 1.0, "b": 4.0}, {"a": 3.0, "c": 1.0, "b": 2.0}],
    }
    monkeypatch.setattr(bench_compare, "times", lambda tree, tokens: found["here" if tree == ROOT else "base"].pop())
    return found


def trees():
    return subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("worse", "code"), [("1.5", 1), ("2.6", 0)])
def test_ratios_of_the_least(timed, capsys, worse, code):
    before = trees()
    assert bench_compare.main(["HEAD", "--rounds", "2", "--worse", worse]) == code
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["a", "1.00", "1.00", "1.00", "×"],
        ["b", "2.00", "5.00", "2.50", "×"],
    ]
    assert err.endswith("as slow as HEAD: b\n") if code else not err
    assert trees() == before


def test_what_looks_slower_is_measured_again(monkeypatch, capsys):
    rounds = iter([("here", 3.0), ("base", 1.0), ("here", 3.0), ("base", 1.0), ("here", 1.2), ("base", 1.1)])
    times = {"base": [], "here": []}
    for tree, ms in rounds:
        times[tree].append({"a": ms})
    monkeypatch.setattr(bench_compare, "times", lambda tree, tokens: times["here" if tree == ROOT else "base"].pop(0))
    assert bench_compare.main(["HEAD", "--rounds", "2"]) == 0
    assert capsys.readouterr().out.split() == ["a", "1.00", "1.20", "1.20", "×"]
    assert times == {"base": [], "here": []}


def test_without_a_base_it_is_what_readme_was_measured_at():
    found = bench_compare.measured_at()
    command = ["git", "log", "-1", "--format=%h", "--", "bench/results"]
    assert found == subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_what_is_wrong_is_said_in_one_line(capsys):
    before = trees()
    assert bench_compare.main(["no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("compare: error: fatal: invalid reference: no-such-revision")
    # a tree without the command
    with pytest.raises(bench_compare.Failed, match="causalattn: error"):
        bench_compare.times(ROOT, "1")
    assert trees() == before

"""How much slower or faster every operator is than at another revision, both run in turn on this machine.

    python bench/compare.py [BASE] [--tokens 1024] [--rounds 3] [--worse 1.5]

A worktree of BASE and this tree run `causalattn bench operators` alternately; a ratio is of the least medians. Where
one is above --worse both run again, as often as --rounds says, before the exit code is 1. Without BASE it is the
revision that measured what README shows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """What a command said last."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a revision that has the command (default: that of bench/results)")
    parser.add_argument("--tokens", default="1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worse", type=float, default=1.5)
    arguments = parser.parse_args(argv)
    try:
        revision = arguments.base or measured_at()
        with worktree(revision) as base:
            trees, runs = {"base": base, "here": ROOT}, []
            for done in range(2 * arguments.rounds):
                if done >= arguments.rounds and not slower(runs, arguments.worse):
                    break
                runs.append({name: times(tree, arguments.tokens) for name, tree in trees.items()})
    except Failed as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    for name, (before, now) in compared(runs).items():
        print(f"{name:<34}  {before:>10.2f}  {now:>10.2f}  {now / before:>6.2f} ×")
    worse = slower(runs, arguments.worse)
    if worse:
        print(f"more than {arguments.worse} × as slow as {revision}: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


def slower(runs: Sequence[dict[str, dict[str, float]]], worse: float) -> list[str]:
    """The operators that take more than so many times as long as at the base."""
    return [name for name, (before, now) in compared(runs).items() if now > worse * before]


def measured_at() -> str:
    """The revision at which bench/results was written last."""
    return _run(["git", "log", "-1", "--format=%h", "--", "results"]).strip()


def compared(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, tuple[float, float]]:
    """Of each operator that both have the least milliseconds of the runs, at the base and here."""
    names = [name for name in runs[0]["here"] if name in runs[0]["base"]]
    return {name: tuple(min(run[tree][name] for run in runs) for tree in ("base", "here")) for name in names}


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a revision beside this one, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        _run(["git", "worktree", "add", "--detach", str(tree), revision])
        try:
            yield tree
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)])


def times(tree: Path, tokens: str) -> dict[str, float]:
    """Milliseconds of every operator of a tree."""
    command = [sys.executable, "-m", "causalattn", "bench", "operators", "--tokens", tokens, "--json"]
    rows = json.loads(_run(command, env=os.environ | {"PYTHONPATH": str(tree)}))["rows"]
    return {row["name"]: row["ours"] for row in rows}


def _run(command: list[str], **options) -> str:
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed((done.stderr.strip() or "it said nothing").splitlines()[-1])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

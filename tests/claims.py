"""The page of claims: what each test says in its docstring, and the worst of what it saw."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
INTRODUCTION = """\
# The claims, as tests that run

Each is a property in [tests/test_claims.py](../tests/test_claims.py); a figure is the worst of so many readings (or the
share of them that it says), in float64 on the torch path and in float32 in the kernels, with torch {version}.
`make claims` measures and writes this page.

| claim | formula | test | readings | measured |
|---|---|---|---|---|
"""


class Measured(NamedTuple):
    claim: str
    formula: str
    shown: str
    worst: Callable[[Iterable[float]], float]
    values: list[float]


CLAIMS: dict[str, Measured] = {}


def claim(shown: str, worst: Callable[[Iterable[float]], float] = max) -> Callable:
    """Put a test on the page: the first line of its docstring, the second, and shown with the worst of what it saw."""

    def register(test):
        title, formula, *_ = (line.strip() for line in test.__doc__.strip().splitlines())
        CLAIMS[test.__name__] = Measured(title.rstrip("."), formula, shown, worst, [])
        return test

    return register


def saw(test: Callable, value: float) -> None:
    CLAIMS[test.__name__].values.append(float(value))


def written() -> str:
    """The page, of tests that have all run."""
    lines = []
    for name, x in CLAIMS.items():
        figure = x.shown.format(x.worst(x.values))
        lines.append(f"| {x.claim} | {_cell(x.formula)} | `{name}` | {len(x.values)} | {_cell(figure)} |\n")
    return INTRODUCTION.format(version=torch.__version__.split("+")[0]) + "".join(lines)


def listed(page: str) -> list[tuple[str, str, str]]:
    """Claim, formula and test of each row."""
    rows = [line.split(" | ") for line in page.splitlines() if "| `test_" in line]
    return [(claim.removeprefix("| "), formula, test.strip("`")) for claim, formula, test, *_ in rows]


def expected() -> list[tuple[str, str, str]]:
    return [(x.claim, _cell(x.formula), name) for name, x in CLAIMS.items()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

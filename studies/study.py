"""What every study is: rows measured under a progress bar, then tables and a figure in docs/studies/."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from causalattn.console import Progress, write
from causalattn.plot import Drawing

DOCS = Path(__file__).resolve().parents[1] / "docs" / "studies"


class Table(NamedTuple):
    """A title and rows, dicts of the same keys, which are the columns' heads."""

    title: str
    rows: Sequence[dict]


class Study(NamedTuple):
    """One question and how it is answered.

    name: of its script and of what it writes. question: a heading. method: a paragraph. measure(quick, progress) makes
    all that is measured; tables and draw show it.
    """

    name: str
    question: str
    method: str
    measure: Callable[[bool, Callable[[int, int], None]], list[dict]]
    tables: Callable[[list[dict]], list[Table]]
    draw: Callable[[list[dict]], Drawing]


def run(study: Study, argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write NAME.md and NAME.png."""
    parser = argparse.ArgumentParser(description=study.question)
    parser.add_argument("--quick", action="store_true", help="a few draws, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there (default: docs/studies, quick: nowhere)")
    arguments = parser.parse_args(argv)
    progress = Progress(study.name, "runs")
    measured = study.measure(arguments.quick, progress)
    progress.close()
    tables = study.tables(measured)
    print("\n\n".join(markdown(table) for table in tables))
    out = arguments.out or (None if arguments.quick else DOCS)
    if out is not None:
        drawing = study.draw(measured)
        page = _page(study, tables, drawing.caption)
        write({out / f"{study.name}.md": page.encode(), out / f"{study.name}.png": drawing.png()})
        print(f"wrote {out / study.name}.md and .png", file=sys.stderr)


def markdown(table: Table) -> str:
    """A table with its title above it."""
    heads = [*table.rows[0]]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(_text(row[head]) for head in heads) for row in table.rows]
    return "\n".join([f"**{table.title}**", "", *(f"| {line} |" for line in lines)])


def pick(rows: Sequence[dict], **wanted) -> list[dict]:
    """The rows that hold these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def mean_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error, of the numbers that are not NaN; NaN of too few."""
    known = np.array([value for value in values if not math.isnan(value)], float)
    error = known.std(ddof=1) / math.sqrt(known.size) if known.size > 1 else math.nan
    return (known.mean() if known.size else math.nan), error


def spread(values: Iterable[float]) -> str:
    """Mean ± standard error of the numbers that are not NaN."""
    mean, error = mean_error(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def _page(study: Study, tables: list[Table], caption: str) -> str:
    made = f"Made by `python studies/{study.name}.py`."
    body = "\n\n".join(markdown(table) for table in tables)
    return f"# {study.question}\n\n{study.method}\n\n{body}\n\n![{caption}]({study.name}.png)\n\n{caption}\n\n{made}\n"


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.2f}"
    return str(value)

"""Tables, JSON and files of a command, and its errors in one line."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from ..console import CommandError, Progress, one_line, write


def print_measured(
    arguments: argparse.Namespace, measure: Callable, progress: Progress, table: Callable, draw: Callable | None,
    finished: Callable = lambda result: None,
) -> None:  # fmt: skip
    """Measure, tell finished, write the figure where one is wanted, and print the table or the JSON."""
    figure = getattr(arguments, "figure", None)
    check_plotting(figure)
    try:
        with redirect_stdout(sys.stderr):
            result = measure(progress=progress)
    except (ValueError, NotImplementedError) as error:
        raise CommandError(one_line(error)) from error
    finally:
        progress.close()
    finished(result)
    if figure:
        write({figure: draw(result).png()})
    print(result.to_json() if arguments.json else "\n".join(table(result)))
    if figure:
        print(f"wrote {figure}", file=sys.stderr if arguments.json else sys.stdout)


def print_files(files: dict[Path, bytes]) -> None:
    for path in files:
        print(f"wrote {path}")


def check_plotting(wanted) -> None:
    if wanted and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("matplotlib is not installed: pip install 'causalattn[plot]'")

"""The command line: causalattn analyze, do, sweep, discover, bench, demo.

Tables and JSON go to stdout, everything else to stderr. Bad input is one line on stderr, exit code 2, and no file.
"""

import os
import sys
from collections.abc import Sequence

from ..console import CommandError, one_line
from . import analyze, bench, demo, discover, interventions
from .arguments import Parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after one line on stderr that says what is wrong."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CommandError, OSError) as error:
        print(f"causalattn: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("causalattn: error: interrupted", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(prog="causalattn", description="What attention heads do, every score beside its null.")
    commands = parser.add_subparsers(required=True, metavar="analyze | do | sweep | discover | bench | demo")
    for each in (analyze, interventions, discover, bench, demo):
        each.add(commands)
    return parser

"""causalattn bench: what attention costs on this machine."""

import argparse
from functools import partial
from pathlib import Path

from ..console import Progress
from .arguments import numbers, positive
from .output import print_measured


def add(commands) -> None:
    bench = commands.add_parser("bench", help="what attention costs on this machine")
    kinds = bench.add_subparsers(required=True, metavar="complexity | operators")
    growth = kinds.add_parser("complexity", help="softmax against linear attention: time against T, fitted, crossing")
    growth.add_argument("--lengths", type=numbers, metavar="256,512,…", help="T of each point (default: 256 to 65536)")
    growth.add_argument("--heads", type=positive, default=4, metavar="H", help="heads of every call (default: 4)")
    growth.add_argument("--dim", type=positive, default=64, metavar="D", help="head dim (default: 64)")
    growth.add_argument("--tokens", type=positive, metavar="N", help="keep B·T at N tokens (default: B = 1)")
    growth.add_argument("--figure", type=Path, metavar="FILE", help="draw it into this PNG")
    growth.add_argument("--json", action="store_true", help="print JSON in place of the table")
    growth.set_defaults(run=_bench_complexity)
    each = kinds.add_parser("operators", help="every operator beside plain torch, which forms the matrix")
    each.add_argument("--tokens", type=positive, default=2048, metavar="T", help="of every call (default: 2048)")
    each.add_argument("--heads", type=positive, default=4, metavar="H", help="heads of every call (default: 4)")
    each.add_argument("--dim", type=positive, default=64, metavar="D", help="head dim (default: 64)")
    each.add_argument("--json", action="store_true", help="print JSON in place of the table")
    each.set_defaults(run=_bench_operators)


def _bench_complexity(arguments: argparse.Namespace) -> None:
    from ..complexity import LENGTHS, measure_complexity, table
    from ..plot.complexity import draw_complexity

    shape = {"heads": arguments.heads, "dim": arguments.dim, "tokens": arguments.tokens}
    measure = partial(measure_complexity, arguments.lengths or LENGTHS, **shape)
    print_measured(arguments, measure, Progress("complexity", "lengths"), table, draw_complexity)


def _bench_operators(arguments: argparse.Namespace) -> None:
    from ..operator_times import measure_operators, table

    measure = partial(measure_operators, arguments.tokens, heads=arguments.heads, dim=arguments.dim)
    print_measured(arguments, measure, Progress("operators", "operators"), table, None)

"""causalattn do, sweep: a text under interventions, and the edges that it hangs on."""

import argparse
from functools import partial
from pathlib import Path

from ..console import CommandError, Progress, one_line, read
from .arguments import numbers, positive
from .model import add_text, encode, text_of
from .output import print_measured


def add(commands) -> None:
    do = commands.add_parser("do", help="run a text under interventions, beside what it is without")
    do.add_argument("--plan", type=Path, action="append", metavar="FILE", help="a plan as JSON; several are compared")
    do.add_argument("--edge", metavar="'L5H3: sank <- storm'", help="in place of a plan: a soft and a hard do on it")
    do.add_argument("--strength", type=float, default=3.0, metavar="λ", help="of the soft do on --edge (default: 3)")
    do.add_argument("--layer", type=int, metavar="N", help="whose attention is drawn (default: the last acted on)")
    do.add_argument("--figure", type=Path, metavar="FILE", help="draw before and after into this PNG")
    do.set_defaults(run=_do)
    sweep = commands.add_parser("sweep", help="the attention edges that a text's meaning hangs on most")
    sweep.add_argument("--kind", choices=("cut", "soft", "hard"), default="cut", help="the intervention (default: cut)")
    sweep.add_argument("--strength", type=float, metavar="λ", help="of a soft one")
    sweep.add_argument("--top", type=positive, default=20, metavar="N", help="edges to verify (default: 20)")
    sweep.add_argument("--layers", type=numbers, metavar="0,5", help="only edges of these layers")
    sweep.add_argument("--against", metavar="TEXT", help="look at the similarity to this text, in place of the change")
    sweep.set_defaults(run=_sweep)
    for each in (do, sweep):
        add_text(each)


def _do(arguments: argparse.Namespace) -> None:
    from ..before_after import compare_plans, table
    from ..interventions import Do, Plan
    from ..plot.before_after import draw_before_after

    if (arguments.plan is None) == (arguments.edge is None):
        raise CommandError("do takes either --plan or --edge")
    try:
        if arguments.edge:
            plans = [Do.soft(arguments.edge, strength=arguments.strength), Do.hard(arguments.edge)]
        else:
            plans = [Plan.from_json(read(path)) for path in arguments.plan]
    except (TypeError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    loaded, inputs, tokens = text_of(arguments)
    measure = partial(compare_plans, loaded.model, inputs, plans, tokens, layer=arguments.layer)
    print_measured(arguments, measure, Progress("do", "plans"), table, draw_before_after)


def _sweep(arguments: argparse.Namespace) -> None:
    from ..text_sweep import sweep_text, table

    loaded, inputs, tokens = text_of(arguments)
    options = {"top": arguments.top, "kind": arguments.kind, "strength": arguments.strength, "layers": arguments.layers}
    against = arguments.against and encode(loaded, arguments.against, None)[0]
    measure = partial(sweep_text, loaded.model, inputs, tokens, against=against, **options)
    print_measured(arguments, measure, Progress("sweep", "edges"), table, None)

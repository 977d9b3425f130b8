"""causalattn discover: the graphs of a layer's heads beside their nulls."""

import argparse
from functools import partial
from pathlib import Path

from ..console import CommandError, Progress, write
from .arguments import numbers, positive
from .model import add_text, text_of
from .output import print_measured

# where the graphs so far go when a run is interrupted that has no --save
LEFT = Path("causalattn-discover.json")


def add(commands) -> None:
    graph = commands.add_parser("discover", help="the graph of each head of a layer, beside graphs of no structure")
    graph.add_argument("--layer", type=int, metavar="N", help="the layer (default: the last)")
    graph.add_argument("--heads", type=numbers, metavar="0,5", help="only these heads")
    graph.add_argument("--cut", type=float, metavar="R", help="independent below this |r|; in place of -n and --alpha")
    graph.add_argument("-n", type=float, metavar="N", help="sample size of Fisher's z, a knob (default: hidden size)")
    graph.add_argument("--alpha", type=float, metavar="α", help="level of Fisher's z (default: 0.01)")
    graph.add_argument("--max-order", type=int, metavar="K", help="the largest set to condition on")
    nulls = ("random_logits", "permute", "untrained")
    graph.add_argument("--null", choices=nulls, default=nulls[0], help="what to beat (default: random_logits)")
    graph.add_argument("--draws", type=positive, default=20, metavar="N", help="of the null (default: 20)")
    graph.add_argument("--sweep", type=positive, metavar="N", help="also: which edges stand at N cuts, half to twice")
    graph.add_argument("--figure", type=Path, metavar="FILE", help="draw the head furthest from its null into this PNG")
    graph.add_argument("--save", type=Path, metavar="FILE", help="keep the graphs so far there, after every level")
    add_text(graph)
    graph.set_defaults(run=_discover)


def _discover(arguments: argparse.Namespace) -> None:
    from ..text_discovery import discover_text, draw, table

    loaded, inputs, tokens = text_of(arguments)
    knobs = {"cut": arguments.cut, "n": arguments.n, "alpha": arguments.alpha}
    if arguments.cut is None:
        knobs["n"] = loaded.model.config.hidden_size if arguments.n is None else arguments.n
        knobs["alpha"] = 0.01 if arguments.alpha is None else arguments.alpha
    options = {name: getattr(arguments, name) for name in ("layer", "heads", "max_order", "null", "draws")}
    kept = Kept(arguments.save)
    measure = partial(
        discover_text, loaded.model, inputs, tokens, special=loaded.tokenizer.all_special_tokens,
        sweep=arguments.sweep or 0, on_level=kept, **knobs, **options,
    )  # fmt: skip
    try:
        print_measured(arguments, measure, Progress("discover", "searches"), table, draw, finished=kept)
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {kept.leave()}") from None


class Kept:
    """The graphs so far: in a file after every level where there is one, else when the run is interrupted."""

    def __init__(self, path: Path | None):
        self.path, self.result = path, None

    def __call__(self, result) -> None:
        self.result = result
        if self.path is not None:
            write({self.path: result.to_json().encode()})

    def leave(self) -> str:
        if self.result is None:
            return "no level was finished"
        if self.path is None:
            self.path = LEFT
            self(self.result)
        return f"the graphs up to the last finished level are in {self.path}"

"""causalattn discover: the graphs of a layer's heads beside their nulls, and what a prediction hangs on."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..console import CommandError, Progress, one_line, write
from .arguments import numbers, positive
from .model import Loaded, add_text, text_of
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
    graph.add_argument(
        "--explain", metavar="TOKEN", help="also: the tokens that its prediction hangs on; next: that of what follows"
        " the text, or of its class",
    )  # fmt: skip
    graph.add_argument("--max-size", type=positive, default=3, metavar="K", help="of an explanation (default: 3)")
    graph.add_argument("--replacement", metavar="TOKEN", help="in the tokens' place (default: mask, else padding)")
    graph.add_argument("--figure", type=Path, metavar="FILE", help="draw the head furthest from its null into this PNG")
    graph.add_argument("--save", type=Path, metavar="FILE", help="keep the graphs so far there, after every level")
    add_text(graph)
    graph.set_defaults(run=_discover)


def _discover(arguments: argparse.Namespace) -> None:
    from ..plot.text_discovery import draw_best
    from ..text_discovery import discover_text, table

    loaded, inputs, tokens = text_of(arguments, head=arguments.explain is not None)
    search = _search(arguments, loaded)
    kept = Kept(arguments.save)
    measure = partial(
        discover_text, loaded.model, inputs, tokens, special=loaded.tokenizer.all_special_tokens, null=arguments.null,
        draws=arguments.draws, sweep=arguments.sweep or 0, on_level=kept, **search,
    )  # fmt: skip
    draw = draw_best
    if arguments.explain is not None:
        options = search | {"target": _target(arguments.explain, tokens), "max_size": arguments.max_size}
        options |= {"tokenizer": loaded.tokenizer, "replacement": _replacement(arguments.replacement, loaded)}
        measure = partial(_explain, measure, loaded, inputs, tokens, options)
        table, draw = _tables, lambda both: draw_best(both.graphs)
    try:
        print_measured(arguments, measure, Progress("discover", "searches"), table, draw, finished=kept)
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {kept.leave()}") from None


class Explained(NamedTuple):
    """The graphs of a text, and the explanation of a prediction by them."""

    graphs: NamedTuple
    explanation: NamedTuple

    def to_json(self) -> str:
        whole = json.loads(self.graphs.to_json()) | {"explanation": json.loads(self.explanation.to_json())}
        return json.dumps(whole, ensure_ascii=False)


def _explain(measure: Callable, loaded: Loaded, inputs: dict, tokens: list[str], options: dict, progress) -> Explained:
    """The explanation first: what cannot be explained is said before anything is searched or kept."""
    from ..text_explanation import explain_text

    sets = Progress("explain", "sets")
    try:
        explanation = explain_text(loaded.model, inputs, tokens, progress=sets, **options)
    finally:
        sets.close()
    return Explained(measure(progress=progress), explanation)


def _tables(both: Explained) -> list[str]:
    from ..text_discovery import table as graphs
    from ..text_explanation import table as explanation

    return [*graphs(both.graphs), "", *explanation(both.explanation)]


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


def _search(arguments: argparse.Namespace, loaded: Loaded) -> dict:
    """The options of a search: with neither a cut nor a sample size, the hidden size as published."""
    search = {name: getattr(arguments, name) for name in ("layer", "heads", "cut", "n", "alpha", "max_order")}
    if arguments.cut is None:
        search["n"] = loaded.model.config.hidden_size if arguments.n is None else arguments.n
        search["alpha"] = 0.01 if arguments.alpha is None else arguments.alpha
    return search


def _target(token: str, tokens: list[str]) -> int | None:
    """The position of a token named by its text, or None for what follows."""
    from ..interventions.address import locate

    if token == "next":
        return None
    try:
        places = locate(token, tokens)
    except ValueError as error:
        raise CommandError(f"--explain: {one_line(error)}") from error
    if isinstance(places, str) or len(places) != 1:
        raise CommandError(f"--explain takes one token, got {token!r}")
    return places[0]


def _replacement(token: str | None, loaded: Loaded) -> int | None:
    """The number of the vocabulary's token of that name."""
    vocabulary = loaded.tokenizer.get_vocab()
    if token is not None and token not in vocabulary:
        raise CommandError(f"--replacement: {token!r} is not in the vocabulary of {loaded.name}")
    return None if token is None else vocabulary[token]

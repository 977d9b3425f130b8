"""causalattn demo: a small pretrained model on a sentence and a page of prose, and memories of images."""

import argparse
from functools import partial
from pathlib import Path

from ..analysis import Report
from ..console import CommandError, Progress, write
from ..report import to_html
from .analyze import add_files, print_section, score
from .model import DEMO_PACKAGE, SENTENCE, Loaded, load_chosen
from .output import check_plotting, print_files, print_measured

PASSAGE = Path(__file__).parents[1] / "demo.txt"
PASSAGE_TOKENS = 512
# last layer of gpt2 on SENTENCE, mean over its heads, as first published
GPT2_SCORE = 0.810


def add(commands) -> None:
    demo = commands.add_parser("demo", help="the same on a small pretrained model, a sentence and a page of prose")
    demo.add_argument("--model", metavar="PATH_OR_NAME", help=f"another model (default: the weights in {DEMO_PACKAGE})")
    add_files(demo)
    demo.set_defaults(run=_demo)
    memory = demo.add_subparsers(metavar="[hopfield]").add_parser(
        "hopfield", help="damaged images retrieved from a classical and a modern Hopfield network"
    )
    memory.add_argument("--patterns", type=int, default=6, metavar="N", help="images to store, 2 to 12 (default: 6)")
    memory.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default: 0)")
    memory.add_argument("--figure", type=Path, metavar="FILE", help="draw it into this PNG")
    memory.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    memory.set_defaults(run=_demo_hopfield)


def _demo(arguments: argparse.Namespace) -> None:
    check_plotting(True)
    loaded = load_chosen(arguments.model)
    texts = {"sentence": SENTENCE, "passage": PASSAGE.read_text("utf-8")}
    sections = [score(loaded, title, text, True, PASSAGE_TOKENS) for title, text in texts.items()]
    chosen = arguments.figures or arguments.html
    figures = arguments.figures or (None if chosen else Path("causalattn-demo"))
    page = arguments.html or (None if chosen else Path("causalattn-demo", "report.html"))
    files = {}
    if figures:
        files |= {figures / f"{s.title}-{drawing.name}.png": drawing.png() for s in sections for drawing in s.drawings}
    if page:
        files[page] = to_html(loaded.name, sections).encode()
    write(files)
    for section in sections:
        print_section(section, {})
    _print_last_layer(loaded, sections[0].report)
    print_files(files)


def _demo_hopfield(arguments: argparse.Namespace) -> None:
    from ..memory_demo import compare_memories, table
    from ..plot.hopfield import draw_memory

    if arguments.model or arguments.figures or arguments.html:
        raise CommandError("demo hopfield takes none of --model, --figures, --html")
    measure = partial(compare_memories, arguments.patterns, seed=arguments.seed)
    print_measured(arguments, measure, Progress("hopfield", "networks"), table, draw_memory)


def _print_last_layer(loaded: Loaded, report: Report) -> None:
    """What the masked DAG score of a causal model's last layer amounts to."""
    last = [row for row in report.rows(top=0) if row["layer"] == report.layer_ids[-1]]
    if not last[0]["causal"]:
        return
    T = len(report.tokens[0])
    mean = sum(row["dag_score"] for row in last) / len(last)
    uniform = 1 - sum(1 / n for n in range(1, T + 1)) / T
    line = f"\nlast layer, mean over heads: DAG score {mean:.3f}; uniform attention 1 − H_T/T, T = {T}: {uniform:.3f}"
    print(line + (f"; published for gpt2: {GPT2_SCORE:.3f}" if loaded.model.config.model_type == "gpt2" else ""))

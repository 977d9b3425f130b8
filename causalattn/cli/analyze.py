"""causalattn analyze: the scores of a model's heads on a text, or on every document of a corpus."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..analysis import analyze, capture
from ..console import CommandError, Progress, one_line, read, write
from ..report import CAUSAL_NOTE, Section, cell, columns_of, received_text, to_html
from .arguments import numbers, positive
from .corpus import add_corpus, analyze_documents, check_no_corpus
from .model import Loaded, check_text, encode, load
from .output import check_plotting, print_files
from .sharded import check_processes, score_sharded


def add(commands) -> None:
    sub = commands.add_parser("analyze", help="score the heads of a model on a text or a corpus")
    sub.add_argument("--model", required=True, metavar="PATH_OR_NAME", help="a transformers model")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 text file")
    sub.add_argument("--layers", type=numbers, metavar="0,5", help="only these layers")
    sub.add_argument("--heads", type=numbers, metavar="0,5", help="only these heads of each layer")
    sub.add_argument("--max-tokens", type=positive, metavar="N", help="leave out the text after N tokens")
    sub.add_argument("--json", action="store_true", help="print JSON in place of the table")
    add_files(sub)
    sub.add_argument("--distributed", action="store_true", help="this is one of torchrun's processes")
    add_corpus(sub, source)
    sub.set_defaults(run=_analyze)


def add_files(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--figures", type=Path, metavar="DIR", help="write figures into this folder")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")


def _analyze(arguments: argparse.Namespace) -> None:
    if arguments.corpus:
        return analyze_documents(arguments)
    check_no_corpus(arguments)
    text = read(arguments.file) if arguments.text is None else arguments.text
    check_text(text, arguments.file or "--text")
    check_plotting(arguments.figures or arguments.html)
    if arguments.distributed:
        check_processes(arguments)
    loaded = load(arguments.model)
    title = arguments.file.name if arguments.file else "text"
    if arguments.distributed:
        section = score_sharded(loaded, title, text, arguments)
        if section is None:
            return None
    else:
        chosen = {"layers": arguments.layers, "heads": arguments.heads}
        drawn = bool(arguments.figures or arguments.html)
        section = score(loaded, title, text, drawn, arguments.max_tokens, **chosen)
    files = {}
    if arguments.figures:
        files |= {arguments.figures / f"{drawing.name}.png": drawing.png() for drawing in section.drawings}
    if arguments.html:
        files[arguments.html] = to_html(loaded.name, [section]).encode()
    write(files)
    if arguments.json:
        print(section.report.to_json())
    else:
        print_section(section, files)


def score(
    loaded: Loaded, title: str, text: str, drawn: bool, max_tokens: int | None, layers=None, heads=None
) -> Section:
    """Analyze one text, and draw its figures where they are wanted."""
    inputs, tokens, left_out = encode(loaded, text, max_tokens)
    progress = Progress(title)
    try:
        with redirect_stdout(sys.stderr):  # whatever a model prints is not the result
            report = analyze(loaded.model, inputs, layers=layers, heads=heads, tokens=tokens, progress=progress)
            if not drawn:
                return Section(title, text, report, (), left_out)
            from ..plot import draw_all, strongest_heads

            needed = {report.layer_ids[-1], strongest_heads(report, 1)[0][0]}
            drawings = draw_all(report, capture(loaded.model, inputs, needed))
    except (ValueError, NotImplementedError) as error:
        raise CommandError(one_line(error)) from error
    finally:
        progress.close()
    return Section(title, text, report, drawings, left_out)


def print_section(section: Section, files: dict[Path, bytes]) -> None:
    rows = section.report.rows()
    print(f"\n{section.title}: {len(section.report.tokens[0])} tokens")
    used = columns_of(rows)
    table = [[heading for _, heading, _ in used] + ["most received tokens"]]
    table += [[cell(row, name) for name, _, _ in used] + [received_text(row)] for row in rows]
    widths = [max(len(line[n]) for line in table) for n in range(len(used))]
    for *scores, tokens in table:
        print("  ".join(text.rjust(width) for text, width in zip(scores, widths, strict=True)), "", tokens)
    print("Each z is against the exact permutation null; “no sink” masks each row's first token.")
    if any(row["causal"] for row in rows):
        print(CAUSAL_NOTE)
    print_files(files)

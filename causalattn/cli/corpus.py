"""causalattn analyze --corpus: the scores of a model's heads on every document of a corpus."""

import argparse
import importlib.util
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..console import CommandError, Progress, one_line
from ..corpus import CorpusResult, analyze_corpus
from ..corpus.shards import SETTINGS
from .arguments import positive
from .model import load

# what says nothing without --corpus, and what says nothing with it
OWN = ("out", "text_field", "id_field", "documents_per_shard", "long", "device")
OTHERS = ("figures", "html")


def add_corpus(sub: argparse.ArgumentParser, source) -> None:
    source.add_argument("--corpus", nargs="+", metavar="FILE", help="JSONL and Parquet files of documents")
    sub.add_argument("--out", type=Path, metavar="DIR", help="of a corpus: where its Parquet files go")
    sub.add_argument("--text-field", metavar="NAME", help="a document's text (default: text)")
    sub.add_argument("--id-field", metavar="NAME", help="a document's name (default: none)")
    sub.add_argument("--long", choices=("skip", "cut"), help="documents that the model cannot take (default: skip)")
    sub.add_argument("--documents-per-shard", type=positive, metavar="N", help="of each Parquet file (default: 64)")
    sub.add_argument("--device", metavar="NAME", help="where the model runs (default: cpu)")


def check_no_corpus(arguments: argparse.Namespace) -> None:
    _refuse(arguments, OWN, "needs --corpus")


def analyze_documents(arguments: argparse.Namespace) -> None:
    _refuse(arguments, OTHERS, "cannot be with --corpus")
    if arguments.out is None:
        raise CommandError("--corpus needs --out")
    if importlib.util.find_spec("pyarrow") is None:
        raise CommandError("pyarrow is not installed: pip install 'causalattn[corpus]'")
    rank, world_size = _place() if arguments.distributed else (0, 1)
    result = _run(arguments, rank, world_size)
    facts = {"out": str(arguments.out), "rank": rank, "world_size": world_size} | result._asdict()
    who = f"rank {rank} of {world_size}: " if arguments.distributed else ""
    line = (
        f"{who}documents: {result.documents:,}, skipped: {result.skipped:,}, rows: {result.rows:,}, "
        f"shards: {result.shards:,} ({result.resumed:,} were there), "
        f"{result.documents_per_second:.1f} documents a second, in {arguments.out}"
    )
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else line)
    if result.skipped:
        print(f"causalattn: why documents were skipped: {arguments.out / '_part-*.json'}", file=sys.stderr)


def _run(arguments: argparse.Namespace, rank: int, world_size: int) -> CorpusResult:
    loaded = load(arguments.model)
    model = _moved(loaded.model, arguments)
    options = {name: getattr(arguments, name) for name in ("layers", "heads", "max_tokens")}
    given = {"text": arguments.text_field, "documents_per_shard": arguments.documents_per_shard, "long": arguments.long}
    options |= {name: value for name, value in given.items() if value is not None}
    progress = Progress("corpus" if world_size == 1 else f"rank 0 of {world_size}", "documents", rate=True)
    # one bar a terminal
    progress.shown &= rank == 0
    try:
        with redirect_stdout(sys.stderr):
            return analyze_corpus(
                model, loaded.tokenizer, arguments.corpus, arguments.out, id=arguments.id_field, rank=rank,
                world_size=world_size, progress=progress, **options,
            )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise CommandError(one_line(error)) from error
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        begun = (arguments.out / SETTINGS).exists()
        raise CommandError(what + "; what is done is kept, and the same command goes on" * begun) from error
    finally:
        progress.close()


def _moved(model, arguments: argparse.Namespace):
    """The model on its device; of several processes each takes a GPU of its own."""
    device = arguments.device or "cpu"
    if device == "cuda" and arguments.distributed:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device}: {one_line(error)}") from error


def _place() -> tuple[int, int]:
    """This process among torchrun's."""
    try:
        rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except (KeyError, ValueError):
        raise CommandError("--distributed needs RANK and WORLD_SIZE, as torchrun sets them") from None
    return rank, world_size


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise CommandError(f"--{name.replace('_', '-')} {why}")

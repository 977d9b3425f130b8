"""One document's rows, or the reason why it has none."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..analysis import Report, analyze
from .source import BadDocument, Document

# what the rows of a report are made of
WANT = ("dag_score", "entropy", "columns", "received_mean", "asymmetry")
# no document's fault
FATAL = (NotImplementedError, torch.OutOfMemoryError, torch.AcceleratorError)


class Scorer(NamedTuple):
    """A model with its tokenizer, and what of a document is analyzed."""

    model: nn.Module
    tokenizer: object
    max_tokens: int | None
    long: Literal["skip", "cut"]
    layers: Sequence[int] | None
    heads: Sequence[int] | None

    def rows(self, document: Document) -> list[dict]:
        """The document's part of the table.

        Raises:
            BadDocument: it has no text, no token, too many or one that the model lacks, or its scores are not finite.
        """
        if document.reason is not None:
            raise BadDocument(document.reason)
        inputs, left_out = self._inputs(document.text)
        tokens = self.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        on_device = {name: x.to(self.model.device) for name, x in inputs.items()}
        try:
            report = analyze(self.model, on_device, want=WANT, layers=self.layers, heads=self.heads, tokens=tokens)
        except FATAL:
            raise
        except (IndexError, RuntimeError) as error:  # such as a position beyond the model's tables
            reason = str(error).partition("\n")[0]
            raise BadDocument(f"the model raised {type(error).__name__}: {reason}") from error
        _check_finite(report)
        start = {"document": document.number, "id": document.id, "tokens": len(tokens), "tokens_left_out": left_out}
        return [start | row for row in report.rows()]

    def _inputs(self, text: str) -> tuple[dict, int]:
        """The model's inputs, and how many tokens they leave out."""
        inputs = self.tokenizer(text, return_tensors="pt", truncation=False, verbose=False)
        whole = inputs["input_ids"].shape[1]
        if whole <= self.tokenizer.num_special_tokens_to_add():
            raise BadDocument("no tokens")
        kept = whole if self.max_tokens is None else min(whole, self.max_tokens)
        limit = token_limit(self.model, self.tokenizer)
        if limit is not None and kept > limit:
            if self.long == "skip":
                raise BadDocument(f"{kept} tokens are more than the {limit} that the model takes")
            kept = limit
        if kept < whole:
            inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=kept, verbose=False)
        known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        largest = int(inputs["input_ids"].max())
        if known is not None and largest >= known:
            raise BadDocument(f"token {largest} is not among the {known} of the model")
        return dict(inputs), whole - kept


def token_limit(model: nn.Module, tokenizer, *limits: int | None) -> int | None:
    """The most tokens that the model, its tokenizer and other limits allow; None where none of them says so."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length, *limits)
    # a tokenizer that knows no limit says 10³⁰
    return min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)


def _check_finite(report: Report) -> None:
    for layer, stats in zip(report.layer_ids, report.layers, strict=True):
        if not (stats.entropy.isfinite().all() and stats.dag_score.isfinite().all()):
            raise BadDocument(f"the scores of layer {layer} are not finite")

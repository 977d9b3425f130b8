"""Every document of a corpus through a model, a shard at a time; what is done is kept, what is not is done again."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from ..integrations.transformers.families import self_attention, using
from .scores import Scorer
from .settings import settings_of
from .shards import Shards
from .source import BadDocument, Corpus
from .table import load_pyarrow, to_parquet


class CorpusResult(NamedTuple):
    """What there is of a rank's shards: documents in the table, documents skipped, rows, shards.

    resumed: how many of the shards were there before. seconds: what this call took, documents_per_second: how fast it
    read those of the other shards.
    """

    documents: int
    skipped: int
    rows: int
    shards: int
    resumed: int
    seconds: float
    documents_per_second: float


def analyze_corpus(
    model: nn.Module,
    tokenizer,
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    text: str = "text",
    id: str | None = None,
    max_tokens: int | None = None,
    long: Literal["skip", "cut"] = "skip",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    documents_per_shard: int = 64,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusResult:
    """Analyze every document of JSONL and Parquet files, and leave a row a document, layer and head in Parquet files.

    Documents are numbered through all sources. Those from n·documents_per_shard on are shard n: part-n.parquet, and
    _part-n.json, its manifest, which names the documents that were skipped and why. Both are written under other names,
    synced and renamed, the manifest last. A job that was killed is resumed by the same call, with any world_size:
    shards whose manifest holds are not touched. _corpus.json says what the job is. A document's rows are those of
    `analyze` of it alone, and the files' bytes the same however often the job was killed.

    Args:
        model, tokenizer: as in `analyze`, and its transformers tokenizer; documents go to the model's device.
        sources: .jsonl, .ndjson and .parquet files, in this order; each is read once whole and hashed at the start.
        out: a folder, empty or of the same job.
        text, id: the fields, or columns, of a document's text and of its name.
        max_tokens: of a document; what is longer is cut, the column tokens_left_out says by how much.
        long: what becomes of a document that then is longer than the model or the tokenizer allows.
        layers, heads: as in `analyze`.
        documents_per_shard: how much is lost by a kill.
        rank, world_size: shard n is analyzed where n % world_size is rank.
        progress: called as progress(done, total) with this rank's documents, at the start and after each.

    Returns:
        CorpusResult of this rank's shards.

    Raises:
        ImportError: pyarrow is not installed.
        NotImplementedError, TypeError: as `analyze`.
        ValueError: no document at all, an unknown kind of source, a column that is not there, a folder that holds
            another job or something else; as `analyze`.
        OSError: a source that cannot be read, a folder that cannot be written or is full; no part of a shard stays.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"sank": 0}, unk_token="sank")))
        >>> folder = tempfile.TemporaryDirectory()
        >>> texts = Path(folder.name, "texts.jsonl")
        >>> _ = texts.write_text('{"text": "sank"}\\n{"text": 5}\\n')
        >>> result = analyze_corpus(BertModel(small), words, texts, Path(folder.name, "out"))
        >>> result.documents, result.skipped, result.rows
        (1, 1, 2)
    """
    layers, heads = (None if numbers is None else list(numbers) for numbers in (layers, heads))
    chosen = {"text": text, "id": id, "max_tokens": max_tokens, "long": long, "layers": layers, "heads": heads}
    _check(model, tokenizer, chosen, documents_per_shard, rank, world_size)
    began = time.perf_counter()
    corpus = Corpus(sources, text, id)
    chosen["documents_per_shard"] = documents_per_shard
    shards = Shards(Path(out), settings_of(model, tokenizer, corpus.facts(), chosen), rank, world_size)
    scorer = Scorer(model, tokenizer, max_tokens, long, layers, heads)
    spans = _spans(corpus.documents, documents_per_shard, rank, world_size)
    found = {n: shards.done(n) for n in spans}
    missing = {n: span for n, span in spans.items() if found[n] is None}
    left, total = sum(map(len, missing.values())), sum(map(len, spans.values()))
    read = _Counter(total - left, total, progress)
    with using(model):
        for n, span in missing.items():
            found[n] = shards.commit(n, *_shard(scorer, corpus, span, read))
    seconds = time.perf_counter() - began
    analyzed, rows = (sum(manifest[name] for manifest in found.values()) for name in ("analyzed", "rows"))
    resumed = len(spans) - len(missing)
    return CorpusResult(analyzed, total - analyzed, rows, len(spans), resumed, seconds, left / seconds)


def _spans(documents: int, size: int, rank: int, world_size: int) -> dict[int, range]:
    """The documents of each shard of this rank."""
    starts = range(0, documents, size)[rank::world_size]
    return {start // size: range(start, min(start + size, documents)) for start in starts}


class _Counter:
    """Documents read, of all that there are."""

    def __init__(self, done: int, total: int, progress: Callable[[int, int], None] | None):
        self.done, self.total, self.progress = done, total, progress
        self.add(0)

    def add(self, n: int) -> None:
        self.done += n
        if self.progress is not None and self.total:
            self.progress(self.done, self.total)


def _shard(scorer: Scorer, corpus: Corpus, span: range, read: _Counter) -> tuple[bytes, dict]:
    """A shard's table, and its manifest."""
    rows, skipped = [], []
    for document in corpus.read(span.start, span.stop):
        try:
            rows += scorer.rows(document)
        except BadDocument as error:
            skipped.append({"document": document.number, "id": document.id, "reason": str(error)})
        read.add(1)
    analyzed = len(span) - len(skipped)
    facts = {"documents": [span.start, span.stop], "analyzed": analyzed, "rows": len(rows), "skipped": skipped}
    return to_parquet(rows), facts


def _check(model: nn.Module, tokenizer, chosen: dict, documents_per_shard: int, rank: int, world_size: int) -> None:
    load_pyarrow()
    self_attention(model)
    if chosen["long"] not in ("skip", "cut"):
        raise ValueError(f"long must be 'skip' or 'cut', got {chosen['long']!r}")
    for name, value in (("documents_per_shard", documents_per_shard), ("world_size", world_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank!r}")
    special, most = tokenizer.num_special_tokens_to_add(), chosen["max_tokens"]
    if most is not None and (not isinstance(most, int) or most <= special):
        raise ValueError(f"max_tokens must be an integer of at least {special + 1}, got {most!r}")

"""Documents of JSONL and Parquet files, one file after another, read lazily and from any document on."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from .table import load_pyarrow

# documents between two places of a JSONL file that are remembered
STRIDE = 256
BLOCK = 2**20


class BadDocument(ValueError):
    """Why a document is left out."""


class Document(NamedTuple):
    """Its number in the corpus, its name where it has one, and its text, or the reason why there is none."""

    number: int
    id: str | None
    text: str | None
    reason: str | None = None


class JsonLines:
    """One document a line; a blank line is none."""

    def __init__(self, path: Path):
        self.path, self.documents, self.places = path, 0, []
        digest, self.bytes = hashlib.sha256(), 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    if self.documents % STRIDE == 0:
                        self.places.append(self.bytes)
                    self.documents += 1
                self.bytes += len(line)
                digest.update(line)
        self.sha256 = digest.hexdigest()

    def records(self, start: int, stop: int) -> Iterator[object]:
        """What the lines hold, or a BadDocument in place of what is not JSON."""
        with self.path.open("rb") as file:
            file.seek(self.places[start // STRIDE])
            skipped = start % STRIDE
            lines = islice((line for line in file if line.strip()), skipped, skipped + stop - start)
            yield from map(_parsed, lines)


class ParquetRows:
    """One document a row, read a row group at a time."""

    def __init__(self, path: Path, columns: Sequence[str]):
        pyarrow = load_pyarrow()
        digest, self.bytes = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                self.bytes += len(block)
        self.sha256 = digest.hexdigest()
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"sources must be JSONL or Parquet, got {path}: {str(error).splitlines()[0]}") from error
        names = self.file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ValueError(f"{path} must have a column {column!r}, got {', '.join(names)}")
        self.path, self.columns, self.documents = path, list(columns), self.file.metadata.num_rows
        sizes = [self.file.metadata.row_group(n).num_rows for n in range(self.file.metadata.num_row_groups)]
        self.groups = [(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]
        self.held = None, None

    def records(self, start: int, stop: int) -> Iterator[object]:
        for n, (first, end) in enumerate(self.groups):
            if first < stop and start < end:
                begin = max(start, first)
                yield from self._group(n).slice(begin - first, min(stop, end) - begin).to_pylist()

    def _group(self, n: int):
        """A row group; the last one is kept, as shards are smaller."""
        if self.held[0] != n:
            self.held = n, self.file.read_row_group(n, columns=self.columns)
        return self.held[1]


class Corpus:
    """The documents of all sources, numbered through."""

    def __init__(self, sources: str | os.PathLike | Sequence[str | os.PathLike], text: str, id: str | None):
        paths = [sources] if isinstance(sources, str | os.PathLike) else sources
        self.text, self.id = text, id
        self.sources = [_opened(Path(path), [text] if id in (None, text) else [text, id]) for path in paths]
        self.documents = sum(source.documents for source in self.sources)
        if not self.documents:
            names = ", ".join(str(source.path) for source in self.sources)
            raise ValueError(f"sources must hold at least one document, got {names or 'no file'}")

    def facts(self) -> list[dict]:
        """What tells these sources from others; where they lie is not part of it."""
        return [
            {"name": s.path.name, "documents": s.documents, "bytes": s.bytes, "sha256": s.sha256} for s in self.sources
        ]

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """The documents from start to stop.

        Raises:
            ValueError: a source has become shorter since it was opened.
        """
        first = 0
        for source in self.sources:
            begin, end = max(start - first, 0), min(stop - first, source.documents)
            if begin < end:
                number = first + begin - 1
                for number, record in enumerate(source.records(begin, end), first + begin):
                    yield self._document(number, record)
                if number + 1 < first + end:
                    raise ValueError(f"{source.path} must not change while it is read, got fewer documents than before")
            first += source.documents

    def _document(self, number: int, record: object) -> Document:
        if isinstance(record, BadDocument):
            return Document(number, None, None, str(record))
        if not isinstance(record, dict):
            return Document(number, None, None, f"a document must be a JSON object, got {type(record).__name__}")
        name = None if self.id is None else record.get(self.id)
        # a name is no reason to fail, whatever it is
        name = None if name is None else str(name).encode("utf-8", "backslashreplace").decode()
        if self.text not in record:
            return Document(number, name, None, f"no field {self.text!r}")
        text = record[self.text]
        if not isinstance(text, str):
            return Document(number, name, None, f"{self.text} must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Document(number, name, None, f"{self.text} is not valid Unicode")
        return Document(number, name, text)


def _opened(path: Path, columns: Sequence[str]) -> JsonLines | ParquetRows:
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if path.suffix == ".parquet":
        return ParquetRows(path, columns)
    raise ValueError(f"sources must end in .jsonl, .ndjson or .parquet, got {path}")


def _parsed(line: bytes) -> object:
    try:
        return json.loads(str(line.strip(), "utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadDocument(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadDocument(f"not JSON: {error}")

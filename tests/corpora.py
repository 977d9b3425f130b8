"""Corpora of a tiny model's words, and what a folder of shards holds."""

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_checkpoint import WORDS, save_checkpoint
from transformers import AutoModel, AutoTokenizer

import causalattn as ca

# a token no other document has
POISON = "rope"


@functools.cache
def checkpoint(family="bert"):
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), family)
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def texts(n):
    """n different texts of 1 to 9 words."""
    known = [word for word in WORDS if word != POISON]
    return [" ".join(known[(7 * i + k * (i + 1)) % len(known)] for k in range(i % 9 + 1)) for i in range(n)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_parquet(path, columns, group=3):
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def expected_rows(model, tokenizer, text, number=0, id=None, **options):
    """What the table must hold of one document."""
    inputs = tokenizer(text, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    start = {"document": number, "id": id, "tokens": len(tokens), "tokens_left_out": 0}
    rows = ca.analyze(model, inputs, tokens=tokens, **options).rows()
    return [start | {name: value for name, value in row.items() if name != "sequence"} for row in rows]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(folder):
    """Of the folder read as one table."""
    return pq.read_table(folder).to_pylist()


def skipped_in(folder):
    manifests = [json.loads(path.read_bytes()) for path in sorted(folder.glob("_part-*.json"))]
    return [(bad["document"], bad["id"], bad["reason"]) for manifest in manifests for bad in manifest["skipped"]]

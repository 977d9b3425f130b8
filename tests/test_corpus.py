"""A corpus gives what its documents give alone, whatever the shards, the ranks and the bad documents among them."""

import copy
import itertools
import json

import pytest
import torch
from corpora import POISON, checkpoint, contents, expected_rows, rows_of, skipped_in, texts, write_jsonl, write_parquet

import causalattn as ca
from causalattn.corpus import scores


@pytest.fixture
def corpus(tmp_path):
    """17 documents: 10 of JSONL with blank lines between them, 7 of Parquet in three row groups."""
    lines = [json.dumps({"name": f"n{i}", "text": text}) for i, text in enumerate(texts(10))]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n \n".join(lines), "utf-8")
    columns = {"other": [None] * 7, "text": texts(17)[10:], "name": list(range(7))}
    return [tmp_path / "a.jsonl", write_parquet(tmp_path / "b.parquet", columns)]


def analyzed(sources, out, family="bert", **options):
    return ca.analyze_corpus(*checkpoint(family), sources, out, **options)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rows_are_those_of_each_document_alone(corpus, tmp_path, family):
    result = analyzed(corpus, tmp_path / "out", family, id="name", documents_per_shard=4)
    names = [f"n{i}" for i in range(10)] + [str(i) for i in range(7)]
    expected = [
        row
        for number, (text, name) in enumerate(zip(texts(17), names, strict=True))
        for row in expected_rows(*checkpoint(family), text, number, name)
    ]
    assert rows_of(tmp_path / "out") == expected
    assert result[:5] == (17, 0, 17 * 4, 5, 0) and result.documents_per_second == 17 / result.seconds
    parts = [pattern.format(n) for pattern in ("_part-{:05d}.json", "part-{:05d}.parquet") for n in range(5)]
    assert [*contents(tmp_path / "out")] == ["_corpus.json", *parts]
    manifest = json.loads((tmp_path / "out" / "_part-00004.json").read_bytes())
    assert manifest["documents"] == [16, 17] and manifest["rows"] == 4


def test_layers_and_heads_are_chosen(corpus, tmp_path):
    analyzed(corpus, tmp_path / "out", layers=[1], heads=iter([1, 0]))
    assert [(row["layer"], row["head"]) for row in rows_of(tmp_path / "out")] == [(1, 1), (1, 0)] * 17


@pytest.mark.parametrize("size", [1, 5, 64])
def test_any_number_of_ranks_leaves_the_same_bytes(corpus, tmp_path, size):
    for world_size in (1, 2, 3):
        results = [
            analyzed(corpus, tmp_path / str(world_size), documents_per_shard=size, rank=rank, world_size=world_size)
            for rank in reversed(range(world_size))
        ]
        assert sum(result.documents for result in results) == 17
        assert contents(tmp_path / str(world_size)) == contents(tmp_path / "1")


def test_a_job_goes_on_with_another_number_of_ranks(corpus, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    analyzed(corpus, whole, documents_per_shard=2)
    assert analyzed(corpus, out, documents_per_shard=2, rank=1, world_size=2).documents == 8
    found = [analyzed(corpus, out, documents_per_shard=2, rank=rank, world_size=3) for rank in range(3)]
    assert [result.resumed for result in found] == [1, 2, 1] and [result.shards for result in found] == [3, 3, 3]
    assert contents(out) == contents(whole)


def test_what_is_done_is_not_touched_again(corpus, tmp_path, monkeypatch):
    first = analyzed(corpus, tmp_path / "out", documents_per_shard=4)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(scores, "analyze", None)
    again = analyzed(corpus, tmp_path / "out", documents_per_shard=4)
    assert again[:4] == first[:4] and again.resumed == 5 and again.documents_per_second == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_progress_counts_documents_and_starts_with_what_was_done(corpus, tmp_path):
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyzed(corpus, tmp_path / "out", documents_per_shard=5, progress=stop)
    assert seen == [(n, 17) for n in range(7)]
    analyzed(corpus, tmp_path / "out", documents_per_shard=5, progress=lambda *at: seen.append(at))
    assert seen[7:] == [(n, 17) for n in range(5, 18)]


def test_a_rank_without_a_shard_has_nothing_to_do(corpus, tmp_path):
    result = analyzed(corpus, tmp_path / "out", rank=1, world_size=2, progress=lambda done, total: 1 / 0)
    assert result[:5] == (0, 0, 0, 0, 0) and not (tmp_path / "out").exists()


BAD = [
    (b'{"text": "the ship"', "not JSON: Expecting ',' delimiter: line 1 column 20 (char 19)"),
    (b"the ship", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    (b'{"text": "caf\xe9"}', "not UTF-8: invalid continuation byte at byte 13"),
    (b'["the ship"]', "a document must be a JSON object, got list"),
    (b'"the ship"', "a document must be a JSON object, got str"),
    (b'{"body": "the ship"}', "no field 'text'"),
    (b'{"text": null}', "text must be a string, got NoneType"),
    (b'{"text": ["the ship"]}', "text must be a string, got list"),
    (b'{"text": "a\\ud800"}', "text is not valid Unicode"),
    (b'{"text": ""}', "no tokens"),
    (b'{"text": " \\n"}', "no tokens"),
]


def test_bad_documents_are_named_and_the_others_are_as_without_them(tmp_path):
    good = texts(len(BAD) + 1)
    lines = itertools.chain(
        *((json.dumps({"text": text}).encode(), bad) for text, (bad, _) in zip(good, BAD, strict=False))
    )
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, json.dumps({"text": good[-1]}).encode()]))
    result = analyzed(tmp_path / "a.jsonl", tmp_path / "out", documents_per_shard=7)
    assert result[:3] == (len(good), len(BAD), 4 * len(good))
    found = skipped_in(tmp_path / "out")
    assert [number for number, _, _ in found] == [*range(1, 2 * len(BAD), 2)]
    for (_, _, reason), (_, expected) in zip(found, BAD, strict=True):
        assert reason.startswith(expected)
    expected = [row for i, text in enumerate(good) for row in expected_rows(*checkpoint(), text, 2 * i)]
    assert rows_of(tmp_path / "out") == expected


def test_a_shard_of_bad_documents_is_an_empty_table(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", {"text": [None, "the ship", None, ""], "id": ["a", None, "c", "d"]})
    result = analyzed(source, tmp_path / "out", id="id", documents_per_shard=2)
    assert result[:4] == (1, 3, 4, 2) and {row["document"] for row in rows_of(tmp_path / "out")} == {1}
    reason = "text must be a string, got NoneType"
    assert skipped_in(tmp_path / "out") == [(0, "a", reason), (2, "c", reason), (3, "d", "no tokens")]


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_a_document_that_the_model_gives_nan_on_is_skipped(tmp_path, weight):
    model, tokenizer = copy.deepcopy(checkpoint()[0]), checkpoint()[1]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(POISON)] = weight
    good = texts(6)
    bad = f"{good[2]} {POISON} {good[3]}"
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (*good[:3], bad, *good[3:])])
    ca.analyze_corpus(model, tokenizer, source, tmp_path / "out")
    assert skipped_in(tmp_path / "out") == [(3, None, "the scores of layer 0 are not finite")]
    numbers = (0, 1, 2, 4, 5, 6)
    expected = [row for n, text in zip(numbers, good, strict=True) for row in expected_rows(model, tokenizer, text, n)]
    assert rows_of(tmp_path / "out") == expected


def test_a_document_longer_than_the_model_is_skipped_or_cut(tmp_path):
    model, tokenizer = checkpoint()
    words = (" ".join(texts(60)).split())[:70]
    lengths = (64, 65, 70, 3)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": " ".join(words[:n])} for n in lengths])
    analyzed(source, tmp_path / "skip")
    assert [(row["document"], row["tokens"]) for row in rows_of(tmp_path / "skip")] == [(0, 64)] * 4 + [(3, 3)] * 4
    reasons = [reason for _, _, reason in skipped_in(tmp_path / "skip")]
    assert reasons == [f"{n} tokens are more than the 64 that the model takes" for n in (65, 70)]
    analyzed(source, tmp_path / "cut", long="cut")
    analyzed(source, tmp_path / "both", max_tokens=66)
    analyzed(source, tmp_path / "short", max_tokens=5)
    found = {
        name: [(row["tokens"], row["tokens_left_out"]) for row in rows_of(tmp_path / name)[::4]]
        for name in ("cut", "both", "short")
    }
    assert found["cut"] == [(64, 0), (64, 1), (64, 6), (3, 0)] and found["both"] == [(64, 0), (3, 0)]
    assert found["short"] == [(5, 59), (5, 60), (5, 65), (3, 0)]
    expected = expected_rows(model, tokenizer, " ".join(words[:64]), 2)
    assert rows_of(tmp_path / "cut")[8:12] == [row | {"tokens_left_out": 6} for row in expected]


def test_a_token_that_the_model_lacks_is_a_bad_document(tmp_path):
    model, tokenizer = copy.deepcopy(checkpoint()[0]), checkpoint()[1]
    model.resize_token_embeddings(len(tokenizer) - 1)
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the ship"}, {"text": f"the {last}"}])
    assert ca.analyze_corpus(model, tokenizer, source, tmp_path / "out")[:2] == (1, 1)
    assert skipped_in(tmp_path / "out")[0][2] == f"token {len(tokenizer) - 1} is not among the 16 of the model"


def test_a_position_that_the_model_lacks_is_a_bad_document(tmp_path):
    model, tokenizer = copy.deepcopy(checkpoint()[0]), checkpoint()[1]
    model.config.max_position_embeddings = 100
    words = " ".join(texts(60)).split()
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": " ".join(words[:n])} for n in (65, 64)])
    assert ca.analyze_corpus(model, tokenizer, source, tmp_path / "out")[:2] == (1, 1)
    assert skipped_in(tmp_path / "out")[0][2].startswith("the model raised RuntimeError: The expanded size")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("lost")])
def test_what_is_no_documents_fault_ends_the_job(corpus, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(scores, "analyze", fail)
    with pytest.raises(type(error)):
        analyzed(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_of_any_kind_is_kept_as_text(tmp_path):
    names = ["storm", 7, None, {"a": [1]}, "\ud800"]
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "the ship", "id": name} for name in names] + [{"text": "sank"}]
    )
    analyzed(source, tmp_path / "out", id="id")
    found = [row["id"] for row in rows_of(tmp_path / "out")[::4]]
    assert found == ["storm", "7", None, "{'a': [1]}", "\\ud800", None]


def test_an_empty_file_among_others_is_noted(corpus, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.ndjson").write_bytes(b"\n \n")
    nothing = write_parquet(tmp_path / "nothing.parquet", {"text": []})
    empty = [tmp_path / "empty.jsonl", tmp_path / "blank.ndjson", nothing]
    analyzed([empty[0], corpus[0], *empty[1:], corpus[1]], tmp_path / "out")
    analyzed(corpus, tmp_path / "without")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "without")
    sources = json.loads((tmp_path / "out" / "_corpus.json").read_bytes())["sources"]
    assert [source["documents"] for source in sources] == [0, 10, 0, 0, 7]
    with pytest.raises(ValueError, match=r"^sources must hold at least one document, got .*empty.jsonl, .*nothing.pa"):
        analyzed(empty, tmp_path / "none")
    with pytest.raises(ValueError, match=r"^sources must hold at least one document, got no file$"):
        analyzed([], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_documents_are_found_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("causalattn.corpus.source.STRIDE", 3)
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in texts(n)]) for n in (1, 3, 4, 7)]
    numbered = [text for n in (1, 3, 4, 7) for text in texts(n)]
    found = ca.corpus.source.Corpus(sources, "text", None)
    for start, stop in itertools.combinations(range(16), 2):
        read = [*found.read(start, stop)]
        assert [(each.number, each.text) for each in read] == [*enumerate(numbered)][start:stop]

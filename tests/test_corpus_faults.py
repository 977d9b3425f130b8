"""What goes wrong while a corpus is read and written: one clear error, nothing half-written, nothing lost."""

import copy
import itertools
import json
import os
import shutil

import pytest
import torch
from corpora import checkpoint, contents, texts, write_jsonl, write_parquet

import causalattn as ca
from causalattn.corpus import table


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A source of five documents, and what an undisturbed job leaves of it in three shards."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "a.jsonl", [{"text": text, "body": text, "n": text} for text in texts(5)])
    analyzed(source, folder / "out")
    return source, folder / "out"


def analyzed(sources, out, model=None, tokenizer=None, **options):
    return ca.analyze_corpus(
        model or checkpoint()[0], tokenizer or checkpoint()[1], sources, out, **{"documents_per_shard": 2} | options
    )


class Failing:
    """Raises in place of its n-th call, and does what was to be done in the others; a file is cut where it fails."""

    def __init__(self, function, n, error):
        self.function, self.n, self.error, self.calls = function, n, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.n:
            if self.function is os.fsync:
                cut(args[0])
            raise self.error
        return self.function(*args, **kwargs)


def cut(handle):
    """Half of the file has come to the disk."""
    try:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
    except OSError:  # a folder
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_at_any_step_leaves_whole_shards_only(corpus, tmp_path, monkeypatch, name, error):
    source, whole = corpus
    for n in itertools.count(1):
        out = tmp_path / str(n)
        failing = Failing(getattr(os, name), n, error)
        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing)
            try:
                analyzed(source, out)
            except (OSError, KeyboardInterrupt) as raised:
                assert "No space left" in str(raised) or raised is error
            else:
                break
        left = contents(out)
        assert left.items() <= contents(whole).items()
        parts = sorted({*left} - {"_corpus.json"}, key=lambda name: name.lstrip("_"))
        assert parts == [
            name.format(k) for k in range(len(parts) // 2) for name in ("_part-{:05d}.json", "part-{:05d}.parquet")
        ]
        analyzed(source, out)
        assert contents(out) == contents(whole)
    # _corpus.json, and three shards of two files
    assert n - 1 == {"replace": 1 + 3 * 2, "fsync": 2 + 3 * 4}[name]


def test_a_full_disk_names_the_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 3, OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*part-00000.parquet.tmp'") as raised:
        analyzed(corpus[0], tmp_path / "out")
    assert raised.value.errno == 28 and [*contents(tmp_path / "out")] == ["_corpus.json"]


def damage(out, kind):
    parquet, manifest = out / "part-00001.parquet", out / "_part-00001.json"
    if kind == "no table":
        parquet.unlink()
    elif kind == "half a table":
        parquet.write_bytes(parquet.read_bytes()[:-100])
    elif kind == "another table":
        shutil.copy(out / "part-00000.parquet", parquet)
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:-100])
    else:
        manifest.write_text(kind)


KINDS = ["no table", "half a table", "another table", "no manifest", "half a manifest", "[]", "{}", '{"sha256": 1}']


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_made_again(corpus, tmp_path, kind):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    damage(out, kind)
    assert analyzed(source, out).resumed == 2
    assert contents(out) == contents(whole)


def test_leftovers_of_a_kill_go_with_the_rank_that_owns_them(corpus, tmp_path):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    left = [".part-00001.parquet.tmp", "._part-00001.json.tmp", ".part-00002.parquet.tmp", ".corpus-00003.json.tmp"]
    for name in [*left, "notes.txt", ".other.tmp"]:
        (out / name).write_text("half")
    analyzed(source, out, rank=0, world_size=2)
    assert {*contents(out)} - {*contents(whole)} == {*left} - {left[2]} | {"notes.txt", ".other.tmp"}
    analyzed(source, out, rank=1, world_size=2)
    assert {*contents(out)} - {*contents(whole)} == {"notes.txt", ".other.tmp"}


def other_model(change):
    model = copy.deepcopy(checkpoint()[0])
    change(model)
    return model


def sharpen(model):
    model.encoder.layer[1].attention.self.query.weight.data *= 1.01


OTHERS = [
    ({"text": "body"}, "text = 'text', got 'body'"),
    ({"id": "n"}, "id = None, got 'n'"),
    ({"max_tokens": 9}, "max_tokens = None, got 9"),
    ({"long": "cut"}, "long = 'skip', got 'cut'"),
    ({"layers": [1]}, r"layers = None, got \[1\]"),
    ({"heads": [1, 0]}, r"heads = None, got \[1, 0\]"),
    ({"documents_per_shard": 3}, "documents_per_shard = 2, got 3"),
    ({"model": lambda: other_model(sharpen)}, "weights = '[0-9a-f]{64}', got '[0-9a-f]{64}'"),
    ({"model": lambda: other_model(torch.nn.Module.double)}, "weights = "),
    ({"model": lambda: checkpoint("gpt2")[0]}, "model = 'BertModel', got 'GPT2Model'"),
    ({"model": lambda: other_model(lambda m: setattr(m.config, "layer_norm_eps", 0.1))}, "config = "),
]


@pytest.mark.parametrize(("options", "message"), OTHERS, ids=[message.split(" ")[0] for _, message in OTHERS])
def test_a_job_is_not_resumed_as_another(corpus, tmp_path, options, message):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    if "model" in options:
        options = {"model": options["model"]()}
    with pytest.raises(ValueError, match=f"out was begun with {message}"):
        analyzed(source, out, **options)
    assert contents(out) == contents(whole)


def test_another_source_another_tokenizer_and_another_version_are_refused(corpus, tmp_path, monkeypatch):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    changed = tmp_path / "a.jsonl"
    changed.write_bytes(source.read_bytes().replace(b"storm", b"Storm"))
    with pytest.raises(ValueError, match=r"begun with sources\[0\].sha256 = "):
        analyzed(changed, out)
    with pytest.raises(ValueError, match=r"begun with sources\[1\].name = None, got 'a.jsonl'"):
        analyzed([source, source], out)
    tokenizer = type(checkpoint()[1])(tokenizer_object=checkpoint()[1].backend_tokenizer, unk_token="the")
    with pytest.raises(ValueError, match="begun with tokenizer = "):
        analyzed(source, out, tokenizer=tokenizer)
    monkeypatch.setattr(ca, "__version__", "9")
    with pytest.raises(ValueError, match=r"begun with causalattn = '0.1.0', got '9'"):
        analyzed(source, out)
    assert contents(out) == contents(whole)


def test_a_moved_source_and_a_used_tokenizer_are_the_same_job(corpus, tmp_path):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    checkpoint()[1]("the ship finally sank", truncation=True, max_length=2)
    model = ca.integrations.transformers.use(other_model(torch.nn.Module.train))
    assert analyzed([shutil.copy(source, tmp_path / "a.jsonl")], out, model=model).resumed == 3


def test_a_job_that_another_rank_has_begun_meanwhile_is_found_out(corpus, tmp_path):
    source, out = corpus[0], tmp_path / "out"

    def begin(done, total):
        if done == 1:
            analyzed(source, out, documents_per_shard=1)

    with pytest.raises(ValueError, match="begun with documents_per_shard = 1, got 2"):
        analyzed(source, out, progress=begin)
    assert len(contents(out)) == 1 + 2 * 5


def test_a_folder_that_is_not_a_jobs_is_left_alone(corpus, tmp_path):
    source, whole = corpus
    out = shutil.copytree(whole, tmp_path / "out")
    for other in ("{", "[]", '{"documents": 7}'):
        (out / "_corpus.json").write_text(other)
        with pytest.raises(
            ValueError, match=r"^out must be empty or hold a job's _corpus.json, got another .*out/_cor"
        ):
            analyzed(source, out)
    (out / "_corpus.json").unlink()
    with pytest.raises(ValueError, match=r"^out must be empty or hold a job's _corpus.json, got .*part-0000.* without"):
        analyzed(source, out)
    with pytest.raises(ValueError, match=r"^out must be a folder, got the file .*a.jsonl$"):
        analyzed(source, source)
    with pytest.raises(OSError, match="Not a directory"):
        analyzed(source, source / "out")


def test_a_source_that_cannot_be_read_is_one_sentence(corpus, tmp_path):
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more PAR1")
    (tmp_path / "d.jsonl").mkdir()
    other = write_parquet(tmp_path / "e.parquet", {"body": ["a"], "id": ["a"]})
    refusals = {
        tmp_path / "none.jsonl": (FileNotFoundError, r"No such file or directory: '.*none.jsonl'"),
        tmp_path / "none.parquet": (FileNotFoundError, r"No such file or directory: '.*none.parquet'"),
        tmp_path / "notes.txt": (ValueError, r"^sources must end in .jsonl, .ndjson or .parquet, got .*notes.txt$"),
        tmp_path / "b.parquet": (ValueError, r"^sources must be JSONL or Parquet, got .*b.parquet: "),
        tmp_path / "c.parquet": (ValueError, r"^sources must be JSONL or Parquet, got .*c.parquet: "),
        tmp_path / "d.jsonl": (IsADirectoryError, "d.jsonl"),
        other: (ValueError, r"e.parquet must have a column 'text', got body, id$"),
    }
    for path, (kind, message) in refusals.items():
        with pytest.raises(kind, match=message) as raised:
            analyzed([corpus[0], path], tmp_path / "out")
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"e.parquet must have a column 'name', got body, id$"):
        analyzed(other, tmp_path / "out", text="body", id="name")
    assert not (tmp_path / "out").exists()


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(6)])

    def shrink(done, total):
        if done == 2:
            source.write_bytes(b"\n".join(source.read_bytes().split(b"\n")[:3]))

    with pytest.raises(ValueError, match=r"a.jsonl must not change while it is read, got fewer documents than before"):
        analyzed(source, tmp_path / "out", progress=shrink)
    assert [*contents(tmp_path / "out")] == ["_corpus.json", "_part-00000.json", "part-00000.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long": "drop"}, "long must be 'skip' or 'cut', got 'drop'"),
        ({"documents_per_shard": 0}, "documents_per_shard must be an integer of at least 1, got 0"),
        ({"world_size": 0}, "world_size must be an integer of at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"rank": -1}, "rank must be from 0 to 0, got -1"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"layers": [5]}, r"layers must be among \[0, 1\], got \[5\]"),
        ({"heads": [2]}, r"heads must be different numbers from 0 to 1, got \[2\]"),
    ],
)
def test_a_wrong_argument_leaves_no_folder(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        analyzed(corpus[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_transformers_model_is_refused(corpus, tmp_path):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        analyzed(corpus[0], tmp_path / "out", model=torch.nn.Linear(1, 1))


def test_without_pyarrow_the_extra_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^pyarrow is not installed: pip install 'causalattn\[corpus\]'$"):
        analyzed(corpus[0], tmp_path / "out")
    assert table.SCHEMA == 1 and json.loads((corpus[1] / "_corpus.json").read_bytes())["schema"] == 1

"""A job that is killed at any moment, then resumed, leaves the bytes of one that was not disturbed."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpora import contents, texts, write_jsonl, write_parquet
from tiny_checkpoint import save_checkpoint
from tiny_models import full

import causalattn

DOCUMENTS = 24


class Jobs:
    """Command lines that run one after another in children of one process, and may be killed."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.model = str(save_checkpoint(folder / "model"))
        lines = [{"text": text} for text in texts(DOCUMENTS // 2)] + [{"no": "text"}]
        rest = {"text": texts(DOCUMENTS)[DOCUMENTS // 2 :]}
        sources = write_jsonl(folder / "a.jsonl", lines), write_parquet(folder / "b.parquet", rest)
        self.command = ["analyze", "--model", self.model, "--documents-per-shard", "2", "--corpus", *map(str, sources)]
        place = {"PYTHONPATH": str(Path(causalattn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        place |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        script = [sys.executable, str(Path(__file__).with_name("corpus_job.py")), self.model]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(script, env=os.environ | place, **pipes)
        assert self.answer() == "ready"

    def answer(self):
        return self.process.stdout.readline().strip()

    def run(self, out, *more, kill_after=None, **fate):
        """The exit code of a job and how long it took."""
        job = {"argv": [*self.command, "--out", str(out), *more], "log": str(self.log), **fate}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        pid, began = int(self.answer()), time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            # it may have ended by then
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self.answer()), time.perf_counter() - began

    def said(self):
        return self.log.read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    running = Jobs(tmp_path_factory.mktemp("jobs"))
    yield running
    running.process.stdin.close()
    assert running.process.wait() == 0


@pytest.fixture(scope="module")
def whole(jobs):
    """What an undisturbed job leaves, and how long it takes."""
    out = jobs.folder / "whole"
    code, seconds = jobs.run(out)
    assert code == 0, jobs.said()
    return contents(out), seconds


def check_shards(out, whole):
    """Whatever else is left, each manifest there is names a whole table, and each table can be read."""
    for manifest in out.glob("_part-*.json"):
        named = json.loads(manifest.read_bytes())
        table = manifest.with_name(manifest.name.removeprefix("_")).with_suffix(".parquet")
        assert named["sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    for table in out.glob("part-*.parquet"):
        pq.read_table(table)
    assert {
        name: content for name, content in contents(out).items() if not name.startswith(".")
    }.items() <= whole.items()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_and_resumed(jobs, whole, tmp_path, kills):
    expected, seconds = whole
    moments, killed, seen = random.Random(kills), 0, set()
    for n in itertools.count():
        out = tmp_path / str(n)
        code, _ = jobs.run(out, kill_after=seconds * moments.uniform(0.1, 0.95))
        killed += code == -signal.SIGKILL
        if out.exists():
            check_shards(out, expected)
            seen.add(len([*out.glob("_part-*.json")]))
        assert jobs.run(out)[0] == 0, jobs.said()
        assert contents(out) == expected
        if killed == kills:
            break
    assert kills == 2 or len(seen) > 3


def test_killed_again_and_again_until_it_is_done(jobs, whole, tmp_path):
    expected, seconds = whole
    out = tmp_path / "out"
    for n in range(1, 100):
        code, _ = jobs.run(out, kill_after=seconds * (0.3 + 0.1 * n))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert contents(out) == expected


# three of _corpus.json, six of the first shard, of which the fifth puts the manifest there, six of the second
@pytest.mark.parametrize("step", [2, 4, 8, *full(1, 3, 5, 6, 7, *range(9, 16))])
def test_killed_in_place_of_a_step(jobs, whole, tmp_path, step):
    expected, _ = whole
    out = tmp_path / "out"
    assert jobs.run(out, dies_at=step)[0] == -signal.SIGKILL
    check_shards(out, expected)
    assert len([*out.glob("_part-*.json")]) == (step > 3 + 5) + (step > 3 + 6 + 5)
    assert jobs.run(out)[0] == 0, jobs.said()
    assert contents(out) == expected


def test_a_file_that_may_not_grow_leaves_nothing_half_written(jobs, whole, tmp_path):
    expected, _ = whole
    sizes = {name: len(content) for name, content in expected.items()}
    limit = sizes["part-00000.parquet"] - 1
    assert limit > sizes["_corpus.json"]
    out = tmp_path / "out"
    code, _ = jobs.run(out, limit=limit)
    assert code == 2 and [*contents(out)] == ["_corpus.json"]
    refusal = f"File too large: '{out / '.part-00000.parquet.tmp'}'; what is done is kept, and the same command goes on"
    assert jobs.said()[-1].startswith("causalattn: error: ") and jobs.said()[-1].endswith(refusal)
    code, _ = jobs.run(out)
    assert code == 0 and contents(out) == expected


@pytest.mark.full
def test_torchrun_shares_a_corpus_among_its_processes(jobs, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "causalattn"]
    place = {"PYTHONPATH": str(Path(causalattn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command += [*jobs.command, "--distributed", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda line: line["rank"])
    assert [line["rank"] for line in found] == [0, 1] and sum(line["documents"] for line in found) == DOCUMENTS
    assert contents(tmp_path / "out") == whole[0]

"""Processes that run a function of tests/sharded.py side by side, each a rank of a gloo group, and what each returned.

They start once and serve groups of every size: rank r of W is the process r.
"""

import datetime
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1, 2, 3, 4, 8)


class Ranks:
    """The processes; `run` waits for all that take part, and raises what one of them did."""

    def __init__(self, count: int = SIZES[-1], seconds: float = 60):
        self.folder = tempfile.TemporaryDirectory()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        arguments = [str(count), str(Path(self.folder.name) / "rendezvous"), str(seconds)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
            )
            for rank in range(count)
        ]

    def run(self, world: int, function: str, *args, **options) -> list:
        """What each of the first `world` ranks returned of sharded.function(mesh, *args, **options)."""
        self.start(world, function, *args, **options)
        answers = [self.answer(rank) for rank in range(world)]
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.rebuilt()
        return answers

    def start(self, world: int, function: str, *args, **options) -> None:
        for process in self.processes[:world]:
            pickle.dump((world, function, args, options), process.stdin)
            process.stdin.flush()

    def answer(self, rank: int):
        return pickle.load(self.processes[rank].stdout)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.folder.cleanup()


class Failure:
    """An error of a rank, which may not be pickled itself."""

    def __init__(self, error: BaseException):
        self.kind, self.text, self.trace = type(error).__name__, str(error), traceback.format_exc()

    def rebuilt(self) -> Exception:
        kinds = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError, RuntimeError)}
        return kinds.get(self.kind, AssertionError)(self.text if self.kind in kinds else self.trace)


def _serve(rank: int, count: int, rendezvous: str, seconds: float) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # whatever else is printed must not end up among the answers
    os.dup2(2, 1)
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=timeout)
    meshes = {}
    for size in SIZES:
        if size <= count:
            group = dist.new_group(range(size), timeout=timeout)
            meshes[size] = DeviceMesh.from_group(group, "cpu") if rank < size else None
    import sharded

    while True:
        try:
            world, function, args, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(sharded, function)(meshes[world], *args, **options)
        except Exception as error:
            answer = Failure(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # so that what it pickles is found by the name that the tests know
    from processes import Failure, _serve

    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))

"""Command lines in forked children of a process that has everything imported, so that many can be killed.

A line of JSON on stdin is a job: argv, log, and what befalls it: a limit of bytes a file, a step at which it dies.
Answered by the child's pid, and when it has ended by its exit code.
"""

import itertools
import json
import os
import resource
import signal
import sys


def main(model: str) -> None:
    from causalattn.cli.model import load
    from causalattn.corpus.table import load_pyarrow

    load_pyarrow()
    load(model)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(**job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(argv: list[str], log: str, limit: int | None = None, dies_at: int | None = None) -> int:
    from causalattn import cli

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if dies_at is not None:
        steps = itertools.count(1)
        for name in ("fsync", "replace"):
            setattr(os, name, deadly(getattr(os, name), steps, dies_at))
    code = cli.main(argv)
    sys.stdout.flush()
    return code


def deadly(function, steps, dies_at: int):
    """The function, but the process dies in place of the step; of a file that was to be synced half is there."""

    def call(*args):
        if next(steps) == dies_at:
            if function.__name__ == "fsync":
                size = os.fstat(args[0]).st_size
                if not os.path.isdir(f"/proc/self/fd/{args[0]}"):
                    os.ftruncate(args[0], size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


if __name__ == "__main__":
    main(sys.argv[1])

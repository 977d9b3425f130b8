"""causalattn analyze --distributed: one text whose tokens torchrun's processes share."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import distributed
from ..console import CommandError, Progress, one_line
from ..report import Section
from .model import Loaded, encode

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def score_sharded(loaded: Loaded, title: str, text: str, arguments: argparse.Namespace) -> Section | None:
    """Analyze one text over all processes; the section on the first of them, None on the others."""
    with _processes() as mesh:
        first = mesh.get_local_rank() == 0
        # the others would say the same of the text
        with nullcontext() if first else redirect_stderr(io.StringIO()):
            inputs, tokens, left_out = encode(loaded, text, arguments.max_tokens)
        model = loaded.model.to(mesh.device_type)
        inputs = {name: x.to(mesh.device_type) for name, x in inputs.items()}
        progress = Progress(f"{title}, {mesh.size()} ranks")
        progress.shown &= first
        try:
            with redirect_stdout(sys.stderr):
                options = {"layers": arguments.layers, "tokens": tokens, "progress": progress}
                report = distributed.analyze(model, inputs, mesh=mesh, **options)
        except (ValueError, NotImplementedError) as error:
            if not first:
                # it says the same on every rank
                raise SystemExit(2) from error
            raise CommandError(one_line(error)) from error
        except RuntimeError as error:
            raise CommandError(f"rank {mesh.get_local_rank()}: {one_line(error)}") from error
        finally:
            progress.close()
        return Section(title, text, report, (), left_out) if first else None


def check_processes(arguments: argparse.Namespace) -> None:
    """Before a model is loaded: whether this is one of torchrun's processes, and asked for what they can do."""
    for name in ("figures", "heads"):
        if getattr(arguments, name):
            raise CommandError(f"--{name} cannot be with --distributed")
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise CommandError(
            f"--distributed needs {missing[0]}, which torchrun sets: "
            "torchrun --nproc-per-node 4 -m causalattn analyze --distributed …"
        )


@contextmanager
def _processes() -> Iterator[DeviceMesh]:
    """A mesh of all of torchrun's processes: NCCL where each has a GPU, else gloo."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"the processes did not find one another: {one_line(error)}") from error
    try:
        yield mesh
    finally:
        dist.destroy_process_group()

"""Every test runs under the Triton interpreter where there is no GPU, and with NaN in whatever was left unwritten."""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# before anything imports Triton: a kernel is bound to the interpreter where it is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter

settings.register_profile("default", max_examples=8, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=100, deadline=None, derandomize=True)

ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
# tests that share what takes long to start or to compile, or this repository: one pytest worker runs each group
TOGETHER = {"test_distributed": "ranks", "test_distributed_errors": "ranks", "test_distributed_model": "ranks",
            "test_kernel_sheet": "sheet", "test_packaging": "packages", "test_bench_compare": "worktrees"}  # fmt: skip
# beyond this a test wants address space, not memory
LARGEST_FILLED = 2**26


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="full example counts, and the tests marked full")
    parser.addoption("--claims", metavar="FILE", help="write what tests/test_claims.py measures into this page")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "default")
    if interpreter.interpreter is not None:
        interpreter.patch_once()
    # the interpreter's objects are many and form no cycles
    gc.set_threshold(100_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    # the user's own
    if config.getoption("dist") != "load":
        return None

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return TOGETHER.get(Path(nodeid.partition("::")[0]).stem, nodeid)

    return Together(config, log)


@pytest.fixture(scope="session")
def ranks():
    """Eight processes, started once, that share a sequence."""
    from processes import Ranks

    started = Ranks()
    yield started
    started.close()


def pytest_pyfunc_call(pyfuncitem):
    names = pyfuncitem._fixtureinfo.argnames
    interpreter.call_with_room(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def unwritten(dtype):
    """What no correct result holds: NaN, or for integers a value far below every index."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    if dtype == torch.bool:
        return True
    return torch.iinfo(dtype).min // 2 if dtype.is_signed else torch.iinfo(dtype).max


def hostile(allocate):
    def fill(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.numel() <= LARGEST_FILLED:
            with torch.no_grad():
                out.fill_(unwritten(out.dtype))
        return out

    return fill


HOSTILE = [(owner, name, hostile(getattr(owner, name))) for owner, name in ALLOCATORS]

# torch remembers on first use which functions build tensors: let it see the real ones
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def same_random_numbers_in_any_order():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_unwritten_memory(monkeypatch):
    for owner, name, fill in HOSTILE:
        monkeypatch.setattr(owner, name, fill)

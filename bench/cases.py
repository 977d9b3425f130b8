"""What every benchmark case shares: inputs, stated bounds, timing, peak memory, and the rows that a run leaves."""

import ctypes
import functools
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
OURS = "causalattn"
ROWS: list[dict] = []
# seconds beyond which a call is made once: importing and compiling are little of it
ONCE = 20

# (heads, T, D): a layer of 32 heads on a GPU; what an eager peer takes seconds for on two cores
if DEVICE == "cuda":
    SHORT = LONG = [(32, T, D) for D in (64, 128) for T in (4096, 16384)]
else:
    SHORT = [(4, T, 64) for T in (1024, 4096)]
    LONG = [*SHORT, (4, 16384, 64), pytest.param((4, 32768, 64), marks=pytest.mark.long)]


def name_of(shape) -> str:
    return "H{}-T{}-D{}".format(*shape) if isinstance(shape, tuple) else str(shape)


def inputs(heads: int, T: int, D: int, B: int = 1) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(T)
    return [torch.randn(B, heads, T, D, generator=generator, device=DEVICE, dtype=DTYPE) for _ in range(3)]


def first_head(*tensors: Tensor) -> list[Tensor]:
    """Of each the first head in float64: what an eager reference can afford."""
    return [x[:, :1].double() for x in tensors]


def some_rows(q: Tensor) -> Tensor:
    """64 of the T rows."""
    return torch.arange(0, q.shape[2], q.shape[2] // 64, device=q.device)


def matrix(heads: int, T: int, dtype: torch.dtype) -> Tensor:
    """Attention maps at hand, [1, heads, T, T]."""
    generator = torch.Generator(DEVICE).manual_seed(T)
    x = torch.empty(1, heads, T, T, device=DEVICE, dtype=dtype)
    for h in range(heads):
        x[0, h] = torch.randn(T, T, generator=generator, device=DEVICE).softmax(-1)
    return x


class Ceilings(NamedTuple):
    """What this machine does a second: FLOPs, bytes read and written, exponentials."""

    matmul: float
    copy: float
    exp2: float


@functools.cache
def ceilings() -> Ceilings:
    """A square product of DTYPE, a copy far larger than any cache, and exp2 of what a cache holds.

    No exp2 of torch's is bound by a GPU's exponentials, so there they are counted: 16 a clock and multiprocessor.
    """
    n = 8192 if DEVICE == "cuda" else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    matmul = 2 * n**3 / _fastest(lambda: a @ a)
    source = torch.ones(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _fastest(lambda: target.copy_(source))
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Ceilings(matmul, copy, 16 * properties.multi_processor_count * properties.clock_rate * 1e3)
    tile = torch.rand(512, 512)
    out = torch.empty_like(tile)
    return Ceilings(matmul, copy, tile.numel() / _fastest(lambda: torch.exp2(tile, out=out)))


def _fastest(function: Callable) -> float:
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="min") / 1e3
    function()
    return min(clock(function) for _ in range(10))


def clock(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def work(
    q: Tensor, k: Tensor, products: int, *, exps: int = 1, causal: bool = False, moved: int = 0
) -> dict[str, float]:
    """What an operator must do: products of 2·D FLOPs and exponentials a score; bytes of q, k and `moved` others."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] / (2 if causal else 1)
    return {"flops": 2 * products * scores * q.shape[3], "exps": exps * scores, "moved": q.nbytes + k.nbytes + moved}


def stated_bound(flops: float, exps: float, moved: float) -> tuple[float, str]:
    """The milliseconds below which that work cannot be done at the ceilings, and the ceiling that says so."""
    amounts = zip((flops, moved, exps), ceilings(), Ceilings._fields, strict=True)
    return max((1e3 * amount / ceiling, name) for amount, ceiling, name in amounts)


def add_bandwidth(moved: int, reference: str = "copy") -> None:
    """GB/s of the row measured last, of so many bytes, and its fraction of the reference peer's in the same run."""
    row = ROWS[-1]
    if row["ms"] is None:
        return
    row["gbytes_per_s"] = moved / row["ms"]["p50"] / 1e6
    same = [x for x in ROWS if all(x[name] == row[name] for name in ("operator", "shape"))]
    reached = [x["gbytes_per_s"] for x in same if x["peer"] == reference and x["ms"]]
    row[f"of_{reference}"] = row["gbytes_per_s"] / reached[-1] if reached else None


def unmeasured(operator: str, peer: str, q: Tensor, reason: str, **estimates: float) -> None:
    """A row that says why it has no time."""
    ROWS.append({**case_of(operator, peer, q), "ms": None, "reason": reason, **estimates, **versions()})


def case_of(operator: str, peer: str, q: Tensor) -> dict[str, object]:
    """What a row is of."""
    dtype = str(q.dtype).removeprefix("torch.")
    return {"operator": operator, "peer": peer, "shape": list(q.shape), "dtype": dtype, "device": device()}


@functools.cache
def room() -> int:
    """Bytes that a peer may need and still be run."""
    return int(0.9 * torch.cuda.mem_get_info()[1]) if DEVICE == "cuda" else 4 * 2**30


def seconds(benchmark, function: Callable, args: tuple, first: float) -> list[float]:
    """Times of calls after the first, which took so long; none of what takes a CPU some seconds."""
    if DEVICE == "cpu":
        if first > 3:
            return []
        benchmark.pedantic(function, args, rounds=5 if first < 1 else 2)
        return benchmark.stats.stats.data
    from triton.testing import do_bench

    times = do_bench(lambda: function(*args), warmup=50, rep=200, return_mode="all")
    benchmark.pedantic(function, args, rounds=1)
    return [ms / 1e3 for ms in times]


class Peak:
    """Of a `with` block the bytes held at most beyond what was held before it."""

    bytes: int = 0

    def __enter__(self) -> "Peak":
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif platform.system() == "Linux":
            # freed pages that the process still holds would be used again unseen
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif platform.system() == "Linux":
            self.bytes = max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@functools.cache
def device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {torch.get_num_threads()} threads"


@functools.cache
def versions() -> dict[str, str]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"torch": torch.__version__, "triton": version, "commit": commit.stdout.strip()}

"""What every benchmark case shares: inputs, timing, peak memory, and the rows that a run leaves."""

import platform
import subprocess
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LENGTHS = (1024, 4096, 16384, 32768)
ROWS: list[dict] = []


def inputs(T: int, heads: int = 4, D: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(T)
    return [torch.randn(1, heads, T, D, generator=generator, device=DEVICE, dtype=DTYPE) for _ in range(3)]


def matrix(heads: int, T: int, dtype: torch.dtype) -> torch.Tensor:
    """Attention maps at hand, [1, heads, T, T]."""
    generator = torch.Generator(DEVICE).manual_seed(T)
    x = torch.empty(1, heads, T, T, device=DEVICE, dtype=dtype)
    for h in range(heads):
        x[0, h] = torch.randn(T, T, generator=generator, device=DEVICE).softmax(-1)
    return x


def add_bandwidth(moved: int) -> None:
    """GB/s of the row measured last, of so many bytes, and its fraction of the copy's in the same run."""
    row = ROWS[-1]
    row["gbytes_per_s"] = moved / row["ms"]["p50"] / 1e6
    same = [x for x in ROWS if all(x[name] == row[name] for name in ("operator", "shape"))]
    copies = [x["gbytes_per_s"] for x in same if x["peer"] == "copy"]
    row["of_copy"] = row["gbytes_per_s"] / copies[-1] if copies else None


def unmeasured(operator: str, peer: str, q: torch.Tensor, reason: str, **estimates: float) -> None:
    ROWS.append({"operator": operator, "peer": peer, "shape": list(q.shape), "ms": None, "reason": reason, **estimates})


def seconds(benchmark, function, args) -> list[float]:
    if DEVICE == "cpu":
        benchmark.pedantic(function, args, rounds=5 if args[0].shape[2] <= 4096 else 2, warmup_rounds=1)
        return benchmark.stats.stats.data
    from triton.testing import do_bench

    times = do_bench(lambda: function(*args), warmup=50, rep=200, return_mode="all")
    benchmark.pedantic(function, args, rounds=1)
    return [ms / 1e3 for ms in times]


def peak_bytes(function, args) -> int:
    """Bytes that one call holds at most beyond what was held before it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function(*args)
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"torch": torch.__version__, "triton": version, "commit": commit.stdout.strip()}

"""Every case is checked, then timed, then run once more for its peak memory; a row a peer, ratios within one run."""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LENGTHS = (1024, 4096, 16384, 32768)
ROWS: list[dict] = []


def inputs(T: int, heads: int = 4, D: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(T)
    return [torch.randn(1, heads, T, D, generator=generator, device=DEVICE, dtype=DTYPE) for _ in range(3)]


@pytest.fixture
def measure(benchmark):
    """measure(operator, peer, function, *args, flops=, check=None): check, time, weigh, record."""

    def run(operator, peer, function, *args, flops, check=None):
        result = function(*args)
        if check is not None:
            check(result)
        del result
        seconds = _seconds(benchmark, function, args)
        q = args[0]
        ROWS.append(
            {
                "operator": operator,
                "peer": peer,
                "shape": list(q.shape),
                "dtype": str(q.dtype).removeprefix("torch."),
                "device": _device(),
                "ms": {f"p{p}": 1e3 * _quantile(seconds, p / 100) for p in (20, 50, 80)},
                "gflops": flops / _quantile(seconds, 0.5) / 1e9,
                "peak_mib": _peak(function, args) / 2**20,
                **_versions(),
            }
        )

    return run


def unmeasured(operator: str, peer: str, q: torch.Tensor, reason: str, **estimates: float) -> None:
    ROWS.append({"operator": operator, "peer": peer, "shape": list(q.shape), "ms": None, "reason": reason, **estimates})


def _seconds(benchmark, function, args) -> list[float]:
    if DEVICE == "cpu":
        benchmark.pedantic(function, args, rounds=5 if args[0].shape[2] <= 4096 else 3, warmup_rounds=1)
        return benchmark.stats.stats.data
    from triton.testing import do_bench

    times = do_bench(lambda: function(*args), warmup=50, rep=200, return_mode="all")
    benchmark.pedantic(function, args, rounds=1)
    return [ms / 1e3 for ms in times]


def _peak(function, args) -> int:
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


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def _device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"torch": torch.__version__, "triton": version, "commit": commit.stdout.strip()}


def pytest_sessionfinish(session):
    timed = {(row["operator"], tuple(row["shape"])): row["ms"]["p50"] for row in ROWS if row["peer"] == "causalattn"}
    for row in ROWS:
        ours = timed.get((row["operator"], tuple(row["shape"])))
        row["ratio"] = row["ms"]["p50"] / ours if row["ms"] and ours else None
    if ROWS:
        folder = Path(os.environ.get("RESULTS", "bench/results"))
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in _device().lower().split(",")[0]).strip("-")
        (folder / f"{name}.json").write_text(json.dumps(ROWS, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter):
    for row in ROWS:
        time = f"{row['ms']['p50']:10.1f} ms" if row["ms"] else f"{'—':>13}"
        ratio = f"{row['ratio']:6.2f}×" if row.get("ratio") else " " * 7
        memory = f"{row['peak_mib']:9.0f} MiB" if row.get("peak_mib") is not None else ""
        terminalreporter.write_line(
            f"{row['operator']:16} T={row['shape'][2]:<6} {row['peer']:24} {time} {ratio} {memory} "
            f"{row.get('reason', '')}"
        )

"""Every case is checked, then timed, then run once more for its peak memory; a row a peer, ratios within one run."""

import json
import os
from pathlib import Path

import pytest
from cases import ROWS, device, peak_bytes, quantile, seconds, versions


@pytest.fixture
def measure(benchmark):
    """measure(operator, peer, function, *args, flops=, check=None): check, time, weigh, record."""

    def run(operator, peer, function, *args, flops, check=None):
        result = function(*args)
        if check is not None:
            check(result)
        del result
        times = seconds(benchmark, function, args)
        q = args[0]
        ROWS.append(
            {
                "operator": operator,
                "peer": peer,
                "shape": list(q.shape),
                "dtype": str(q.dtype).removeprefix("torch."),
                "device": device(),
                "ms": {f"p{p}": 1e3 * quantile(times, p / 100) for p in (20, 50, 80)},
                "gflops": flops / quantile(times, 0.5) / 1e9,
                "peak_mib": peak_bytes(function, args) / 2**20,
                **versions(),
            }
        )

    return run


def pytest_sessionfinish(session):
    timed = {(row["operator"], tuple(row["shape"])): row["ms"]["p50"] for row in ROWS if row["peer"] == "causalattn"}
    for row in ROWS:
        ours = timed.get((row["operator"], tuple(row["shape"])))
        row["ratio"] = row["ms"]["p50"] / ours if row["ms"] and ours else None
    if ROWS:
        folder = Path(os.environ.get("RESULTS", "bench/results"))
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in device().lower().split(",")[0]).strip("-")
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

"""Every case is checked, then timed, then run once more for its peak memory; a row a peer, ratios within one run."""

import json
import os
import time
from pathlib import Path

import pytest
from cases import (
    DEVICE,
    ONCE,
    OURS,
    ROWS,
    Peak,
    case_of,
    ceilings,
    clock,
    device,
    quantile,
    room,
    seconds,
    stated_bound,
    unmeasured,
    versions,
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the cases of minutes too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def measure(benchmark):
    """measure(operator, peer, function, *args, flops=, exps=0, moved=0, needs=0, check=None).

    Checks, times, weighs and records. flops, exps and moved bytes are what the operator must do; without exps and
    moved no bound is stated. A peer that needs more bytes than there are, or that fails, leaves a row that says so.
    """

    def run(operator, peer, function, *args, flops, exps=0, moved=0, needs=0, check=None):
        q = args[0]
        if needs > room():
            unmeasured(operator, peer, q, "estimated, not run", peak_mib=needs / 2**20)
            return
        start = time.perf_counter()
        try:
            with Peak() as peak:
                result = function(*args)
        except Exception as error:
            if peer == OURS:
                raise
            estimate = {"peak_mib": needs / 2**20} if needs else {}
            unmeasured(operator, peer, q, _reason(error), **estimate)
            return
        first = time.perf_counter() - start
        if check is not None:
            check(result)
        del result
        times = [first]
        if first < ONCE:
            times = seconds(benchmark, function, args, first)
            # the first call also imports and compiles
            with Peak() as peak:
                again = clock(lambda: function(*args))
            times = times or [again]
        row = {
            **case_of(operator, peer, q),
            "ms": {f"p{p}": 1e3 * quantile(times, p / 100) for p in (20, 50, 80)},
            "gflops": flops / quantile(times, 0.5) / 1e9,
            "peak_mib": peak.bytes / 2**20,
            **versions(),
        }
        if exps or moved:
            row["bound_ms"], row["bound_by"] = stated_bound(flops, exps, moved)
            row["of_bound"] = row["bound_ms"] / row["ms"]["p50"]
            row["ceilings"] = ceilings()._asdict()
        if moved:
            row["flops_per_byte"] = flops / moved
        ROWS.append(row)

    return run


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def pytest_configure(config):
    # a peer that was not run, and what one that cannot run complains of before it says so
    for message in ("Benchmark fixture was not used", ".*attention", "Expected query, key and value"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_sessionfinish(session):
    timed = {(row["operator"], tuple(row["shape"])): row["ms"]["p50"] for row in ROWS if row["peer"] == OURS}
    for row in ROWS:
        ours = timed.get((row["operator"], tuple(row["shape"])))
        row["ratio"] = row["ms"]["p50"] / ours if row["ms"] and ours else None
    if ROWS:
        folder = Path(os.environ.get("RESULTS", "bench/results"))
        folder.mkdir(parents=True, exist_ok=True)
        name = "cpu" if DEVICE == "cpu" else "".join(c if c.isalnum() else "-" for c in device().lower())
        path = folder / f"{name}.json"
        before = json.loads(path.read_text("utf-8")) if path.exists() else []
        rows = json.dumps(joined(before, ROWS), indent=1, ensure_ascii=False)
        path.write_text(rows + "\n", "utf-8")


def joined(before: list[dict], rows: list[dict]) -> list[dict]:
    """The rows that were there, in place or replaced where measured again, and the new ones; two machines do not mix.

    A whole run on another machine takes the place of what was there; a part of one has none beside it.
    """
    if before and before[0]["device"] != rows[0]["device"]:
        if len(rows) < len(before) / 2:
            here, there = rows[0]["device"], before[0]["device"]
            raise pytest.UsageError(
                f"the rows there are of {there}, these {len(rows)} of {here}: run all, or set RESULTS"
            )
        before = []
    new = {_key(row): row for row in rows}
    kept = [new.pop(_key(row), row) for row in before]
    return kept + list(new.values())


def _key(row: dict) -> tuple:
    return row["operator"], tuple(row["shape"]), row["peer"]


def pytest_terminal_summary(terminalreporter):
    if any("of_bound" in row for row in ROWS):
        matmul, copy, exp2 = ceilings()
        terminalreporter.write_line(
            f"ceilings: matmul {matmul / 1e12:.2f} TFLOP/s, copy {copy / 1e9:.0f} GB/s, {exp2 / 1e9:.3g}e9 exp2/s"
        )
    for row in ROWS:
        terminalreporter.write_line(_line(row))


def _line(row: dict) -> str:
    time_ = f"{row['ms']['p50']:10.1f} ms" if row["ms"] else f"{'—':>13}"
    ratio = f"{row['ratio']:6.2f}×" if row.get("ratio") else ""
    rate = f"{row['gflops'] / 1e3:.3f} TFLOP/s" if row.get("gflops") else ""
    if row.get("gbytes_per_s"):
        rate = f"{row['gbytes_per_s']:.1f} GB/s"
    shares = [f"{row[name]:.0%} {name.replace('_', ' ')}" for name in row if name.startswith("of_") and row[name]]
    memory = f"{row['peak_mib']:.0f} MiB" if row.get("peak_mib") is not None else ""
    return (
        f"{row['operator']:30} {'×'.join(map(str, row['shape'])):16} {row['peer']:24} {time_} {ratio:>7} "
        f"{rate:>15} {memory:>10}  {', '.join(shares)}{row.get('reason', '')}"
    )

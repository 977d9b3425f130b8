"""README's tables, docs/speed.md, docs/predicted.md, docs/scaling.md and their figures from what was measured.

python bench/report.py            write them
python bench/report.py --check    fail where a page differs from bench/results and bench/counts.json
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import predict
import scaling
from cases import OURS
from figures import GROWN, growth, peak, roofline

from causalattn.complexity import LINEAR, SOFTMAX, Complexity, Point, crossover, fitted_exponent
from causalattn.plot.complexity import draw_complexity

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README, DOCS = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs"
BEGIN, END = "<!-- bench/report.py: {} -->", "<!-- end -->"
# what README shows: operator and tokens, in this order
SHOWN = [
    ("analyze of 6 layers", [1, 2048]),
    ("analyze of 6 layers", [1, 8192]),
    ("analyze of a corpus", [64, 137]),
    ("attention causal", [1, 4, 4096, 64]),
    ("row statistics", [1, 4, 4096, 64]),
    ("row statistics", [1, 4, 16384, 64]),
    ("dag_score", [1, 4, 16384, 64]),
    ("64 rows", [1, 4, 32768, 64]),
    ("cut of every edge", [1, 4, 4096, 64]),
    ("linear attention", [1, 4, 16384, 64]),
    ("selective scan", [1, 4096, 256]),
    ("hopfield retrieve", [262144, 64]),
    ("covariance float64 causal", [1, 4, 4096, 64]),
    ("20000 tests of |S| = 2", [64, 64]),
    ("1000000 tests of |S| = 2", [64, 64]),
    ("distributed attention", [1, 4, 8192, 64]),
    ("discovery", [20, 20]),
    ("discovery of a head to order 2", [256, 256]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the files differ")
    check = parser.parse_args().check
    rows = measured()
    wanted = {
        README: with_blocks(
            README.read_text("utf-8"), {"speed": readme_table(rows), "linear": softmax_or_linear(rows)}
        ),
        DOCS / "speed.md": page(rows),
        DOCS / "predicted.md": predict.page(predict.stored(), rows),
        DOCS / "scaling.md": scaling.page(),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from bench/results: run python bench/report.py", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(wanted[path], "utf-8")
    own = drawn(rows)
    for drawing in (growth(own), roofline(own), draw_complexity(complexity(own))):
        (DOCS / f"{drawing.name}.png").write_bytes(drawing.png())


def measured(folder: Path = RESULTS) -> list[dict]:
    """The rows of every device, GPUs first."""
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stem == "cpu", path.stem))
    return [row for path in files for row in json.loads(path.read_text("utf-8"))]


def devices(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows by their devices."""
    return {name: [x for x in rows if x["device"] == name] for name in dict.fromkeys(row["device"] for row in rows)}


def drawn(rows: Sequence[dict]) -> list[dict]:
    """Those of the first device that has what the figures need."""
    return next(own for own in devices(rows).values() if {GROWN, "linear attention"} <= {x["operator"] for x in own})


def readme_table(rows: Sequence[dict]) -> str:
    """A table a device, a line an operator: ours, and how many times as long the others take."""
    parts = []
    for device, own in devices(rows).items():
        lines = ["| | shape | ms | others take, in times ours |", "|---|---|---|---|"]
        for operator, shape in SHOWN:
            found = [row for row in own if row["operator"] == operator and row["shape"] == shape]
            mine = next((row for row in found if row["peer"] == OURS), None)
            if mine is not None:
                others = "; ".join(_beside(row) for row in found if row["peer"] != OURS)
                lines.append(f"| {_cell(operator)} | {_shape(shape)} | {_number(mine['ms']['p50'])} | {others} |")
        (dtype, _), *_ = Counter(row["dtype"] for row in own).most_common()
        parts += ["\n".join(lines), f"Medians in one run each, {dtype} where nothing else is said: {device}."]
    return "\n\n".join(parts) + " [docs/speed.md](docs/speed.md) has every row."


def softmax_or_linear(rows: Sequence[dict]) -> str:
    """A sentence a device: how both grow, and where they cross."""
    every = [own for own in devices(rows).values() if any(row["operator"] == "linear attention" for row in own)]
    return "\n".join(_verdict(complexity(own)) for own in every)


def complexity(rows: Sequence[dict]) -> Complexity:
    """Causal softmax and linear attention of one text, from the rows of both."""
    times = {}
    for row in rows:
        if row["operator"] == "linear attention" and row["shape"][0] == 1 and row["shape"][3] == 64 and row["ms"]:
            times.setdefault(row["shape"][2], {})[row["peer"]] = row
    points = [
        Point(T, *(found[peer]["ms"]["p50"] if peer in found else None for peer in ("SDPA causal", OURS)))
        for T, found in sorted(times.items())
    ]
    row = next(iter(times.values()))[OURS]
    return Complexity(
        tuple(points),
        {name: fitted_exponent(points, name) for name in (SOFTMAX, LINEAR)},
        crossover(points),
        f"One text, {row['shape'][1]} heads, D = {row['shape'][3]}, {row['dtype']}",
        row["device"],
    )


def _verdict(found: Complexity) -> str:
    powers = [f"{name} attention grows as T^{power:.2f}" for name, power in found.exponents.items()]
    longest = max((point for point in found.points if point.ratio), key=lambda point: point.T)
    if found.crossover is None:
        crossing = "softmax is the faster at every length timed"
    else:
        crossing = f"softmax is the faster below about {round(found.crossover, -1):,.0f} tokens"
    return (
        f"{found.shape}, on {found.device}: {', '.join(powers)}; {crossing}, and at {longest.T:,} tokens takes "
        f"{longest.ratio:.2g} times as long."
    )


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """README with each block between its marks."""
    for name, block in blocks.items():
        mark = BEGIN.format(name)
        before, begin, rest = text.partition(mark)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"README must hold {mark} and {END}")
        text = f"{before}{mark}\n{block}\n{END}{after}"
    return text


def page(rows: Sequence[dict]) -> str:
    """docs/speed.md: every row, an operator a table."""
    parts = [
        "# What everything costs",
        "Every case is held to float64 before it is timed. ms is a median, the 20th and the 80th percentile in "
        "brackets; × is that of ours in the same run; of bound, what the stated flops, exponentials and bytes would "
        "take at this machine's measured rates, [in NOTES](../bench/NOTES.md); MiB is the peak beside what was there "
        "before, none where that was enough. A row that was not measured says why. Made by `python bench/report.py` "
        "of `bench/results/`.",
    ]
    shown = drawn(rows)[0]["device"]
    for device, own in devices(rows).items():
        parts.append(f"# {device}")
        if device == shown:
            parts += [f"![{drawing.caption}]({drawing.name}.png)" for drawing in (growth(own), roofline(own))]
        parts.append(_ceilings(own))
        for operator in dict.fromkeys(row["operator"] for row in own):
            parts += [f"## {operator}", "\n".join(_lines([row for row in own if row["operator"] == operator]))]
    return "\n\n".join(parts) + "\n"


def _ceilings(rows: Sequence[dict]) -> str:
    found = [row["ceilings"] for row in rows if row.get("ceilings")]
    matmul, copy, exp2 = (max(each[name] for each in found) for name in ("matmul", "copy", "exp2"))
    return f"Measured rates: product {matmul / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:.3g} GB/s, {exp2:.3g} exp2 a second."


def _lines(rows: Iterable[dict]) -> Iterator[str]:
    yield "| shape | | ms | × | rate | of bound | MiB | torch, commit |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        if row["ms"] is None:
            time = row["reason"]
        else:
            time = f"{_number(row['ms']['p50'])} ({_number(row['ms']['p20'])} … {_number(row['ms']['p80'])})"
        cells = [
            _shape(row["shape"]), _cell(row["peer"]), time, _number(row.get("ratio")), _rate(row),
            f"{row['of_bound']:.0%} {row['bound_by']}" if row.get("of_bound") else "", _number(peak(row)),
            f"{row['torch']}, {row['commit']}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _beside(row: dict) -> str:
    """A peer's ratio, or why it has none."""
    if row["ms"] is not None:
        return f"{_cell(row['peer'])} {_number(row['ratio'])}"
    size = f", {row['peak_mib'] / 1024:.0f} GiB" if row.get("peak_mib") else ""
    hours = f", {row['hours']:,.0f} hours" if row.get("hours") else ""
    reason = row["reason"].split(":")[0]
    return f"{_cell(row['peer'])}: {reason}{size}{hours}"


def _rate(row: dict) -> str:
    if row.get("tests_per_s"):
        return f"{row['tests_per_s'] / 1e6:.3g} M tests/s"
    if row.get("gbytes_per_s"):
        return f"{row['gbytes_per_s']:.3g} GB/s"
    return f"{row['gflops']:.3g} GFLOP/s" if row.get("gflops") else ""


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float | None) -> str:
    """Three digits, or all of a larger number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()

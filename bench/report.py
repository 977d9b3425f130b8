"""README's table, docs/speed.md and its figure from what `make bench` measured.

python bench/report.py            write them
python bench/report.py --check    fail where README or docs/speed.md differ from bench/results
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cases import OURS

from causalattn.plot import Drawing
from causalattn.plot.drawing import BLUE, GREY, ORANGE, sheet

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README, PAGE = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- bench/report.py -->", "<!-- end -->"
# what README shows: operator and shape, in this order
SHOWN = [
    ("analyze of 6 layers", [1, 2048]),
    ("analyze of 6 layers", [1, 8192]),
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
    ("discovery", [20, 20]),
    ("discovery of a head to order 2", [256, 256]),
]
DRAWN = "row statistics"
# MiB below which a peak was not seen
SEEN = 0.5
MARKS = {OURS: (BLUE, "o"), "eager torch": (ORANGE, "s"), "SDPA forward": (GREY, "^")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the files differ")
    check = parser.parse_args().check
    rows = measured()
    wanted = {README: with_table(README.read_text("utf-8"), readme_table(rows)), PAGE: page(rows)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from bench/results: run python bench/report.py", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(wanted[path], "utf-8")
    PAGE.with_suffix(".png").write_bytes(draw(rows).png())


def measured(folder: Path = RESULTS) -> list[dict]:
    """The rows of every device."""
    return [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text("utf-8"))]


def readme_table(rows: Sequence[dict]) -> str:
    """A line an operator: ours, and how many times as long the others take."""
    lines = ["| | shape | ms | others take, in times ours |", "|---|---|---|---|"]
    for operator, shape in SHOWN:
        found = [row for row in rows if row["operator"] == operator and row["shape"] == shape]
        mine = next((row for row in found if row["peer"] == OURS), None)
        if mine is not None:
            others = "; ".join(_beside(row) for row in found if row["peer"] != OURS)
            lines.append(f"| {_cell(operator)} | {_shape(shape)} | {_number(mine['ms']['p50'])} | {others} |")
    return "\n".join([*lines, "", f"{_where(rows)} [docs/speed.md](docs/speed.md) has every row."])


def with_table(text: str, table: str) -> str:
    """README with the table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def page(rows: Sequence[dict]) -> str:
    """docs/speed.md: every row, an operator a table."""
    parts = [
        "# What everything costs",
        "Every case is held to float64 before it is timed. ms is a median, the 20th and the 80th percentile in "
        "brackets; × is that of ours in the same run; of bound, what the stated flops, exponentials and bytes would "
        "take at this machine's measured rates, [in NOTES](../bench/NOTES.md); MiB is the peak beside what was there "
        "before, none where that was enough. A row that was not measured says why. Made by `python bench/report.py` "
        "of `bench/results/`.",
        f"![{CAPTION}](speed.png)",
    ]
    for operator in dict.fromkeys(row["operator"] for row in rows):
        parts += [f"## {operator}", "\n".join(_lines([row for row in rows if row["operator"] == operator]))]
    return "\n\n".join(parts) + "\n"


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
            f"{row['of_bound']:.0%}" if row.get("of_bound") else "", _number(_weight(row)),
            f"{row['torch']}, {row['commit']}" if row.get("commit") else "",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


CAPTION = "Time and peak memory of row statistics against T. Hollow: eager torch, its matrix estimated and not formed."


def draw(rows: Sequence[dict]) -> Drawing:
    """Time and peak memory of one operator against T, and where eager's memory is an estimate."""
    figure = sheet(9, 3.9, f"{DRAWN}, 4 heads, D = 64, float32: {_devices(rows)}")
    panels = figure.subplots(1, 2)
    for peer, (colour, mark) in MARKS.items():
        found = sorted((row for row in rows if (row["operator"], row["peer"]) == (DRAWN, peer)), key=_length)
        timed = [row for row in found if row["ms"]]
        style = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.6}
        panels[0].plot([*map(_length, timed)], [row["ms"]["p50"] for row in timed], label=peer, **style)
        weighed = [row for row in timed if _weight(row)]
        panels[1].plot([*map(_length, weighed)], [row["peak_mib"] for row in weighed], label=peer, **style)
        guessed = [row for row in found if row["ms"] is None and row.get("peak_mib")]
        x, y = [*map(_length, guessed)], [row["peak_mib"] for row in guessed]
        panels[1].plot(x, y, linestyle="", marker=mark, color=colour, fillstyle="none", markersize=6)
    for axes, label in zip(panels, ("milliseconds a call", "peak MiB (hollow: estimated, not run)"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({_length(row) for row in rows if row["operator"] == DRAWN})
        axes.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
        axes.minorticks_off()
        axes.set(xlabel="tokens T", ylabel=label)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    return Drawing("speed", figure, CAPTION)


def _length(row: dict) -> int:
    return row["shape"][-2]


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


def _where(rows: Sequence[dict]) -> str:
    return f"Medians in one run each, float32 where nothing else is said: {_devices(rows)}."


def _devices(rows: Sequence[dict]) -> str:
    return ", ".join(dict.fromkeys(row["device"] for row in rows if row.get("device")))


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _weight(row: dict) -> float | None:
    """Peak MiB, None where the process held what it needed already, so that nothing was seen to grow."""
    return row["peak_mib"] if row.get("peak_mib", 0) >= SEEN else None


def _number(value: float | None) -> str:
    """Three digits, or all of a larger number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()

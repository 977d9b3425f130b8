"""What the rows of a device look like: time and memory against T, and operators under this machine's roofs."""

from collections.abc import Sequence

from cases import OURS

from causalattn.plot import Drawing
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, sheet

GROWN = "row statistics"
# MiB below which a peak was not seen
SEEN = 0.5
MARKS = {OURS: (BLUE, "o"), "eager torch": (ORANGE, "s"), "SDPA forward": (GREY, "^")}


def growth(rows: Sequence[dict]) -> Drawing:
    """Time and peak memory of one operator against T, and where eager's memory is an estimate."""
    caption = f"Time and peak memory of {GROWN} against T. Hollow: eager torch, its matrix estimated and not formed."
    figure = sheet(9, 3.9, f"{GROWN}, {_case(rows, GROWN)}: {rows[0]['device']}")
    panels = figure.subplots(1, 2)
    for peer, (colour, mark) in MARKS.items():
        found = sorted((row for row in rows if (row["operator"], row["peer"]) == (GROWN, peer)), key=_length)
        timed = [row for row in found if row["ms"]]
        style = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.6}
        panels[0].plot([*map(_length, timed)], [row["ms"]["p50"] for row in timed], label=peer, **style)
        weighed = [row for row in timed if peak(row)]
        panels[1].plot([*map(_length, weighed)], [row["peak_mib"] for row in weighed], label=peer, **style)
        guessed = [row for row in found if row["ms"] is None and row.get("peak_mib")]
        x, y = [*map(_length, guessed)], [row["peak_mib"] for row in guessed]
        panels[1].plot(x, y, linestyle="", marker=mark, color=colour, fillstyle="none", markersize=6)
    for axes, label in zip(panels, ("milliseconds a call", "peak MiB (hollow: estimated, not run)"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({_length(row) for row in rows if row["operator"] == GROWN})
        axes.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
        _finish(axes, "tokens T", label)
    panels[0].legend(frameon=False, fontsize=9)
    return Drawing("speed", figure, caption)


def roofline(rows: Sequence[dict]) -> Drawing:
    """FLOPs a second of ours against FLOPs a byte that must be moved, each operator at its longest text."""
    caption = (
        "What each operator reaches, under the rates of a large product and a copy measured in the same run. "
        "Those that the exponentials bind stand below the roof."
    )
    best = {}
    for row in rows:
        if row["peer"] == OURS and row["ms"] and row.get("flops_per_byte"):
            best[row["operator"]] = max(row, best.get(row["operator"], row), key=_length)
    figure = sheet(8.4, 5.2, f"{rows[0]['device']}: operators under its roofs")
    axes = figure.subplots()
    roofs = [row["ceilings"] for row in best.values()]
    matmul, copy = (max(roof[name] for roof in roofs) / 1e9 for name in ("matmul", "copy"))
    x = [min(row["flops_per_byte"] for row in best.values()) / 2, max(matmul / copy, 1)]
    x.append(2 * max(row["flops_per_byte"] for row in best.values()))
    axes.plot(x, [min(matmul, copy * at) for at in x], color=INK, linewidth=1.6)
    axes.annotate(f"product, {matmul:.0f} GFLOP/s", (x[-1], matmul), (-4, 5), textcoords="offset points", ha="right")
    axes.annotate(f"copy, {copy:.0f} GB/s", (x[0], copy * x[0]), (14, -4), textcoords="offset points")
    for n, (operator, row) in enumerate(sorted(best.items(), key=lambda item: item[1]["gflops"]), 1):
        axes.plot(row["flops_per_byte"], row["gflops"], "o", color=BLUE, markersize=5)
        at = row["flops_per_byte"], row["gflops"]
        axes.annotate(str(n), at, (5, -3), textcoords="offset points", fontsize=8, color=INK)
        axes.plot([], [], " ", label=f"{n}  {operator}, T = {_length(row):,}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "FLOPs a byte", "GFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=0)
    return Drawing("roofline", figure, caption)


def peak(row: dict) -> float | None:
    """Peak MiB, None where the process held what it needed already, so that nothing was seen to grow."""
    return row["peak_mib"] if row.get("peak_mib", 0) >= SEEN else None


def _finish(axes, x: str, y: str) -> None:
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _case(rows: Sequence[dict], operator: str) -> str:
    row = next(row for row in rows if row["operator"] == operator)
    return f"{row['shape'][1]} heads, D = {row['shape'][3]}, {row['dtype']}"


def _length(row: dict) -> int:
    return row["shape"][-2]

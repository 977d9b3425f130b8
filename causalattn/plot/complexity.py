"""Time against T of softmax and linear attention, on logarithmic axes, with the fitted powers and the crossing."""

from ..complexity import LINEAR, SOFTMAX, Complexity, verdict
from .drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet


def draw_complexity(result: Complexity) -> Drawing:
    """Measured times as marks, what they grow as in the labels, a line where linear attention overtakes."""
    figure = sheet(7.2, 4.6, f"Causal attention of T tokens: {result.device}")
    axes = figure.subplots()
    for name, colour, mark in ((SOFTMAX, ORANGE, "o"), (LINEAR, BLUE, "s")):
        timed = [(point.T, getattr(point, name)) for point in result.points if getattr(point, name)]
        power = result.exponents[name]
        label = f"{name} attention" + ("" if power is None else f", grows as $T^{{{power:.2f}}}$")
        T, ms = [T for T, _ in timed], [ms for _, ms in timed]
        axes.plot(T, ms, mark + "-", color=colour, label=label, markersize=5, linewidth=1.6)
    if result.crossover:
        axes.axvline(result.crossover, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            f"T ≈ {result.crossover:.0f}", (result.crossover, 0.02), xycoords=("data", "axes fraction"),
            xytext=(4, 0), textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = [point.T for point in result.points]
    axes.set_xticks(lengths, [f"{T // 1024}k" if T >= 1024 else str(T) for T in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens T", ylabel="milliseconds a call")
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return Drawing("complexity", figure, f"{result.shape}. {verdict(result)}")

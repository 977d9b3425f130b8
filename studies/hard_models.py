"""How what is recovered falls off where models are not linear, noise not Gaussian, or effects weak or cancelled."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scores import EXACT, Truth, blame, score, truth_of
from study import Study, Table, mean_error, pick, run, spread
from systems import System, random_system

from causalattn.discovery import PAG, discover
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet
from causalattn.reference.discovery.separation import ancestors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T, SYSTEMS, ALPHA = 12, 30, 0.01
SAMPLES = (1000, 100000)
# a knob for a cut of 2.6e-11, above what rounding leaves of 0
FINE = 1e22
SHAPES = {"saturating, tanh 2x": lambda x: np.tanh(2 * x), "square": np.square, "sign": np.sign}
HEAVY, SKEWED, CANCELLED, WEAK = "heavy-tailed noise", "skewed noise", "cancelled effects", "weak effects"
STRENGTHS = {
    **dict.fromkeys(SHAPES, (0, 0.2, 0.4, 0.6, 0.8, 1)),
    HEAVY: (0, 0.1, 0.2, 1 / 3, 0.5, 1),
    SKEWED: (0, 0.5, 1, 1.5, 2),
    CANCELLED: (0, 0.5, 0.8, 0.9, 0.95, 1),
    WEAK: (0, 0.5, 0.75, 0.9, 0.95),
}
AXES = {
    **dict.fromkeys(SHAPES, "share of the effect that is not linear"),
    HEAVY: "1 / degrees of freedom of Student's t",
    SKEWED: "σ of log-normal noise",
    CANCELLED: "share of a covariance that cancels",
    WEAK: "share that effects lose",
}


class Case(NamedTuple):
    seed: int
    system: System
    truth: Truth


def cases(systems: int) -> list[Case]:
    drawn = []
    for seed in range(systems):
        system = unit(random_system(np.random.default_rng(seed), T))
        drawn.append(Case(seed, system, truth_of(system)))
    return drawn


def order_of(weights: np.ndarray) -> list[int]:
    """Causes first: each has fewer ancestors than what it causes."""
    return ancestors(weights != 0).sum(0).argsort(kind="stable").tolist()


def covariance(weights: np.ndarray) -> np.ndarray:
    total = np.linalg.inv(np.eye(len(weights)) - weights)
    return total.T @ total


def unit(system: System) -> System:
    """Each weight over its cause's deviation: what a cause adds then deviates by its weight, and its noise by 1."""
    weights = system.weights.copy()
    for a in order_of(weights):
        weights[a] /= np.sqrt(covariance(weights)[a, a])
    return system._replace(weights=weights)


def weakened(system: System, strength: float) -> System:
    return system._replace(weights=system.weights * (1 - strength))


def cancelled(system: System, strength: float) -> tuple[System, list[tuple[int, int]]]:
    """The system with weights, one a variable of several causes, against what the causes' other paths carry.

    Cov(a, b) of an edge a → b is w Var(a) + rest; w = (strength − 2) rest / Var(a) leaves −(1 − strength) rest of it.
    Of b's causes a is the one whose rest is largest in its deviations; all of a, b are observed. Also the edges chosen,
    as positions in observed.
    """
    weights, seen, chosen = system.weights.copy(), system.observed, []
    for b in order_of(weights):
        causes = [a for a in np.flatnonzero(weights[:, b]).tolist() if a in seen]
        if b not in seen or not causes:
            continue
        moments = covariance(weights)
        rest = {a: (moments[a, b] - weights[a, b] * moments[a, a]) / np.sqrt(moments[a, a]) for a in causes}
        a = max(causes, key=lambda a: abs(rest[a]))
        if abs(rest[a]) > 1e-9:
            weights[a, b] = (strength - 2) * rest[a] / np.sqrt(moments[a, a])
            chosen.append((seen.index(a), seen.index(b)))
    return system._replace(weights=weights), chosen


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def noise(name: str, strength: float, rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """With mean 0 and deviation 1 in the sample: some of these have neither."""
    if name == HEAVY and strength:
        return standard(rng.standard_t(1 / strength, size))
    if name == SKEWED and strength:
        return standard(rng.lognormal(0, strength, size))
    return standard(rng.standard_normal(size))


def sample(system: System, name: str, strength: float, rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, T]: x_b = Σ_a w_ab f(x_a) + u_b.

    f is linear; with a shape, f(x) ∝ (1 − strength) z + strength shape(z) of the standard z of x, with the deviation
    that x has in the linear system.
    """
    weights, x = system.weights, noise(name, strength, rng, (n, len(system.weights)))
    deviation = np.sqrt(covariance(weights).diagonal())
    added = np.empty_like(x)
    for b in order_of(weights):
        causes = np.flatnonzero(weights[:, b])
        x[:, b] += added[:, causes] @ weights[causes, b]
        added[:, b] = x[:, b]
        if name in SHAPES and strength:
            z = standard(x[:, b])
            added[:, b] = deviation[b] * standard((1 - strength) * z + strength * standard(SHAPES[name](z)))
    return x[:, system.observed]


def altered(case: Case, name: str, strength: float) -> tuple[System, list[tuple[int, int]]]:
    if name == CANCELLED:
        return cancelled(case.system, strength)
    return (weakened(case.system, strength) if name == WEAK else case.system), []


def correlations(case: Case, name: str, strength: float, n: float) -> np.ndarray:
    system, _ = altered(case, name, strength)
    if n >= EXACT:
        return system.correlations()
    return np.corrcoef(sample(system, name, strength, np.random.default_rng([case.seed, n]), n).T)


def independent(case: Case, name: str, strength: float, n: int) -> np.ndarray:
    """Correlations of as many variables of that noise that have nothing to do with each other."""
    rng = np.random.default_rng([SYSTEMS, case.seed, n])
    return np.corrcoef(noise(name, strength, rng, (n, len(case.system.observed))).T)


def edges_of(R: np.ndarray, n: float, **options) -> PAG:
    return discover(torch.from_numpy(R), n=n, alpha=ALPHA, **options).pag


def searched(case: Case, name: str, strength: float, n: float) -> dict:
    R = correlations(case, name, strength, n)
    pag = edges_of(R, n)
    _, chosen = altered(case, name, strength)
    null = edges_of(independent(case, name, strength, n), n).skeleton.sum() / 2 if n < EXACT else np.nan
    return (
        {"violation": name, "strength": strength, "n": n, "seed": case.seed}
        | score(pag, case.truth)
        | blame(pag, case.truth, R, n, ALPHA)
        | {"correlated": score(edges_of(R, n, max_order=0), case.truth)["f1"], "null": null}
        | {"cancelled": len(chosen), "kept": np.mean([pag.skeleton[pair] for pair in chosen]) if chosen else np.nan}
    )


def sizes(name: str) -> tuple[float, ...]:
    """Sample sizes; correlations are known exactly where the model stays linear, with any noise of finite variance."""
    exact = {CANCELLED: (EXACT,), WEAK: (EXACT, FINE)}
    return (*SAMPLES, *exact.get(name, ()))


def label(n: float) -> str:
    return {EXACT: "exact, cut 8e-8", FINE: "exact, cut 3e-11"}.get(n, str(n))


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    rows, drawn = [], cases(1 if quick else SYSTEMS)
    for done, case in enumerate(drawn):
        for name, strengths in STRENGTHS.items():
            rows += [searched(case, name, strength, n) for n in sizes(name) for strength in strengths]
        progress(done + 1, len(drawn))
    return rows


COLUMNS = {
    "F1": "f1", "chance": "chance", "correlated at all": "correlated", "precision": "precision", "recall": "recall",
    "arrows right": "arrow_precision", "missed": "missed", "… uncorrelated": "uncorrelated", "extra": "extra",
    "… their true set not tried": "untried", "edges of independent data": "null", "pairs": "pairs",
}  # fmt: skip


def tables(rows: list[dict]) -> list[Table]:
    return [Table(f"{name[0].upper()}{name[1:]}, by {AXES[name]}", _of(rows, name)) for name in STRENGTHS]


def _of(rows: list[dict], name: str) -> list[dict]:
    lines = []
    columns = COLUMNS | ({"edges cancelled": "cancelled", "share of them found": "kept"} if name == CANCELLED else {})
    for n in sizes(name):
        for strength in STRENGTHS[name]:
            found = pick(rows, violation=name, strength=strength, n=n)
            heads = {"n": label(n), "strength": f"{strength:.3g}"}
            lines.append(heads | {head: spread(row[key] for row in found) for head, key in columns.items()})
    return lines


LOOKS = {1000: (ORANGE, "o", "n = 1000"), 100000: (BLUE, "s", "n = 100 000"), EXACT: (INK, "D", "exact, cut 8e-8")}


def draw(rows: list[dict]) -> Drawing:
    """F1 of edges against the strength of each violation, with chance at its foot."""
    figure = sheet(12, 6.2, f"Edges found of {T} variables where the model is not linear, Gaussian or faithful")
    panels = figure.subplots(2, 4, sharey=True)
    for axes, name in zip(panels.flat, STRENGTHS, strict=False):
        for n, (colour, mark, text) in LOOKS.items():
            if n not in sizes(name):
                continue
            of_it = pick(rows, violation=name, n=n)
            _curve(axes, of_it, "f1", color=colour, marker=mark, markersize=4, label=f"discover, {text}")
            if n < EXACT:
                _curve(axes, of_it, "correlated", color=colour, linestyle="--", label=f"correlated at all, {text}")
                _curve(axes, of_it, "chance", color=colour, linestyle=":", label=f"chance, {text}")
        axes.set(ylim=(0, 1.03), xlabel=AXES[name])
        axes.set_title(name, fontsize=10)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("F1 of edges")
    panels[1, 3].axis("off")
    panels[1, 3].legend(*panels[1, 1].get_legend_handles_labels(), loc="center", frameon=False, fontsize=9)
    return Drawing(STUDY.name, figure, CAPTION)


def _curve(axes: "Axes", rows: list[dict], key: str, **look) -> None:
    at = sorted({row["strength"] for row in rows})
    found = (mean_error(row[key] for row in pick(rows, strength=strength)) for strength in at)
    means, errors = zip(*found, strict=True)
    axes.errorbar(at, means, errors, linewidth=1.5, **look)


CAPTION = (
    f"Means of {SYSTEMS} systems, with standard errors; dashed: every pair whose correlation is above the cut; dotted: "
    "random graphs of as many edges as discover found. The leftmost point of each panel but that of cancelled effects "
    "is the same linear Gaussian baseline."
)
METHOD = (
    f"{SYSTEMS} random systems of {T} variables, seeds 0 … {SYSTEMS - 1}, about 2.5 edges a variable, half of the "
    "parentless variables with two children or more hidden; an effect deviates by 0.5 … 2 where its variable's noise "
    "deviates by 1. One thing at a time is then broken, by degrees, with the graphs and the random numbers kept, so "
    "the first row of each table but that of cancelled effects is the same linear Gaussian baseline. Effects that are "
    "not linear are (1 − s) z + s f(z) of the cause's standard z, with the size that the linear one had. Noise is "
    "standardised in the sample; Student's t of 2 degrees of freedom or 1 has no variance. Of each variable with "
    "several causes one effect is cancelled, that of the cause to which other paths tie it most: its weight is set so "
    "that a share of what those paths carry in the covariance of the two cancels, at 1 all, at 0 the effect is twice "
    "the rest and has the other sign. Weak effects are the baseline's, less a share. `discover` searches the "
    f"correlations of n samples at level {ALPHA}, nothing tuned; where the model stays linear and effects change, also "
    "the exact ones, independent being what is below 8e-8; a cut of 3e-11 was added for weak effects when the first "
    "had left extra edges, to see whether products of effects that lie below it are why. Other noise of finite "
    "variance leaves the exact correlations, and so the true graph, as they are; effects that are not linear have "
    "none in closed form, and n = 100 000 stands for them. Scores are as in linear_models: edges by the true PAG, "
    "chance the mean F1 of all graphs of as many edges, arrows by the true MAG. `correlated at all` is the F1 of "
    "every pair above the cut. Of missed edges it is said how many have |r| below the cut already given nothing; of "
    "extra ones how many have a true separating set that passes the test, so that the search failed to try it; the "
    "set of the others fails the test. Edges of independent data are those that the search makes of as many "
    "independent variables with that noise."
)
QUESTION = "What is recovered where models are not linear, Gaussian or faithful?"
STUDY = Study("hard_models", QUESTION, METHOD, measure, tables, draw)

if __name__ == "__main__":
    run(STUDY)

"""What searches recover of random linear models with hidden causes, from exact and from sampled correlations."""

import contextlib
import io
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from causallearn.search.ConstraintBased.FCI import fci
from causallearn.search.ConstraintBased.PC import pc
from causallearn.utils.cit import register_ci_test
from scores import EXACT, Truth, blame, score, truth_of
from study import Study, Table, mean_error, pick, run, spread
from systems import System, random_system

from causalattn.discovery import PAG, discover, surrogate_data
from causalattn.integrations import causal_learn
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T, SYSTEMS, ALPHA = 12, 60, 0.01
SAMPLES = (100, 1000, 10000, EXACT)
FAMILIES = {
    "weights 0.5 … 2": {},
    "weights 0.1 … 0.5": {"weak": True},
    "weights 0.5 … 2, nothing hidden": {"hidden": False},
}
NULL = "independent data"


class Name(str):
    """x0, x1, … with the same hash in every process: causal-learn walks through sets of what it names."""

    def __hash__(self) -> int:
        return int(self[1:])


def names(T: int) -> list[Name]:
    return [Name(f"x{a}") for a in range(T)]


class Counted(causal_learn.register()):
    """Our test, whose last one can be asked how many it made."""

    last: "Counted"

    def __init__(self, data, **kwargs):
        super().__init__(data, **kwargs)
        Counted.last = self


register_ci_test("counted", Counted)


def ours(R: np.ndarray, n: float, **options) -> tuple[PAG, int]:
    found = discover(torch.from_numpy(R), n=n, alpha=ALPHA, **options)
    return found.pag, sum(level.tests for level in found.levels)


def theirs(search: Callable, R: np.ndarray, n: float) -> tuple[PAG, int]:
    """search(data, options) → a graph of causal-learn, from R in place of data."""
    data = surrogate_data(torch.from_numpy(R), len(R) + 1, generator=torch.Generator().manual_seed(0)).numpy()
    # its rules print what they do
    with contextlib.redirect_stdout(io.StringIO()):
        graph = search(data, {"corr": R, "n": n, "show_progress": False, "node_names": names(len(R))})
    return PAG(causal_learn.from_causal_learn(graph).marks), Counted.last.tests


def fci_of(data: np.ndarray, options: dict):
    return fci(data, "counted", ALPHA, **options)[0]


def pc_of(data: np.ndarray, options: dict):
    """Its CPDAG, an edge without direction open at both ends."""
    graph = pc(data, ALPHA, "counted", **options).G
    undirected = (graph.graph == -1) & (graph.graph.T == -1)
    graph.graph = np.where(undirected, 2, graph.graph)
    return graph


# R, n and the places in a true order → the graph and how many tests it took
SEARCHES = {
    "discover": lambda R, n, places: ours(R, n),
    "discover, order known": lambda R, n, places: ours(R, n, order=places),
    "causal-learn fci": lambda R, n, places: theirs(fci_of, R, n),
    "causal-learn pc": lambda R, n, places: theirs(pc_of, R, n),
    "correlated at all": lambda R, n, places: ours(R, n, max_order=0),
}


class Case(NamedTuple):
    family: str
    seed: int
    system: System
    truth: Truth


def cases(systems: int) -> list[Case]:
    drawn = []
    for number, (family, options) in enumerate(FAMILIES.items()):
        for seed in range(systems):
            system = random_system(np.random.default_rng([number, seed]), T, **options)
            drawn.append(Case(family, seed, system, truth_of(system)))
    return drawn


def correlations(case: Case, n: float) -> np.ndarray:
    if n == EXACT:
        return case.system.correlations()
    rng = np.random.default_rng([[*FAMILIES].index(case.family), case.seed, n])
    return np.corrcoef(case.system.sample(rng, n).T)


def independent(case: Case, n: int) -> np.ndarray:
    """Correlations of as many variables that have nothing to do with each other."""
    rng = np.random.default_rng([len(FAMILIES), case.seed, n])
    return np.corrcoef(rng.standard_normal((n, len(case.system.observed))).T)


def searched(case: Case, R: np.ndarray, n: float, family: str) -> list[dict]:
    """A row for each search of R, scored by the case's truth."""
    rows = []
    for name, search in SEARCHES.items():
        pag, tests = search(R, n, case.truth.places)
        row = {"family": family, "n": n, "search": name, "seed": case.seed, "tests": tests}
        rows.append(row | score(pag, case.truth) | blame(pag, case.truth, R, n, ALPHA))
    return rows


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    rows, drawn = [], cases(3 if quick else SYSTEMS)
    for done, case in enumerate(drawn):
        for n in SAMPLES:
            rows += searched(case, correlations(case, n), n, case.family)
            if case.family == next(iter(FAMILIES)) and n != EXACT:
                rows += searched(case, independent(case, n), n, NULL)
        progress(done + 1, len(drawn))
    return rows


def tables(rows: list[dict]) -> list[Table]:
    return [
        _f1(rows),
        *(Table(f"Edges and marks, {family}", _details(rows, family)) for family in FAMILIES),
        Table("discover less causal-learn fci, of the same correlations", _paired(rows)),
        Table("Where the edges go wrong, a graph", _blamed(rows)),
        Table(
            "Independent data: edges found, and their F1 by the true graph of a system of the first family", _null(rows)
        ),
    ]


def label(n: float) -> str:
    return "exact" if n == EXACT else str(n)


def _f1(rows: list[dict]) -> Table:
    lines = []
    for family in FAMILIES:
        for search in SEARCHES:
            cells = {label(n): spread(x["f1"] for x in pick(rows, family=family, search=search, n=n)) for n in SAMPLES}
            lines.append({"systems": family, "search": search} | cells)
        of_ours = {n: pick(rows, family=family, search="discover", n=n) for n in SAMPLES}
        cells = {label(n): spread(x["chance"] for x in found) for n, found in of_ours.items()}
        lines.append({"systems": family, "search": "chance, as many edges as discover"} | cells)
    return Table("F1 of edges, by n", lines)


DETAILS = {
    "precision": "precision", "recall": "recall", "arrows right": "arrow_precision", "arrows found": "arrow_recall",
    "tails right": "tail_precision", "tails found": "tail_recall", "distance": "distance",
}  # fmt: skip


def _details(rows: list[dict], family: str) -> list[dict]:
    lines = []
    for n in SAMPLES:
        for search in SEARCHES:
            found = pick(rows, family=family, search=search, n=n)
            cost = {
                "tests": f"{statistics.mean(row['tests'] for row in found):.0f}",
            }
            means = {head: spread(row[key] for row in found) for head, key in DETAILS.items()}
            lines.append({"n": label(n), "search": search} | means | cost)
    arrows = [row["arrows"] for row in pick(rows, family=family, search="discover", n=EXACT)]
    everywhere = {"arrows right": spread(arrows), "tails right": spread(1 - share for share in arrows)}
    lines.append(dict.fromkeys(lines[0], "") | {"search": "an arrow, or a tail, at every end"} | everywhere)
    return lines


def _paired(rows: list[dict]) -> list[dict]:
    lines = []
    heads = {"F1": "f1", "precision": "precision", "recall": "recall", "marks right": "marks", "distance": "distance"}
    for family in FAMILIES:
        for n in SAMPLES:
            both = [pick(rows, family=family, n=n, search=search) for search in ("discover", "causal-learn fci")]
            less = {head: spread(a[key] - b[key] for a, b in zip(*both, strict=True)) for head, key in heads.items()}
            lines.append({"systems": family, "n": label(n)} | less)
    return lines


def _blamed(rows: list[dict]) -> list[dict]:
    lines = []
    for family in FAMILIES:
        for n in SAMPLES:
            for search in ("discover", "causal-learn fci"):
                found = pick(rows, family=family, search=search, n=n)
                heads = {
                    "missed": "missed", "… uncorrelated": "uncorrelated", "extra": "extra",
                    "… their true set not tried": "untried",
                }  # fmt: skip
                counts = {head: spread(row[key] for row in found) for head, key in heads.items()}
                whole = [row for row in found if row["f1"] == 1]
                counts |= {
                    "graphs of no wrong edge": len(whole),
                    "graphs that are the true PAG": sum(row["distance"] == 0 for row in found),
                    "marks right where no edge is wrong": spread(row["marks"] for row in whole),
                }
                lines.append({"systems": family, "n": label(n), "search": search} | counts)
    return lines


def _null(rows: list[dict]) -> list[dict]:
    lines = []
    for search in SEARCHES:
        for n in SAMPLES[:-1]:
            found = pick(rows, family=NULL, search=search, n=n)
            cells = {head: spread(row[head.lower()] for row in found) for head in ("edges", "pairs", "F1")}
            lines.append({"search": search, "n": label(n)} | cells)
    return lines


LOOKS = {
    "discover": (BLUE, "-", "o"),
    "discover, order known": (BLUE, ":", "s"),
    "causal-learn fci": (ORANGE, "-", "o"),
    "causal-learn pc": (ORANGE, ":", "s"),
    "correlated at all": (INK, "--", None),
}


def draw(rows: list[dict]) -> Drawing:
    """F1 of edges above, the share of right marks below, a column of panels a family."""
    figure = sheet(11, 6.4, f"Random linear models of {T} variables: edges and marks found")
    panels = figure.subplots(2, len(FAMILIES), sharex=True, sharey=True)
    for column, family in enumerate(FAMILIES):
        of_it = pick(rows, family=family)
        for axes, key in zip(panels[:, column], ("f1", "marks"), strict=True):
            for search, (colour, line, mark) in LOOKS.items():
                if key == "f1" or search != "correlated at all":
                    _curve(axes, pick(of_it, search=search), key, search, color=colour, linestyle=line, marker=mark)
        _curve(panels[0, column], pick(of_it, search="discover"), "chance", "chance", color=GREY, linewidth=3)
        most = max(statistics.mean(row["arrows"] for row in of_it), 1 - statistics.mean(row["arrows"] for row in of_it))
        panels[1, column].axhline(most, color=GREY, linewidth=3)
        panels[0, column].set_title(family, fontsize=10)
        panels[1, column].set_xticks(range(len(SAMPLES)), [label(n) for n in SAMPLES])
        panels[1, column].set_xlabel("samples n")
    for axes in panels.flat:
        axes.set_ylim(0, 1.03)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("F1 of edges")
    panels[1, 0].set_ylabel("arrows and tails that are right")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return Drawing(STUDY.name, figure, CAPTION)


def _curve(axes: "Axes", rows: list[dict], key: str, name: str, **look) -> None:
    means, errors = zip(*(mean_error(row[key] for row in pick(rows, n=n)) for n in SAMPLES), strict=True)
    at = np.arange(len(SAMPLES)) + (0.03 * [*LOOKS].index(name) if name in LOOKS else 0)
    axes.errorbar(at, means, errors, label=name, markersize=4, **{"linewidth": 1.5} | look)


CAPTION = (
    f"Means of {SYSTEMS} systems and their standard errors. Grey above: the mean F1 of random graphs of as many edges "
    "as discover found; grey below: what the more frequent of the two marks, set at every end, would get right."
)
METHOD = (
    f"{SYSTEMS} random linear Gaussian systems of {T} variables a family, seeds 0 … {SYSTEMS - 1}, about 2.5 edges a "
    "variable; half of the parentless variables with two children or more are hidden, none in the third family. "
    "Searched are the exact correlations, and those of n samples; a test calls independent what is below the cut of "
    f"level {ALPHA} for that n, exact correlations what is below 8e-8. All searches make the same tests of the same "
    "correlations, causal-learn's `fci` and `pc` too, and all but `pc` allow for selection, although there is none. "
    "causal-learn is given names of fixed hashes, for its graphs vary with Python's. `discover, order known` is also "
    "told a true causal order. `pc` assumes that nothing is hidden; an edge that its CPDAG leaves undirected is read "
    "as o-o, any other as it stands. `correlated at all` keeps every pair whose correlation is above the cut. F1, "
    "precision and recall are of edges, by the true PAG. Arrows and tails are counted on edges that are true: right "
    "are those that the true MAG has, of all that are claimed; found are those that the true PAG settles and the "
    "search does. Distance is to the PAG, so true marks that only the order tells count as differences. Chance is the "
    "mean F1 of all graphs with as many edges. Independent data have no edges: what is found there is the searches' "
    "own. Of missed edges it is said how many have |r| below the cut already given nothing; of extra ones, how many "
    "have a true separating set that passes the test, so that the search failed to try it. Nothing was tuned."
)
QUESTION = "What do searches recover of random linear models?"
STUDY = Study("linear_models", QUESTION, METHOD, measure, tables, draw)

if __name__ == "__main__":
    run(STUDY)

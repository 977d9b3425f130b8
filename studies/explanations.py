"""Explanations of predictions by CLEANN beside attention, gradients, chance and the exhaustive search."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import NamedTuple

import numpy as np
import torch
from explained import Case, Explained, next_token, recommender
from reviews import WRITTEN, classifier
from study import Study, Table, run, spread
from torch import Tensor

from causalattn.attention import attention_rows
from causalattn.discovery import Discovery, explain, null_discoveries
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet
from causalattn.text_discovery import TextCorrelations, text_correlations
from causalattn.text_explanation import Replacement, head_graphs

TASKS = {"sentiment": classifier, "next token": next_token, "recommendation": recommender}
SEEDS = {"sentiment": (0,), "next token": (0, 1), "recommendation": (0, 1)}
CUTS = (0.05, 0.1, 0.2, 0.3, 0.5)
# validation and test cases a model
CASES, FEW = (16, 40), (1, 1)
LARGEST = 3
# of the exhaustive search's hits on validation, so many must be CLEANN's at its cut
ENOUGH = 0.9
RANDOM_SETS = 20

CLEANN, BEFORE, NULL = "CLEANN", "CLEANN, predicting row", "CLEANN, null graphs"
SEARCHES = ("all sets by attention", "all sets by gradient", "all sets at random")
GREEDY = ("attention top-k", "attention top-k, predicting row", "gradient top-k", "random top-k")
EXHAUSTIVE = "exhaustive"
METHODS = (CLEANN, BEFORE, NULL, *SEARCHES, *GREEDY, EXHAUSTIVE)
CURVES = {
    CLEANN: {"color": BLUE, "linewidth": 2},
    BEFORE: {"color": BLUE, "linewidth": 1.4, "linestyle": "--"},
    NULL: {"color": BLUE, "linewidth": 1.4, "linestyle": ":"},
    SEARCHES[0]: {"color": ORANGE, "linewidth": 1.6},
    SEARCHES[1]: {"color": INK, "linewidth": 1.2, "linestyle": "--"},
    SEARCHES[2]: {"color": GREY, "linewidth": 1.6},
}
NAN = float("nan")
CAPTION = (
    "Share of inputs of which a set is found whose replacement changes the prediction, against how many sets were "
    "tested by then. A line ends at the share that its search finds at all; null graphs are of attention with the same "
    "entropies and no structure."
)
METHOD = f"""\
Three models made by the study. Sentiment: MiniLM, its last layer trained on {WRITTEN} reviews made of templates
(positive, negative, neutral; negations, conceded clauses), tested on other templates and other words. Next token: a
GPT-2 of 2 layers and 4 heads, trained on texts whose answer one value decides, or two, or either of two that are the
same. Recommendation: the same architecture on histories of items, half of which an earlier item leads to; its accuracy
is how often the next item is among its first 5. All were trained on masked inputs too (of reviews
only words that do not decide were masked), and a set is tested by masking it.
Each model explains {CASES[1]} test inputs; mean ± standard error is over inputs, of 2 models in the GPT-2 tasks and
of 1 for sentiment, so differences between trainings are hardly in it.

CLEANN pools the graphs of all heads of the last layer (independent where |r| is below the cut; order of the text where
attention is causal) and looks for sets of at most {LARGEST}, here its nearest one. The attention is read with the
predicted token in place at the end, or, "predicting row", of the token whose state predicts it, which then is in no
set; of a classifier it is that of [CLS]. The cut is chosen of {", ".join(map(str, CUTS))} on {CASES[0]} validation
inputs a model: the one that takes fewest tests among those that find {ENOUGH} of what the exhaustive search finds,
or the most.
Null graphs are of random logits with the entropies of each head's rows, at CLEANN's cut. "All sets" tests every set of
one token, then of two and of three, those of a size by the sum of a score (attention of the target's row, mean over
heads; ‖gradient × embedding‖; chance) and stops at the first hit, so its sets are of least size. "Top-k" takes the k
tokens of highest score for k = 1, 2, … to all of them. Tests to the first are those up to the first hit, or all where
there is none; in all, those that the method makes (CLEANN tests all sets of the size of its first hit); found in
CLEANN's tests, by the time that as many were made as CLEANN makes of that input in all. Causes: of a review the words
that decide (of a neutral one its adjectives), of an answer the values that the context shows, of an item those of its
group and those that lead to it; the column counts explanations that hold nothing else."""


class Found(NamedTuple):
    """The first set that changed the prediction, None where there was none; tests up to it, and in all."""

    positions: tuple[int, ...] | None
    first: int
    tested: int


class Asked:
    """Whether replacing a set of positions changes a case's prediction; no set is run twice."""

    def __init__(self, model: Explained, case: Case) -> None:
        self.tester = Replacement(lambda ids: model.logits(case, input_ids=ids).argmax(-1), case.ids, model.replacement)

    @property
    def predicted(self) -> int:
        return self.tester.before

    def changes(self, sets: Sequence[tuple[int, ...]]) -> list[bool]:
        new = [each for each in dict.fromkeys(sets) if each not in self.tester.after]
        for n in range(0, len(new), 64):
            self.tester.predictions(new[n : n + 64])
        return [self.tester.after[each] != self.predicted for each in sets]

    def until(self, sets: Iterable[tuple[int, ...]]) -> Found:
        """Test sets one after another until one changes the prediction."""
        sets, tested = iter(sets), 0
        while some := [*islice(sets, 16)]:
            for each, changed in zip(some, self.changes(some), strict=True):
                tested += 1
                if changed:
                    return Found(each, tested, tested)
        return Found(None, tested, tested)


class Reading(NamedTuple):
    """The last layer's attention, [H, T, S] and its correlations, of the replaceable positions and then the target."""

    positions: list[int]
    maps: TextCorrelations
    A: Tensor

    def row(self) -> np.ndarray:
        """Attention of the target to the replaceable positions, mean over heads."""
        return self.A[:, -1, self.positions[:-1]].mean(0).numpy()

    def graphs(self, cut: float) -> list[Discovery]:
        return [*head_graphs(self.maps, cut=cut).values()]

    def null_graphs(self, cut: float, seed: int) -> list[Discovery]:
        """Of each head one of a map with its entropies and nothing else of it."""
        order = "time" if self.maps.ordered else None
        generator = torch.Generator().manual_seed(seed)
        names = self.maps.names
        return [null_discoveries(A, draws=1, generator=generator, cut=cut, order=order, names=names)[0] for A in self.A]


def read(model: Explained, case: Case, predicted: int, abduct: bool) -> Reading:
    """Of [CLS] where a class is predicted; else of the predicted token, in place, or of the row that predicts it."""
    ids, T = case.ids, len(case.ids)
    target = T if abduct else T - 1
    if model.row is None:
        target = 0
    elif abduct:
        ids = torch.cat([ids, torch.tensor([predicted])])
    chosen = [*(t for t in case.positions if t != target), target]
    maps = text_correlations(model.model, {"input_ids": ids[None]}, [str(t) for t in range(len(ids))], chosen, None)
    A = attention_rows(maps.call.q, maps.call.k, torch.tensor(chosen), **maps.call.options())[0]
    return Reading(chosen, maps, A.double())


def gradient(model: Explained, case: Case, predicted: int) -> np.ndarray:
    """‖gradient × embedding‖ of each replaceable position, of the predicted one's logit."""
    x = model.model.get_input_embeddings()(case.ids[None]).detach().requires_grad_()
    slope = torch.autograd.grad(model.logits(case, inputs_embeds=x)[0, predicted], x)[0]
    return (slope * x).norm(dim=-1)[0, case.positions].detach().numpy()


def cleann(asked: Asked, positions: list[int], graphs: list[Discovery]) -> Found:
    """CLEANN's nearest set; it tests all sets of that one's size."""
    answered: list[bool] = []

    def tester(sets: list[tuple[int, ...]], target: int) -> list[bool]:
        answers = asked.changes([tuple(positions[node] for node in nodes) for nodes in sets])
        answered.extend(answers)
        return answers

    explained = explain(graphs, len(positions) - 1, tester, max_size=LARGEST)
    if not explained.found:
        return Found(None, explained.tested, explained.tested)
    nodes = explained.found[0].tokens
    return Found(tuple(positions[node] for node in nodes), answered.index(True) + 1, explained.tested)


def by_size(positions: Sequence[int], scores: np.ndarray) -> Iterator[tuple[int, ...]]:
    """All sets of one position, of two and of three, those of a size by the sum of their scores."""
    score = dict(zip(positions, scores.tolist(), strict=True))
    for size in range(1, LARGEST + 1):
        yield from sorted(combinations(sorted(positions), size), key=lambda each: -sum(score[t] for t in each))


def growing(positions: Sequence[int], scores: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The position of highest score, the two of highest, and so on to all."""
    order = [positions[n] for n in np.argsort(-scores, kind="stable").tolist()]
    return (tuple(sorted(order[:size])) for size in range(1, len(order) + 1))


def exhaustive(asked: Asked, positions: Sequence[int]) -> Found:
    """Every set of each size up to the least that changes the prediction, the first of them in the text's order."""
    tested = 0
    for size in range(1, LARGEST + 1):
        sets = [*combinations(positions, size)]
        answers = asked.changes(sets)
        if any(answers):
            at = answers.index(True)
            return Found(sets[at], tested + at + 1, tested + len(sets))
        tested += len(sets)
    return Found(None, tested, tested)


def every_method(model: Explained, case: Case, asked: Asked, cuts: dict[str, float], seed: int) -> dict[str, Found]:
    """What each method finds for one case, CLEANN at the cuts chosen on validation cases."""
    target = read(model, case, asked.predicted, True)
    scores = {"attention": target.row(), "gradient": gradient(model, case, asked.predicted)}
    scores["random"] = np.random.default_rng([seed, 5]).random(len(case.positions))
    found = {
        CLEANN: cleann(asked, target.positions, target.graphs(cuts[CLEANN])),
        NULL: cleann(asked, target.positions, target.null_graphs(cuts[CLEANN], seed)),
    }
    if model.row is not None:
        before = read(model, case, asked.predicted, False)
        found[BEFORE] = cleann(asked, before.positions, before.graphs(cuts[BEFORE]))
        # the predicting token has a row of its own, in which it may attend itself
        row = before.A[:, -1, case.positions].mean(0).numpy()
        found[GREEDY[1]] = asked.until(growing(case.positions, row))
    for score, search, greedy in zip(scores, SEARCHES, (GREEDY[0], *GREEDY[2:]), strict=True):
        found[search] = asked.until(by_size(case.positions, scores[score]))
        found[greedy] = asked.until(growing(case.positions, scores[score]))
    return found | {EXHAUSTIVE: exhaustive(asked, case.positions)}


def choose_cut(hits: dict[float, list[Found]], most: int) -> float:
    """The cut of fewest tests among those with nearly as many hits as the exhaustive search, else the one of most."""
    number = {cut: sum(each.positions is not None for each in found) for cut, found in hits.items()}
    enough = [cut for cut in hits if number[cut] >= ENOUGH * most]
    enough = enough or [cut for cut in hits if number[cut] == max(number.values())]
    return min(enough, key=lambda cut: sum(each.first for each in hits[cut]))


def chosen_cuts(model: Explained) -> dict[str, float]:
    """Of CLEANN with the target in place, and by the row that predicts."""
    asked = [Asked(model, case) for case in model.validation]
    most = sum(
        exhaustive(a, case.positions).positions is not None for a, case in zip(asked, model.validation, strict=True)
    )
    cuts = {}
    for name, abduct in ((CLEANN, True), (BEFORE, False))[: 1 if model.row is None else 2]:
        readings = [read(model, case, a.predicted, abduct) for a, case in zip(asked, model.validation, strict=True)]
        hits = {
            cut: [cleann(a, one.positions, one.graphs(cut)) for a, one in zip(asked, readings, strict=True)]
            for cut in CUTS
        }
        cuts[name] = choose_cut(hits, most)
    return cuts


def rows_of(model: Explained, case: Case, cuts: dict[str, float], seed: int) -> list[dict]:
    """One a method, and one a cut with CLEANN's graphs and with null graphs."""
    asked = Asked(model, case)
    found = every_method(model, case, asked, cuts, seed)
    least = len(found[EXHAUSTIVE].positions or ())
    order = model.logits(case, input_ids=case.ids[None])[0].argsort(descending=True).tolist()
    rows = []
    for method, one in found.items():
        size = len(one.positions or ())
        row = {"method": method, "cut": cuts.get(method, NAN), "found": 0 < size <= LARGEST, "first": one.first}
        row |= {"tested": one.tested, "within": 0 < size <= LARGEST and one.first <= found[CLEANN].tested}
        row |= {"size": size or NAN, "gap": size - least if size and least else NAN, "true": NAN, "rank": NAN}
        if size:
            row["true"] = float(case.causes.issuperset(one.positions))
            row["rank"] = order.index(asked.tester.after[one.positions]) + 1
        rows.append(row | {"chance": chance(asked, case, size, seed) if size and method == CLEANN else NAN})
    return rows + [row for cut in CUTS for row in rows_of_cut(model, case, asked, cut, seed)]


def rows_of_cut(model: Explained, case: Case, asked: Asked, cut: float, seed: int) -> list[dict]:
    """Of graphs and null graphs at a cut, what is found and which positions have an edge to the target."""
    target = read(model, case, asked.predicted, True)
    rows = []
    for graph, graphs in (("graphs", target.graphs(cut)), ("null", target.null_graphs(cut, seed))):
        at = len(target.positions) - 1
        near = {target.positions[node] for found in graphs for node in found.pag.adjacent(at)}
        one = cleann(asked, target.positions, graphs)
        row = {"graph": graph, "cut": cut, "found": one.positions is not None, "first": one.first}
        others = {*case.positions} - case.causes
        rows.append(row | {"near": share(case.causes, near), "others": share(others, near)})
    return rows


def chance(asked: Asked, case: Case, size: int, seed: int) -> float:
    """The share of random sets of a size that change the prediction."""
    rng = np.random.default_rng([seed, 6])
    sets = [tuple(sorted(rng.permutation(case.positions)[:size].tolist())) for _ in range(RANDOM_SETS)]
    return float(np.mean(asked.changes(sets)))


def share(some: Iterable[int], near: set[int]) -> float:
    return float(np.mean([t in near for t in some])) if some else NAN


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    """Train each model, choose its cuts on its validation cases, and explain its test cases by every method."""
    cases = FEW if quick else CASES
    models = [(task, seed) for task in TASKS for seed in SEEDS[task][: 1 if quick else None]]
    measured, done = [], 0
    for task, seed in models:
        model = TASKS[task](seed, cases, quick)
        cuts = chosen_cuts(model)
        for number, case in enumerate(model.test):
            about = {"task": task, "seed": seed, "case": number, "accuracy": model.accuracy}
            measured += [about | row for row in rows_of(model, case, cuts, number)]
            done += 1
            progress(done, len(models) * cases[1])
    return measured


def tables(rows: list[dict]) -> list[Table]:
    """Of each task its methods, then its cuts."""
    found = []
    for task in TASKS:
        of_task = [row for row in rows if row["task"] == task]
        found.append(
            Table(_title(task, of_task), [_line(of_task, method) for method in METHODS if _of(of_task, method)])
        )
    return [*found, Table("CLEANN at every cut, of graphs and of null graphs", _cut_lines(rows))]


def _title(task: str, rows: list[dict]) -> str:
    models = {(row["seed"], row["accuracy"], row["cut"]) for row in rows if row.get("method") == CLEANN}
    each = "; ".join(f"model {seed}: accuracy {right:.2f}, cut {cut}" for seed, right, cut in sorted(models))
    tried = spread(row["chance"] for row in rows if row.get("method") == CLEANN)
    return f"{task} ({each}). Of random sets as large as CLEANN's {tried} change the prediction"


def _line(rows: list[dict], method: str) -> dict:
    mine = _of(rows, method)
    line = {"method": method, "found": spread(row["found"] for row in mine)}
    line |= {"size": spread(row["size"] for row in mine), "over least size": spread(row["gap"] for row in mine)}
    line |= {
        "tests to the first": spread(row["first"] for row in mine),
        "in all": spread(row["tested"] for row in mine),
    }
    line["found in CLEANN's tests"] = spread(row["within"] for row in mine)
    line["only causes"] = spread(row["true"] for row in mine)
    if mine[0]["task"] == "recommendation":
        line["replaced by 2nd or 3rd"] = spread(row["rank"] in (2, 3) for row in mine if row["rank"] == row["rank"])
    return line


def _cut_lines(rows: list[dict]) -> list[dict]:
    lines = []
    for task in TASKS:
        for cut in CUTS:
            line = {"task": task, "cut": cut}
            for graph in ("graphs", "null"):
                mine = [r for r in rows if r["task"] == task and r.get("graph") == graph and r["cut"] == cut]
                for head, name in (("found", "found"), ("tests", "first"), ("causes", "near"), ("others", "others")):
                    line[f"{graph}: {head}"] = spread(row[name] for row in mine)
            lines.append(line)
    return lines


def _of(rows: list[dict], method: str) -> list[dict]:
    return [row for row in rows if row.get("method") == method]


def draw(rows: list[dict]) -> Drawing:
    """The share of cases explained against the sets tested."""
    figure = sheet(10.5, 3.8, f"Predictions that a set of at most {LARGEST} tokens is found to change")
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        most = max(row["tested"] for row in rows if row["task"] == task and row.get("method") in CURVES)
        for method, style in CURVES.items():
            mine = _of([row for row in rows if row["task"] == task], method)
            # a class has no row that predicts it
            if not mine:
                continue
            tests = sorted(row["first"] for row in mine if row["found"])
            shares = np.arange(len(tests) + 1) / len(mine)
            axes.step([1, *tests, most], [*shares, shares[-1]], where="post", label=method, **style)
        axes.set_xscale("log")
        ticks = [10**n for n in range(4) if 10**n <= most]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(task, fontsize=10, color=INK)
        axes.set(xlabel="sets tested", ylim=(0, 1.02))
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("share of inputs")
    figure.axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return Drawing("explanations", figure, CAPTION)


STUDY = Study("explanations", "Do graphs of attention find the tokens that a prediction hangs on?", METHOD, measure,
              tables, draw)  # fmt: skip

if __name__ == "__main__":
    run(STUDY)

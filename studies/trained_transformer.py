"""Whether the attention of a transformer recovers the graph that its training sequences came from, as it learns them.

The claim put to the test is that of Rohekar, Gurwicz and Nisimov 2023 (arXiv:2310.20307): graphs from A Aᵀ of the
deepest layer get better as the model does.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from masked_model import CENTRES, LAYERS, SEED, World, accuracy, ceiling, coded, majority, model_of, trained, world
from study import Study, Table, run, spread
from torch import Tensor, nn

from causalattn.analysis import capture
from causalattn.attention import attention_rows
from causalattn.covariance import attention_correlation, attention_covariance
from causalattn.dense import correlation
from causalattn.discovery import PAG, Mark, compare, discover, null_attention
from causalattn.discovery.nulls import NULLS
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, Drawing, sheet

# 0.093 and 0.376 are what (n, α) = (768, 0.01) and (128, 1e-5) of published uses come to
CUTS = (0.093, 0.2, 0.376)
ALPHA = 0.01
SHUFFLED = {"f1": "shuffled", "mean_f1": "mean_shuffled"}
SINGLE = {
    "accuracy": "accuracy", "F1": "f1", "random logits": "random_logits", "permuted rows": "permute",
    "random graph": "random", "complete graph": "complete_f1", "edges": "edges", "cut": "cut", "arrows right": "arrows",
}  # fmt: skip
RANKS = {
    "R of A Aᵀ": "rank_R", "A + Aᵀ": "rank_A", "exact correlation": "rank_correlation",
    "exact partial correlation": "rank_partial",
}  # fmt: skip
KNOWN = {
    "accuracy of the majority": "majority", "ceiling of accuracy": "ceiling", "F1 of training values": "values_f1",
    "F1 of training tokens": "tokens_f1", "true edges": "true_edges", "true ends that are arrows": "true_arrows",
}  # fmt: skip


class Size(NamedTuple):
    """How much is made: models, the steps at which each is looked at, sequences.

    train, held: sequences to train on, and of each other split. validation, test: how many of those are searched one by
    one. averaged: how many make a mean of A Aᵀ. shuffles: of the truth's tokens.
    """

    models: int
    steps: tuple[int, ...]
    train: int
    held: int
    validation: int
    test: int
    averaged: int
    shuffles: int


FULL = Size(8, (0, 100, 300, 800, 1600), 16384, 512, 3, 6, 64, 200)
QUICK = Size(2, (0, 30), 1024, 64, 1, 1, 16, 20)
METHOD = (
    f"{FULL.models} random linear systems of 9 variables (2.5 edges each on average, weights ±U(0.5, 2), half of "
    "the roots with two children or more hidden). A sequence is a draw: each of the 7 or 8 variables left is a "
    "position, the eighth of its distribution in which its value lies the token. A model a system (BERT, "
    f"{LAYERS} layers of 4 heads, width 32, no dropout, another seed each) learns {FULL.train} sequences by "
    "masking 25 % of the tokens as BERT does: one system a model, since that is the easiest case of the claim "
    "and trains in seconds; it says nothing of a model that has to tell systems apart. Accuracy is that of 512 "
    "other sequences with one token masked at a time, beside the majority's and a ceiling: the best predictor "
    "from the others' exact values and the exact correlations. Graphs: correlations of A Aᵀ of unmasked "
    f"sequences, searched by ICD with no limit to its sets at the cuts {', '.join(map(str, CUTS))} (the first and "
    f"the last are what published n and α come to). Head and cut are those of the best F1 on {FULL.validation} "
    f"validation sequences, and the F1 is that of {FULL.test} test sequences; likewise for one graph of the mean "
    f"of A Aᵀ over {FULL.averaged} sequences. The choice sees the same true graph that the test does, as the "
    "sequences of a model share it, and so all nulls get a choice too. Shuffled: the same graphs held to the "
    f"truth with its tokens exchanged at random, {FULL.shuffles} times, head and cut chosen anew for each; it "
    "keeps all but which token is which, so only what is beyond it is recovered structure, and p is the share of "
    "shuffles that do as well. Random logits and permuted rows: one null map a sequence of the chosen head, the "
    "cut chosen anew. Random graph: its expected F1 with as many edges. Step 0 is the untrained model. Training "
    "values and tokens: a search of the correlations of the training sequences (tokens at their bins' medians) "
    f"with n = {FULL.train}, α = {ALPHA}. Errors are standard errors over models, each of its own system and "
    "seed."
)


class Maps(NamedTuple):
    """Attention of one layer on some sequences, [B, H, T, T], its correlations, and those of the mean of A Aᵀ."""

    A: Tensor
    R: Tensor
    mean: Tensor


def maps(model: nn.Module, tokens: Tensor, layer: int, few: int, many: int) -> Maps:
    """A and R of the first few sequences, the mean of the first many."""
    one, mean = (capture(model, {"input_ids": tokens[:n]}, [layer])[layer] for n in (few, many))
    A = attention_rows(one.q, one.k, torch.arange(tokens.shape[1]), **one.options())
    C = attention_covariance(mean.q, mean.k, **mean.options()).mean(0, keepdim=True)
    return Maps(A, attention_correlation(one.q, one.k, **one.options()), scaled(C))


def scaled(C: Tensor) -> Tensor:
    deviation = C.diagonal(dim1=-2, dim2=-1).sqrt()
    return C / (deviation[..., None] * deviation[..., None, :])


def searched(R: Tensor) -> np.ndarray:
    """The graph of every sequence, head and cut: [B, H, cuts] of PAG."""
    found = np.empty((*R.shape[:2], len(CUTS)), object)
    for b, h, c in np.ndindex(found.shape):
        found[b, h, c] = discover(R[b, h], cut=CUTS[c], selection_bias=False).pag
    return found


def edges_of(found: np.ndarray) -> np.ndarray:
    """[..., T, T] bool of graphs [...]."""
    return np.stack([pag.skeleton for pag in found.flat]).reshape(*found.shape, *found.flat[0].marks.shape)


def edge_f1(edges: np.ndarray, truth: np.ndarray) -> np.ndarray:
    both, either = (edges & truth).sum((-1, -2)), edges.sum((-1, -2)) + truth.sum()
    return np.where(either > 0, 2 * both / np.maximum(either, 1), 1.0)


def chosen(validation: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """The head and the cut whose edges [B, H, cuts, T, T] have the best mean F1."""
    f1 = edge_f1(validation, truth).mean(0)
    return tuple(map(int, np.unravel_index(f1.argmax(), f1.shape)))


def held_f1(validation: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 on the test sequences of the head and the cut that validation sequences choose."""
    return float(edge_f1(test[(slice(None), *chosen(validation, truth))], truth).mean())


def shuffled_f1(
    validation: np.ndarray, test: np.ndarray, truth: np.ndarray, rng: np.random.Generator, n: int
) -> np.ndarray:
    """The same choice and the same graphs, held to the truth with its tokens exchanged: [n]."""
    orders = (rng.permutation(len(truth)) for _ in range(n))
    return np.array([held_f1(validation, test, truth[np.ix_(order, order)]) for order in orders])


def random_f1(edges: np.ndarray, truth: np.ndarray) -> float:
    """Mean over graphs of the expected F1 of a random graph with as many edges m: 2·m·t / (pairs·(m + t))."""
    m, t = edges.sum((-1, -2)) / 2, truth.sum() / 2
    pairs = truth.shape[0] * (truth.shape[0] - 1) / 2
    return float(np.mean(2 * m * t / pairs / (m + t)))


def null_f1(null: str, validation: Tensor, test: Tensor, truth: np.ndarray, seed: int) -> float:
    """held_f1 of one null map a sequence of one head, A [B, T, T], the cut chosen anew."""
    generator = torch.Generator().manual_seed(seed)

    def edges(A: Tensor) -> np.ndarray:
        drawn = torch.stack([null_attention(each, null=null, generator=generator) for each in A])
        return edges_of(searched(correlation(drawn)[:, None]))

    return held_f1(edges(validation), edges(test), truth)


def ranked(scores: np.ndarray, truth: np.ndarray) -> float:
    """The probability that a true edge's score [..., T, T] is above a pair's without one, ½ where they are the same."""
    pairs = np.triu_indices(len(truth), 1)
    scores, true = scores[..., *pairs], truth[pairs]
    above = scores[..., true, None] - scores[..., None, ~true]
    return float(((np.sign(above) + 1) / 2).mean()) if above.size else float("nan")


def judged(validation: Maps, test: Maps, truth: PAG, size: Size, seed: int) -> dict:
    """What the maps of one layer recover, beside every null; seed: of the nulls."""
    rng = np.random.default_rng([SEED, seed, 1])
    true = truth.skeleton
    found = [searched(x) for x in (validation.R, test.R, validation.mean, test.mean)]
    single, mean = ([edges_of(x) for x in pair] for pair in (found[:2], found[2:]))
    head, cut = chosen(single[0], true)
    picked = found[1][:, head, cut]
    A = test.A.double().numpy()
    return {
        "f1": held_f1(*single, true),
        "shuffled": shuffled_f1(*single, true, rng, size.shuffles),
        **{null: null_f1(null, validation.A[:, head], test.A[:, head], true, seed) for null in NULLS},
        "random": random_f1(edges_of(picked), true),
        "edges": float(edges_of(picked).sum((-1, -2)).mean() / 2),
        "cut": CUTS[cut],
        "arrows": known_mean([compare(pag, truth).arrow_precision for pag in picked]),
        "mean_f1": held_f1(*mean, true),
        "mean_shuffled": shuffled_f1(*mean, true, rng, size.shuffles),
        "rank_R": ranked(test.R.numpy(), true),
        "rank_A": ranked(A + A.swapaxes(-1, -2), true),
    }


def known_mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def references(drawn: World) -> dict:
    """What predictors and searches without a model make of the same sequences."""
    R, true = drawn.system.correlations(), drawn.truth.skeleton
    precision = np.linalg.inv(R)
    deviation = np.sqrt(precision.diagonal())

    def f1(samples: Tensor) -> float:
        found = discover(torch.from_numpy(np.corrcoef(samples.T)), n=len(samples), alpha=ALPHA, selection_bias=False)
        return compare(found.pag, drawn.truth).f1

    marks = drawn.truth.marks
    return {
        "ceiling": ceiling(R, drawn.test),
        "majority": majority(coded(drawn.train), coded(drawn.test)),
        "values_f1": f1(drawn.train),
        "tokens_f1": f1(CENTRES[coded(drawn.train)]),
        "complete_f1": float(edge_f1(~np.eye(len(true), dtype=bool), true)),
        "true_edges": float(true.sum() / 2),
        "true_arrows": float((marks == Mark.ARROW).sum() / (marks != Mark.NONE).sum()),
        "rank_correlation": ranked(abs(R), true),
        "rank_partial": ranked(abs(precision) / deviation / deviation[:, None], true),
    }


def followed(seed: int, size: Size, done: Callable[[], None]) -> Iterator[dict]:
    """A row a checkpoint of one model for the deepest layer, and of the first and the last one for the others."""
    drawn = world(seed, size.train, size.held)
    known = references(drawn)
    train, validation, test = map(coded, (drawn.train, drawn.validation, drawn.test))
    model = model_of(train.shape[1], seed)
    for step in trained(model, train, size.steps, seed):
        named = accuracy(model, test)
        for layer in range(LAYERS):
            if layer == LAYERS - 1 or step in (size.steps[0], size.steps[-1]):
                seen = (
                    maps(model, x, layer, n, size.averaged)
                    for x, n in ((validation, size.validation), (test, size.test))
                )
                found = judged(*seen, drawn.truth, size, seed)
                yield {"model": seed, "step": step, "layer": layer, "accuracy": named, **known, **found}
        done()


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    size = QUICK if quick else FULL
    finished = iter(range(1, size.models * len(size.steps) + 1))

    def done() -> None:
        progress(next(finished), size.models * len(size.steps))

    return [row for seed in range(size.models) for row in followed(seed, size, done)]


def tables(rows: list[dict]) -> list[Table]:
    deepest = [row for row in rows if row["layer"] == LAYERS - 1]
    steps = sorted({row["step"] for row in rows})
    at = {step: [row for row in deepest if row["step"] == step] for step in steps}
    ends = [(layer, step) for layer in range(LAYERS) for step in (steps[0], steps[-1])]
    layers = [[row for row in rows if (row["layer"], row["step"]) == end] for end in ends]
    return [
        Table("One sequence, deepest layer", [{"step": step} | means(at[step], SINGLE) for step in steps]),
        Table("One sequence beside shuffled truths", [_beyond(step, at[step], "f1") for step in steps]),
        Table("The mean of A Aᵀ beside shuffled truths", [_beyond(step, at[step], "mean_f1") for step in steps]),
        Table("Whether recovery grows with accuracy", _growth(deepest, steps)),
        Table("Layers", [_layer(*end, of) for end, of in zip(ends, layers, strict=True)]),
        Table("The chance that a true edge is above another pair", [{"step": s} | means(at[s], RANKS) for s in steps]),
        Table("The same sequences without a model", [means(at[steps[0]], KNOWN)]),
    ]


def means(rows: list[dict], named: dict[str, str]) -> dict:
    return {head: spread(row[name] for row in rows) for head, name in named.items()}


def _beyond(step: int, rows: list[dict], name: str) -> dict:
    f1, null = np.array([row[name] for row in rows]), np.stack([row[SHUFFLED[name]] for row in rows])
    own = p_value(f1[:, None], null)
    return {
        "step": step,
        "F1": spread(f1),
        "shuffled": spread(null.mean(1)),
        "beyond": spread(excess(row, name) for row in rows),
        "p of the mean over models": f"{p_value(f1.mean(), null.mean(0)):.3f}",
        "models with p ≤ 0.05": f"{(own <= 0.05).sum()} of {len(own)}",
    }


def p_value(value: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Of values [..., 1] or a number and what they are under exchanged tokens [..., n]."""
    return (1 + (null >= value - 1e-12).sum(-1)) / (1 + null.shape[-1])


def excess(row: dict, name: str) -> float:
    return row[name] - float(row[SHUFFLED[name]].mean())


def _growth(rows: list[dict], steps: list[int]) -> list[dict]:
    models = [[row for row in rows if row["model"] == model] for model in sorted({row["model"] for row in rows})]
    named = [np.array([row["accuracy"] for row in model]) for model in models]
    measures = {
        "F1": lambda row: row["f1"],
        "F1 beyond shuffled": lambda row: excess(row, "f1"),
        "F1 of the mean": lambda row: row["mean_f1"],
        "F1 of the mean beyond shuffled": lambda row: excess(row, "mean_f1"),
        "chance of a true edge above another pair": lambda row: row["rank_R"],
    }
    made = []
    for title, of in measures.items():
        values = [np.array([of(row) for row in model]) for model in models]
        made.append(
            {"of": title, f"step {steps[-1]} less step {steps[0]}": spread(x[-1] - x[0] for x in values),
             "correlation with accuracy over steps": spread(map(correlated, named, values))}
        )  # fmt: skip
    return made


def correlated(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")


def _layer(layer: int, step: int, rows: list[dict]) -> dict:
    found = {"layer": layer, "step": step}
    for title, name in (("one sequence", "f1"), ("mean", "mean_f1")):
        found[f"{title}: F1"] = spread(row[name] for row in rows)
        found[f"{title}: beyond shuffled"] = spread(excess(row, name) for row in rows)
    return found


def draw(rows: list[dict]) -> Drawing:
    rows = [row for row in rows if row["layer"] == LAYERS - 1]
    steps = sorted({row["step"] for row in rows})
    figure = sheet(9.6, 4.2, "Graphs from a trained transformer's attention")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for panel, name, title in zip(axes, SHUFFLED, ("one sequence", "mean of A Aᵀ over sequences"), strict=False):
        null = np.stack([[row[SHUFFLED[name]] for row in rows if row["step"] == step] for step in steps]).mean(1)
        low, high = np.quantile(null, (0.05, 0.95), axis=1)
        panel.fill_between(range(len(steps)), low, high, color=GREY, alpha=0.3, linewidth=0, label="shuffled truths")
        _line(panel, rows, steps, name, BLUE, "o-", "attention")
        if name == "f1":
            _line(panel, rows, steps, "random_logits", ORANGE, "s--", "random logits")
        _line(panel, rows, steps, "tokens_f1", INK, ":", "training tokens")
        _line(panel, rows, steps, "complete_f1", GREY, "--", "complete graph")
        panel.set(title=title, ylim=(0, 1.02), ylabel="F1 of edges")
    _line(axes[2], rows, steps, "accuracy", BLUE, "o-", "model")
    _line(axes[2], rows, steps, "ceiling", INK, ":", "ceiling")
    _line(axes[2], rows, steps, "majority", GREY, "--", "majority")
    axes[2].set(title="one token masked", ylim=(0, 0.8), ylabel="accuracy")
    for panel in axes:
        panel.set_xticks(range(len(steps)), steps)
        panel.set_xlabel("training steps")
        panel.title.set_fontsize(10)
        panel.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        panel.legend(frameon=False, fontsize=8, loc="upper left" if panel is axes[2] else "lower right")
        panel.spines[["top", "right"]].set_visible(False)
    models = len({row["model"] for row in rows})
    caption = (
        f"Mean and standard error over {models} systems, a model each. Grey: where 90 % of such means lie when the "
        "tokens of the truths are exchanged, the head and the cut chosen anew."
    )
    return Drawing(STUDY.name, figure, caption)


def _line(axes, rows: list[dict], steps: list[int], name: str, colour: str, style: str, label: str) -> None:
    values = np.array([[row[name] for row in rows if row["step"] == step] for step in steps])
    error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
    if "o" not in style and "s" not in style:
        error = None
    axes.errorbar(range(len(steps)), values.mean(1), error, fmt=style, color=colour, label=label, markersize=4)


STUDY = Study(
    "trained_transformer",
    "Does a transformer's attention recover the graph of what it was trained on?",
    METHOD,
    measure,
    tables,
    draw,
)

if __name__ == "__main__":
    run(STUDY)

"""Are correlations of attention rows those of the embeddings that the attention makes?

The theory behind graphs of attention sets the covariance of the outputs Z = A V to A Aᵀ, as if the values were
uncorrelated. Here both are formed of the same sentences and held beside one another.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from minilm import Encoder, Sentence, attention, correlations, hidden, last_call, over_sentences
from skeletons import MAX_ORDER, PUBLISHED, above, chance_f1, f1, skeleton
from study import Study, Table, run, spread
from torch import Tensor

from causalattn.dense import correlation
from causalattn.discovery import null_attention
from causalattn.partial_corr import partial_correlation_given
from causalattn.plot import Drawing
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, sheet

CUT = PUBLISHED[0]
# among which one is sought that leaves an embedding's graph as many edges as the attention's has
GRID = (0.03, 0.06, *PUBLISHED, 0.14, 0.2, 0.27, 0.5, 0.65)
EMBEDDINGS = ("Z", "hidden")
OWN = "random logits, its own Z"
MAPS = {"model": BLUE, "random logits": ORANGE, "permuted": "#E69F00", OWN: "#CC79A7", "untrained": GREY}


class Graphs:
    """Correlations with their tests of order 0 and 1, and skeletons made once a cut."""

    def __init__(self, R: Tensor):
        self.R, self._known = R, {}
        self.tests = (np.abs(above(R)), np.abs(first_order(R)))

    def at(self, cut: float) -> np.ndarray:
        if cut not in self._known:
            self._known[cut] = skeleton(self.R, cut)
        return self._known[cut]

    def of_size(self, edges: int) -> np.ndarray:
        """The skeleton of the cut of GRID that leaves nearest to so many edges."""
        return min((self.at(cut) for cut in GRID), key=lambda found: abs(int(found.sum()) - edges))


class Embedding(NamedTuple):
    """Of a sentence's words: cosines, and correlations over the channels."""

    graphs: Graphs
    centred: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Embedding":
        return cls(Graphs(correlation(rows)), correlation(rows, center=True))


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    """One row a sentence, head, map and embedding."""
    return over_sentences(quick, progress, _of_model)


def _of_model(
    name: str, encoder: Encoder, text: Sentence, heads: range, generator: torch.Generator | None = None
) -> Iterable[dict]:
    """A model's maps beside its embeddings; with a generator, maps of no structure beside them and beside their own."""
    call = last_call(encoder, text)
    R, A = correlations(call, text.words), attention(call, text.words)
    states = Embedding.of(hidden(encoder, text.inputs)[0, text.words])
    for head in heads:
        V = call.v[0, head].double()
        theirs = {"Z": Embedding.of(A[head] @ V), "hidden": states}
        row = {"head": head, "value cosine": float(np.abs(above(correlation(V))).mean())}
        yield from (row | each for each in _beside(name, Graphs(R[head]), theirs))
        if generator is not None:
            permuted = null_attention(A[head], null="permute", generator=generator)
            yield from (row | each for each in _beside("permuted", Graphs(correlation(permuted)), theirs))
            drawn = null_attention(A[head], null="random_logits", generator=generator)
            ours = Graphs(correlation(drawn))
            yield from (row | each for each in _beside("random logits", ours, theirs))
            yield from (row | each for each in _beside(OWN, ours, {"Z": Embedding.of(drawn @ V)}))


def _beside(name: str, ours: Graphs, theirs: dict[str, Embedding]) -> Iterable[dict]:
    """How near a map's correlations, tests and graphs are to those of embeddings."""
    for embedding, (graphs, centred) in theirs.items():
        row = {"map": name, "embedding": embedding}
        for key, R in (("r", graphs.R), ("r centred", centred)):
            row[key] = float(np.corrcoef(above(ours.R), above(R))[0, 1])
        for order in (0, 1):
            mine, other = ours.tests[order], graphs.tests[order]
            row[f"dependent {order}"], row[f"theirs dependent {order}"] = (mine >= CUT).mean(), (other >= CUT).mean()
            row[f"equal {order}"], row[f"equal {order} chance"] = equal(mine >= CUT, other >= CUT)
            half = len(mine) // 2
            found = equal(strongest(mine, half), strongest(other, half))
            row[f"half {order}"], row[f"half {order} chance"] = found
        pairs = {f"f1 {cut}": (ours.at(cut), graphs.at(cut)) for cut in PUBLISHED}
        pairs["f1 of size"] = (ours.at(CUT), graphs.of_size(int(ours.at(CUT).sum())))
        for key, (a, b) in pairs.items():
            row[key], row[f"{key} chance"] = f1(a, b), chance_f1(a, b)
        row["edges"], row["theirs edges"] = int(ours.at(CUT).sum()), int(graphs.at(CUT).sum())
        yield row


def first_order(R: Tensor) -> np.ndarray:
    """r(i, j | k) of every i < j and k, one array; a SINGULAR test, which separates nothing, is ∞."""
    T = len(R)
    r = partial_correlation_given(R, torch.arange(T)[:, None]).r.numpy()
    i, j = np.triu_indices(T, 1)
    k = np.arange(T)[:, None]
    return np.nan_to_num(r[:, i, j][(k != i) & (k != j)], nan=np.inf)


def equal(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The share of equal decisions, and the one that two which know nothing of each other would have."""
    p, q = ours.mean(), theirs.mean()
    return float((ours == theirs).mean()), float(p * q + (1 - p) * (1 - q))


def strongest(r: np.ndarray, number: int) -> np.ndarray:
    """Where the largest are, so many of them."""
    kept = np.zeros(len(r), bool)
    kept[np.argsort(-r, kind="stable")[:number]] = True
    return kept


def tables(rows: list[dict]) -> list[Table]:
    """Correlations, single tests, skeletons, and the values."""
    near, tests, graphs = [], [], []
    for embedding in EMBEDDINGS:
        for name in MAPS:
            kept = [row for row in rows if row["map"] == name and row["embedding"] == embedding]
            if not kept:
                continue
            head = {"embedding": embedding, "map": name}
            near.append(head | {"r": _spread(kept, "r"), "r, embedding centred": _spread(kept, "r centred")})
            for order in (0, 1):
                near[-1][f"map dependent, order {order}"] = _spread(kept, f"dependent {order}")
                near[-1][f"embedding dependent, order {order}"] = _spread(kept, f"theirs dependent {order}")
            cells = [("same cut", "equal"), ("stronger half of each", "half")]
            cells = [(f"{title}, order {order}", f"{key} {order}") for title, key in cells for order in (0, 1)]
            tests.append(head | {title: _with_chance(kept, key) for title, key in cells})
            cells = [*((f"cut {cut}", f"f1 {cut}") for cut in PUBLISHED), ("as many edges", "f1 of size")]
            graphs.append(head | {title: _with_chance(kept, key) for title, key in cells})
            graphs[-1]["edges of the map"] = f"{np.mean(_means(kept, 'edges')):.1f}"
            graphs[-1]["of the embedding"] = f"{np.mean(_means(kept, 'theirs edges')):.1f}"
    return [
        Table(f"r of the entries above the diagonal, and the share of tests with |r| ≥ {CUT}", near),
        Table("Equal decisions, in brackets of two sets of decisions that know nothing of each other", tests),
        Table("F1 of the skeletons, in brackets with the edges of one thrown at random", graphs),
        Table("Mean |cosine| between a head's values", _values(rows)),
    ]


def _values(rows: list[dict]) -> list[dict]:
    found = [
        {"values": name, "cosine": _spread([row for row in rows if row["map"] == name], "value cosine")}
        for name in ("model", "untrained")
    ]
    # of two directions in 32 dimensions
    return [*found, {"values": "random ones", "cosine": f"{np.sqrt(2 / np.pi / 32):.2f}"}]


def _means(rows: list[dict], key: str) -> list[float]:
    """Over the heads, one a sentence."""
    numbers = sorted({row["sentence"] for row in rows})
    return [float(np.mean([row[key] for row in rows if row["sentence"] == number])) for number in numbers]


def _spread(rows: list[dict], key: str) -> str:
    return spread(_means(rows, key))


def _with_chance(rows: list[dict], key: str) -> str:
    return f"{_spread(rows, key)} ({np.mean(_means(rows, f'{key} chance')):.2f})"


def draw(rows: list[dict]) -> Drawing:
    """The likeness of correlations, and of skeletons with as many edges, of each map and embedding."""
    figure = sheet(9.6, 4.2, "Attention rows beside embeddings: how near their correlations and graphs are")
    panels = {"r": "r of the correlations", "f1 of size": "F1 of the skeletons, as many edges (bar: by chance)"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for at, embedding in enumerate(EMBEDDINGS):
            for n, (name, colour) in enumerate(MAPS.items()):
                kept = [row for row in rows if row["map"] == name and row["embedding"] == embedding]
                if not kept:
                    continue
                values, y = _means(kept, key), at + (n - 2) * 0.15
                error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
                label = name if at == 0 else None
                axes.errorbar(np.mean(values), y, xerr=error, fmt="o", color=colour, markersize=5, label=label)
                if f"{key} chance" in kept[0]:
                    axes.plot(np.mean(_means(kept, f"{key} chance")), y, "|", color=colour, markersize=11)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_yticks(range(len(EMBEDDINGS)), ["the head's outputs Z", "last hidden states"], fontsize=9)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.grid(True, axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, title="attention map", title_fontsize=8, loc="lower left")
    return Drawing("embeddings", figure, "Means over sentences of means over the last layer's heads, ± standard error.")


STUDY = Study(
    "embeddings",
    "Are correlations of attention rows those of the embeddings?",
    "The 20 sentences of 10 to 29 tokens of the package's demo passage are read by all-MiniLM-L6-v2. Of each head of "
    "its last layer, correlations R of A Aᵀ, not centred, are held beside cosines of the head's outputs Z = A V and "
    "of the model's last hidden states, over the words ([CLS] and [SEP] are in no graph, their keys count). Beside "
    "the model's maps stand maps of the same row entropies without structure (random logits, permuted rows) against "
    "the same embeddings, random logits against the Z that they themselves make of the model's values, and a model "
    "of the same configuration before training against its own embeddings. Tests are those of order 0 and 1 of every "
    f"pair; a skeleton is what the search of sets up to {MAX_ORDER} leaves. Cuts are the two that published searches "
    "of attention came to, 0.093 (n = 768, α = .01) and 0.376 (n = 128, α = 1e-5); “as many edges” takes for the "
    f"embedding that of {len(GRID)} cuts whose graph has the number of edges nearest to the map's at {CUT}. No cut, "
    "head or sentence was chosen by its result. Every number is a mean over sentences of means over heads, ± its "
    "standard error over sentences.",
    measure,
    tables,
    draw,
)

if __name__ == "__main__":
    run(STUDY)

"""What a graph makes of two tokens that are nearly the same one.

Graphs of attention are read as graphs of tokens because each embedding is taken to stand for one token. Here two
tokens of a sentence are brought together step by step; and, where the truth is known, a variable is given a copy.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from minilm import Encoder, Sentence, correlations, last_call, sentences, trained
from skeletons import MAX_ORDER, PUBLISHED, above, chance_f1, f1
from study import Study, Table, run, spread
from systems import System, random_system

from causalattn.discovery import PAG, Discovery, compare, discover
from causalattn.plot import Drawing
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, sheet

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
# how b is moved: to a's word, to a's word and place, to a word that stands nowhere near (as far, to nobody)
MOVES = ("word", "word and place", "elsewhere")
TOWARDS = dict(zip(MOVES, ("a's word", "a's word and place", "another word"), strict=True))
APART = 3
PAIRS = 2
# of a copy x' = x + ε·sd(x)·noise
NOISES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-5, 1e-7)
# no rounding of an exact correlation reaches the first; the others call dependent only what is strong
CUTS = (1e-9, 0.01, PUBLISHED[0])
SYSTEMS, VARIABLES = 60, 8


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    """Rows of the sentences, one a pair, move, share and head; and of the systems, one a system, cut and noise."""
    encoder = trained()
    texts = sentences(encoder)[-2 if quick else 0 :]
    systems = min(3, SYSTEMS) if quick else SYSTEMS
    heads = range(2) if quick else range(encoder.model.config.num_attention_heads)
    rows, total = [], len(texts) + systems
    for number, text in enumerate(texts):
        rng = np.random.default_rng(number)
        for a, b in pairs(rng, encoder, text):
            rows += [{"sentence": number} | row for row in _of_pair(encoder, texts, number, a, b, rng, heads)]
        progress(number + 1, total)
    for seed in range(systems):
        rows += [{"system": seed} | row for row in of_system(seed)]
        progress(len(texts) + seed + 1, total)
    return rows


def pairs(rng: np.random.Generator, encoder: Encoder, text: Sentence) -> list[tuple[int, int]]:
    """PAIRS of different whole words, APART or more, drawn among the letters' tokens of the sentence."""
    tokens = encoder.tokenizer.convert_ids_to_tokens(text.inputs["input_ids"][0])
    usable = [t for t in text.words.tolist() if tokens[t].isalpha()]
    apart = [(a, b) for a in usable for b in usable if b - a >= APART and tokens[a] != tokens[b]]
    return [apart[n] for n in rng.choice(len(apart), PAIRS, replace=False)]


def _of_pair(
    encoder: Encoder, texts: list[Sentence], number: int, a: int, b: int, rng: np.random.Generator, heads: range
) -> Iterable[dict]:
    """The graphs of the last layer's heads as b is moved."""
    text = texts[number]
    away = int(rng.choice(_words_elsewhere(texts, number)))
    places = {int(t): n for n, t in enumerate(text.words)}
    a_row, b_row = places[a], places[b]
    before: list[Discovery] = []
    for move in MOVES:
        for share in SHARES:
            R = correlations(last_call(encoder, moved(encoder, text, a, b, share, move, away)), text.words)
            found = [discover(R[head], cut=PUBLISHED[0], max_order=MAX_ORDER) for head in heads]
            before = found if share == 0 else before
            for head, was, now in zip(heads, before, found, strict=True):
                row = {"move": move, "share": share, "head": head, "r": float(R[head, a_row, b_row])}
                yield row | _around(now, a_row, b_row) | _changed(was, now, a_row, b_row)


def _words_elsewhere(texts: list[Sentence], number: int) -> list[int]:
    """The token ids of all sentences but one, less those of that one."""
    ids = [{*text.inputs["input_ids"][0, text.words].tolist()} for text in texts]
    return sorted(set().union(*ids) - ids[number])


def moved(encoder: Encoder, text: Sentence, a: int, b: int, share: float, move: str, away: int) -> Sentence:
    """The sentence with the input embedding of its token b that share of the way to a's, or to another word's."""
    embeddings = encoder.model.embeddings
    ids = text.inputs["input_ids"]
    with torch.no_grad():
        x = embeddings.word_embeddings(ids)
        goal = embeddings.word_embeddings(torch.tensor(away)) if move == "elsewhere" else x[0, a]
        x[0, b] = (1 - share) * x[0, b] + share * goal
        if move == "word and place":
            # the model adds b's place itself
            place = embeddings.position_embeddings.weight
            x[0, b] += share * (place[a] - place[b])
    inputs = {"inputs_embeds": x, "attention_mask": text.inputs["attention_mask"]}
    return text._replace(inputs=inputs)


def _around(found: Discovery, a: int, b: int) -> dict:
    """The edge between two tokens, those to others, and how many of the others they share."""
    near_a, near_b = ({*found.pag.adjacent(x)} - {a, b} for x in (a, b))
    either = near_a | near_b
    return {
        "edge": float(found.pag.skeleton[a, b]),
        "neighbours": (len(near_a) + len(near_b)) / 2,
        "shared": len(near_a & near_b) / len(either) if either else float("nan"),
        "singular": sum(level.singular for level in found.levels),
        "tests": sum(level.tests for level in found.levels),
    }


def _changed(before: Discovery, after: Discovery, a: int, b: int) -> dict:
    """How far two graphs agree on the edges at a or b but for that between them, and on those among the others."""
    was, now = before.pag.skeleton.copy(), after.pag.skeleton.copy()
    was[[a, b], [b, a]] = now[[a, b], [b, a]] = False
    rest = [t for t in range(len(was)) if t not in (a, b)]
    ours, theirs = (above(x[rest][:, rest]) for x in (was, now))
    parted, joined = ~was[[a, b]][:, rest], now[[a, b]][:, rest]
    return {
        "at them": f1(was[[a, b]].ravel(), now[[a, b]].ravel()),
        "others": f1(ours, theirs),
        "others by chance": chance_f1(ours, theirs),
        "joined": (parted & joined).sum() / parted.sum() if parted.any() else float("nan"),
    }


def with_copy(system: System, x: int, noise: float) -> System:
    """The system with one more observed variable, its last: x + noise·sd(x)·u."""
    N = len(system.weights)
    weights = np.zeros((N + 1, N + 1))
    weights[:N, :N] = system.weights
    total = np.linalg.inv(np.eye(N) - system.weights)
    # the scale of a variable changes no correlation, and u has deviation 1
    weights[x, N] = 1 / (noise * np.linalg.norm(total[:, x]))
    return System(weights, [*system.observed, N])


def of_system(seed: int) -> Iterable[dict]:
    """The searches of a system with and without a copy of the observed variable that has the most edges."""
    system = random_system(np.random.default_rng(seed), VARIABLES)
    truth = system.truth()
    row = int(truth.skeleton.sum(0).argmax())
    x = system.observed[row]
    for cut in CUTS:
        yield {"cut": cut, "noise": "none"} | _recovered(_search(system, cut), truth, row, None)
        for noise in NOISES:
            larger = with_copy(system, x, noise)
            yield {"cut": cut, "noise": noise} | _recovered(_search(larger, cut), larger.truth(), row, len(truth.names))


def _search(system: System, cut: float) -> Discovery:
    return discover(torch.from_numpy(system.correlations()), cut=cut)


def _recovered(found: Discovery, truth: PAG, x: int, copy: int | None) -> dict:
    """Agreement on all variables, and on those without the copy; what is left of x's edges, and what the copy got."""
    first = [*range(len(truth.names) - (copy is not None))]
    whole = compare(found.pag, truth)
    inner = compare(found.pag.subgraph(first), truth.subgraph(first))
    true = {*truth.adjacent(x)} - {copy}
    near = {*found.pag.adjacent(x)} - {copy}
    of_copy = set() if copy is None else {*found.pag.adjacent(copy)} - {x}
    share = float("nan") if not true else len(near & true) / len(true)
    return {
        "f1": whole.f1, "inner f1": inner.f1, "arrows": whole.arrow_precision, "kept": share,
        "edge": float("nan") if copy is None else float(found.pag.skeleton[x, copy]),
        "stolen": float("nan") if copy is None or not true else len(of_copy & true) / len(true),
        "singular": sum(level.singular for level in found.levels),
    }  # fmt: skip


def tables(rows: list[dict]) -> list[Table]:
    """The sentences by move and share, the systems by cut and noise."""
    near = []
    for move in MOVES:
        for share in SHARES[0 if move == MOVES[0] else 1 :]:
            kept = _where(rows, move=move, share=share)
            near.append({
                "b moved towards": TOWARDS[move] if share else "(not moved)",
                "share": share,
                "r of a and b": _spread(kept, "r"),
                "edge a–b": _spread(kept, "edge"),
                "other edges of each": _spread(kept, "neighbours"),
                "neighbours shared": _spread(kept, "shared"),
                "F1 at a and b": _spread(kept, "at them"),
                "F1 among others": _spread(kept, "others"),
                "by chance": _spread(kept, "others by chance"),
                "separated, now joined": _spread(kept, "joined"),
                "SINGULAR a graph": _spread(kept, "singular"),
            })  # fmt: skip
    return [Table("Sentences: F1 and joined pairs are against the graph before b was moved", near), *_of_systems(rows)]


def _of_systems(rows: list[dict]) -> Iterable[Table]:
    """One table a cut."""
    for cut in CUTS:
        found = []
        for noise in ("none", *NOISES):
            kept = _where(rows, cut=cut, noise=noise)
            copied = noise != "none"
            found.append({
                "ε": f"{noise:g}" if copied else "no copy",
                "1 − r(x, x')": f"{1 - 1 / np.hypot(1, noise):.2g}" if copied else "–",
                "F1": _spread(kept, "f1"),
                "F1 without x'": _spread(kept, "inner f1"),
                "arrows right": _spread(kept, "arrows"),
                "edge x–x'": _spread(kept, "edge"),
                "x's edges kept": _spread(kept, "kept"),
                "x' has them": _spread(kept, "stolen"),
                "SINGULAR a search": _spread(kept, "singular"),
            })  # fmt: skip
        yield Table(f"Systems with a copy x' of x, exact correlations, cut {cut:g}", found)


def _where(rows: list[dict], **of) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in of.items())]


def _means(rows: list[dict], key: str) -> list[float]:
    """One a sentence or system: of what is not NaN."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row[key] == row[key]:
            groups.setdefault((row.get("sentence"), row.get("system")), []).append(row[key])
    return [float(np.mean(values)) for values in groups.values()]


def _spread(rows: list[dict], key: str) -> str:
    return spread(_means(rows, key))


def draw(rows: list[dict]) -> Drawing:
    """Two tokens' likeness and their edge by the share, and what searches of systems recover by the copy's noise."""
    figure = sheet(11, 3.9, "Two tokens that are nearly one, and a variable with a copy")
    left, middle, right = figure.subplots(1, 3)
    for (move, title), colour in zip(TOWARDS.items(), (BLUE, ORANGE, GREY), strict=True):
        for axes, key in ((left, "r"), (middle, "edge")):
            _line(axes, SHARES, [_where(rows, move=move, share=share) for share in SHARES], key, colour, title)
        kept = [_where(rows, move=move, share=share) for share in SHARES]
        _line(middle, SHARES, kept, "shared", colour, None, "o:")
    left.set(title="r of a's and b's rows", xlabel="share of the way", ylim=(None, 1.02))
    middle.set(title="edge a–b; dotted: neighbours shared", xlabel="share of the way", ylim=(0, 1.02))
    for cut, colour in zip(CUTS, (BLUE, ORANGE, GREY), strict=True):
        kept = [_where(rows, cut=cut, noise=noise) for noise in NOISES]
        _line(right, NOISES, kept, "inner f1", colour, f"cut {cut:g}")
        right.axhline(np.mean(_means(_where(rows, cut=cut, noise="none"), "inner f1")), color=colour, linestyle="--")
    right.set(title="systems: F1 without x' (dashed: no copy)", xlabel="noise ε of the copy", ylim=(0, 1.02))
    right.set_xscale("log")
    right.invert_xaxis()
    left.legend(frameon=False, fontsize=8, title="b moved towards", title_fontsize=8, loc="upper left")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    for axes in (left, middle, right):
        axes.title.set(fontsize=10, color=INK)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    caption = (
        "Left, middle: heads of the last layer, means over sentences. Right: exact correlations, means over systems."
    )
    return Drawing("near_tokens", figure, caption)


def _line(axes, at: Iterable[float], groups: list[list[dict]], key: str, colour: str, label: str | None, mark="o-"):
    values = [np.mean(_means(group, key)) for group in groups]
    axes.plot(list(at), values, mark, color=colour, label=label, markersize=4, linewidth=1.4)


STUDY = Study(
    "near_tokens",
    "What becomes of two tokens that are nearly the same one?",
    "The 20 sentences of 10 to 29 tokens of the package's demo passage are read by all-MiniLM-L6-v2; in each, "
    f"{PAIRS} pairs of different whole words a and b, {APART} or more tokens apart, are drawn. The input embedding of "
    "b is moved a share of the way to that of a's word, or to that of a's word and place (at share 1 the two rows "
    "are one), or, as the baseline, to a word drawn from the other sentences. Every head of the last layer gives a "
    f"graph of its words by R of A Aᵀ at the published cut {PUBLISHED[0]} (n = 768, α = .01), sets up to {MAX_ORDER}. "
    "“By chance” is F1 with the edges of one graph thrown at random. Numbers are means over sentences of means over "
    f"pairs and heads, ± standard error over sentences. Beside them stand {SYSTEMS} random linear systems of "
    f"{VARIABLES} variables, hidden causes among them, whose true graph is known: the observed variable x that has "
    "the most edges is given a copy x' = x + ε·sd(x)·noise, a leaf of the true graph, and the search is made of "
    "exact correlations with sets of any size, beside that of the same system without the copy. No sample is drawn, "
    "so a cut stands for what a test can see: 1e-9 for all, the others for what is strong. F1 and the share of the "
    "arrows found that are right are against the true graph; “x's edges kept” and “x' has them” are shares of x's "
    "true edges.",
    measure,
    tables,
    draw,
)

if __name__ == "__main__":
    run(STUDY)

"""Do the graphs of deeper layers say more?

Graphs of attention are drawn of the deepest layer. Here every layer's are drawn, beside their nulls and one another;
and, as no text comes with a true graph, each is asked for something that can be measured: which token's removal
changes which other token's last hidden state.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from minilm import Encoder, Sentence, attention, correlations, hidden, over_sentences
from ranks import GIVEN, Pairs, basis, correlated, ranked
from skeletons import MAX_ORDER, PUBLISHED, above, agreements, distances
from study import Study, Table, run, spread
from torch import Tensor

from causalattn import capture
from causalattn.dense import correlation
from causalattn.discovery import discover, null_attention
from causalattn.plot import Drawing
from causalattn.plot.drawing import BLUE, GREY, INK, ORANGE, heatmap, sheet

CUT = PUBLISHED[0]
NULLS = {"random logits": "random_logits", "permuted": "permute"}
DRAWS = 2
SPLIT_SEED = 0
EDGE = f"edge {CUT}"
OF_WORDS = ("edge, words' keys", "R, words' keys")
SCORES = (EDGE, "strength", "R", *OF_WORDS, "A + Aᵀ", "A")
LAYERS = 6


def measure(quick: bool, progress: Callable[[int, int], None]) -> list[dict]:
    """Rows of three kinds: how many edges, how far layers agree, and how well a score foretells removals."""
    return over_sentences(quick, progress, _of_text)


def _of_text(
    name: str, encoder: Encoder, text: Sentence, heads: range, generator: torch.Generator | None = None
) -> Iterable[dict]:
    """All layers' heads, and with a generator maps of no structure in place of theirs."""
    effect = removal(encoder, text)
    far = distances(len(effect))
    pairs, directed = Pairs(effect + effect.T), Pairs(effect, directed=True)
    place = np.arange(len(effect))
    near = {"layer": -1, "head": "all", "score": "nearness"} | pairs.foretold(-np.abs(place - place[:, None]))
    yield {"kind": "effect", "source": name} | near
    skeletons: dict[str, list] = {}
    for layer, call in capture(encoder.model, text.inputs).items():
        A, R = attention(call, text.words), correlations(call, text.words)
        found = {name: [read(A[h], R[h], text.words) for h in heads]}
        found[name] = [scores | among_words(scores["A"]) for scores in found[name]]
        special = 1 - float(A[:, :, text.words].sum(-1).mean())
        yield {"kind": "mass", "source": name, "layer": layer, "special": special}
        if generator is not None:
            for title, null in NULLS.items():
                drawn = [[null_attention(A[h], null=null, generator=generator) for _ in range(DRAWS)] for h in heads]
                nulls = [[read(each, correlation(each), text.words) for each in of_head] for of_head in drawn]
                yield from (
                    {"kind": "edges", "layer": layer, "source": title} | row for row in excess(found[name], nulls)
                )
                found[title] = [of_head[0] for of_head in nulls]
        for source, scored in found.items():
            at = {"kind": "effect", "source": source, "layer": layer}
            yield from (at | row for row in _foretold(scored, pairs, directed))
            skeletons.setdefault(source, []).append([above(each[EDGE]) > 0 for each in scored])
    for source, of_layers in skeletons.items():
        sizes = np.array(of_layers).sum(-1).mean(-1)
        yield from ({"kind": "size", "source": source, "layer": n, "edges": size} for n, size in enumerate(sizes))
        yield from ({"kind": "agreement", "source": source} | row for row in agreements(np.array(of_layers), far))


def removal(encoder: Encoder, text: Sentence) -> np.ndarray:
    """1 − cos(h_i, h_i where word j is [MASK]) of the last hidden states, [i, j], 0 where i = j."""
    ids = text.inputs["input_ids"].repeat(len(text.words), 1)
    ids[range(len(ids)), text.words] = encoder.tokenizer.mask_token_id
    mask = text.inputs["attention_mask"].expand(len(ids), -1)
    before = hidden(encoder, text.inputs)[0, text.words]
    after = hidden(encoder, {"input_ids": ids, "attention_mask": mask})[:, text.words]
    effect = 1 - torch.cosine_similarity(before, after, dim=-1).T
    return effect.fill_diagonal_(0).numpy()


def read(A: Tensor, R: Tensor, words: Tensor) -> dict[str, np.ndarray]:
    """What a head says of each pair of words, [W, W]: its edges at each cut, their strength, R, and A itself."""
    found = {cut: discover(R, cut=cut, max_order=MAX_ORDER) for cut in PUBLISHED}
    edges = {f"edge {cut}": graph.pag.skeleton.astype(float) for cut, graph in found.items()}
    inner = A[:, words]
    rest = {"strength": found[CUT].strength, "R": R, "A + Aᵀ": inner + inner.T, "A": inner}
    return edges | {name: np.asarray(matrix) for name, matrix in rest.items()}


def among_words(A: np.ndarray) -> dict[str, np.ndarray]:
    """The edges and R of rows from which the special tokens' keys are left out."""
    R = correlation(torch.from_numpy(A))
    edges = discover(R, cut=CUT, max_order=MAX_ORDER).pag.skeleton.astype(float)
    return dict(zip(OF_WORDS, (edges, R.numpy()), strict=True))


def excess(mine: list[dict], nulls: list[list[dict]]) -> Iterable[dict]:
    """A layer's edges a head, its null's, and the z of their sum over the heads."""
    for cut in PUBLISHED:
        key = f"edge {cut}"
        edges = np.array([above(head[key]).sum() for head in mine])
        null = np.array([[above(draw[key]).sum() for draw in head] for head in nulls])
        deviation = np.sqrt(null.var(1, ddof=1).sum())
        z = float((edges.sum() - null.mean(1).sum()) / deviation) if deviation else float("nan")
        yield {"cut": cut, "edges": edges.mean(), "null": null.mean(), "z": z}


def _foretold(scored: list[dict], pairs: Pairs, directed: Pairs) -> Iterable[dict]:
    """How well every score, of each head and of their mean, ranks the effects."""
    mean = {name: np.mean([head[name] for head in scored], 0) for name in scored[0]}
    for head, scores in [*enumerate(scored), ("all", mean)]:
        for name, matrix in scores.items():
            # A alone has a direction: row i attends j, and removing j changes i
            yield {"head": head, "score": name} | (directed if name == "A" else pairs).foretold(matrix)


def choose(rows: list[dict], source: str, names: Iterable[str], validation: set[int]) -> tuple[int, int, str]:
    """The layer, head and score that rank the effects best in the mean over the validation sentences."""
    sums: dict[tuple, float] = {}
    for row in _where(rows, kind="effect", source=source):
        if row["sentence"] in validation and row["score"] in names and row["head"] != "all":
            key = row["layer"], row["head"], row["score"]
            sums[key] = sums.get(key, 0.0) + row["rank"]
    return max(sorted(sums), key=sums.get)


def split(numbers: Iterable[int]) -> tuple[set[int], set[int]]:
    """Two halves of the sentences, drawn: to choose by, and to report."""
    order = np.random.default_rng(SPLIT_SEED).permutation(sorted(numbers)).tolist()
    return {*order[: len(order) // 2]}, {*order[len(order) // 2 :]}


def tables(rows: list[dict]) -> list[Table]:
    """Edges, agreement, what is foretold by depth, and what a choice on half the sentences is worth."""
    return [
        *(Table(f"Edges a head at cut {cut} (z: of the sum over heads)", _edges(rows, cut)) for cut in PUBLISHED),
        Table(f"F1 of the skeletons of two heads at cut {CUT}", _agreement(rows)),
        *(
            Table(
                f"Rank correlation of the heads' mean with what removing a token changes{given}", _by_layer(rows, given)
            )
            for given in GIVEN
        ),
        Table("Chosen on half of the sentences, read on the other half", _chosen(rows)),
    ]


def _edges(rows: list[dict], cut: float) -> list[dict]:
    found = []
    for layer in range(LAYERS):
        line = {"layer": layer}
        for null in NULLS:
            kept = _where(rows, kind="edges", layer=layer, source=null, cut=cut)
            line |= {"edges": _spread(kept, "edges"), null: _spread(kept, "null"), f"z, {null}": _spread(kept, "z")}
        if cut == CUT:
            line["on [CLS], [SEP]"] = _spread(_where(rows, kind="mass", source="model", layer=layer), "special")
            line["edges untrained"] = _spread(_where(rows, kind="size", source="untrained", layer=layer), "edges")
        found.append(line)
    return found


def _agreement(rows: list[dict]) -> list[dict]:
    cells = {"F1": "f1", "as many edges anywhere": "chance", "as many at each distance": "chance by class"}
    found = []
    for source in ("model", *NULLS, "untrained"):
        for title, least, most in (("one layer", 0, 0), ("neighbouring layers", 1, 1), ("layers further apart", 2, 9)):
            kept = [
                row
                for row in _where(rows, kind="agreement", source=source)
                if least <= row["layers"][1] - row["layers"][0] <= most
            ]
            cells = (
                ("F1", "f1"),
                ("as many edges anywhere", "chance"),
                ("as many at each distance", "chance by class"),
            )
            found.append({"maps": source, "heads of": title} | {head: _spread(kept, key) for head, key in cells})
    return found


def _by_layer(rows: list[dict], given: str) -> list[dict]:
    """A layer a line, then how the scores of a sentence go with depth."""
    kept, key = _where(rows, kind="effect", head="all"), f"rank{given}"
    columns = {name: ("model", name) for name in SCORES}
    columns |= {f"{EDGE}, {source}": (source, EDGE) for source in (*NULLS, "untrained")}
    columns["nearness"] = ("model", "nearness")
    found = []
    for layer in range(LAYERS):
        line = {"layer": layer}
        for title, (source, score) in columns.items():
            line[title] = _spread(_where(kept, source=source, score=score, layer=layer), key)
        found.append(line)
    depth = {"layer": "with depth"}
    for title, (source, score) in columns.items():
        depth[title] = spread(_with_depth(_where(kept, source=source, score=score), key))
    if not given:
        whole = _where(kept, source="model", score="nearness")
        found = [line | {"nearness": _spread(whole, key)} for line in found]
    return [{name: cell for name, cell in line.items() if not given or name != "nearness"} for line in (*found, depth)]


def _with_depth(rows: list[dict], key: str) -> list[float]:
    """Of each sentence the rank correlation of the layer's number with its score."""
    constant = basis(np.ones((LAYERS, 1)))
    of_sentence: dict[int, dict[int, float]] = {}
    for row in rows:
        of_sentence.setdefault(row["sentence"], {})[row["layer"]] = row[key]
    return [
        correlated(np.arange(LAYERS, dtype=float), ranked(np.array([of[n] for n in range(LAYERS)])), constant)
        for of in of_sentence.values()
        if len(of) == LAYERS
    ]


def _chosen(rows: list[dict]) -> list[dict]:
    halves = split({row["sentence"] for row in rows})
    edges = [f"edge {cut}" for cut in PUBLISHED]
    offers = {
        "graph": ("model", edges), "its strength": ("model", ["strength"]), "R": ("model", ["R"]),
        "graph, words' keys": ("model", OF_WORDS[:1]), "R, words' keys": ("model", OF_WORDS[1:]),
        "A + Aᵀ": ("model", ["A + Aᵀ"]), "graph of random logits": ("random logits", edges),
        "graph of permuted rows": ("permuted", edges), "graph before training, its effects": ("untrained", edges),
        "nearness": ("model", None),
    }  # fmt: skip
    found = []
    for title, (source, names) in offers.items():
        layer, head, score = choose(rows, source, names, halves[0]) if names else (-1, "all", title)
        kept = _where(rows, kind="effect", source=source, layer=layer, head=head, score=score)
        first, last = ([row for row in kept if row["sentence"] in half] for half in halves)
        line = {"score": title, "chosen": f"layer {layer}, head {head}, {score}" if names else "–"}
        line["where chosen"] = _spread(first, "rank")
        found.append(line | {f"read{given}": _spread(last, f"rank{given}") for given in GIVEN})
    return found


def _where(rows: list[dict], **of) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in of.items())]


def _means(rows: list[dict], key: str) -> list[float]:
    """Over heads and layers, one a sentence."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(row["sentence"], []).append(row[key])
    return [float(np.mean(values)) for values in groups.values()]


def _spread(rows: list[dict], key: str) -> str:
    return spread(_means(rows, key))


def draw(rows: list[dict]) -> Drawing:
    """What scores foretell by layer, as they are and of pairs alone, and how far layers agree beyond chance."""
    figure = sheet(12.4, 4.4, "Graphs of every layer: what they foretell of removals, and how far they agree")
    *both, right = figure.subplots(1, 3)
    lines = {
        "A + Aᵀ": ("model", "A + Aᵀ", INK, "s-"),
        "R": ("model", "R", ORANGE, "^-"),
        "edges": ("model", EDGE, BLUE, "o-"),
        "edges, random logits": ("random logits", EDGE, GREY, "o--"),
        "edges, untrained": ("untrained", EDGE, GREY, "o:"),
    }
    for axes, given, title in zip(both, GIVEN[::2], ("rank correlation", "given distance and tokens"), strict=True):
        key = f"rank{given}"
        for label, (source, score, colour, mark) in lines.items():
            of = {"kind": "effect", "source": source, "score": score, "head": "all"}
            values = [_means(_where(rows, layer=layer, **of), key) for layer in range(LAYERS)]
            error = [np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0 for each in values]
            axes.errorbar(range(LAYERS), [np.mean(each) for each in values], error, fmt=mark, color=colour, label=label)
        if not given:
            near = np.mean(_means(_where(rows, kind="effect", source="model", score="nearness"), key))
            axes.axhline(near, color="#CC79A7", linewidth=1.2, label="nearness alone")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="layer")
        axes.set_title(title, fontsize=10, color=INK)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    both[1].sharey(both[0])
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    beyond = np.zeros((LAYERS, LAYERS))
    for a, b in zip(*np.triu_indices(LAYERS), strict=True):
        kept = _where(rows, kind="agreement", source="model", layers=(int(a), int(b)))
        beyond[a, b] = beyond[b, a] = np.mean(_means(kept, "f1")) - np.mean(_means(kept, "chance by class"))
    heatmap(right, beyond, "F1 of two heads' skeletons above chance", "Blues", min(0, beyond.min()), beyond.max())
    right.set(xlabel="layer", ylabel="layer")
    caption = "Means over sentences ± standard error; chance keeps the number of edges at each distance."
    return Drawing("layers", figure, caption)


STUDY = Study(
    "layers",
    "Do the graphs of deeper layers say more?",
    "The 20 sentences of 10 to 29 tokens of the package's demo passage are read by all-MiniLM-L6-v2. Every head of "
    f"its 6 layers gives a graph of the words by R of A Aᵀ, sets up to {MAX_ORDER}, at cuts {PUBLISHED[0]} (n = 768, "
    f"α = .01) and {PUBLISHED[1]} (n = 128, α = 1e-5). {DRAWS} null maps of either kind a head have its rows' "
    "entropies and no structure (random logits, permuted rows); a model of the same configuration before training is "
    "read too. Two skeletons' F1 stands beside the mean F1 of as many edges thrown anywhere, and of as many at each "
    "distance. No text has a known graph, so edges are asked for what can be measured: each word in turn is replaced "
    "by [MASK], and 1 − cosine of every other word's last hidden state is the effect; of a pair both ways are added, "
    "but for A, which has a direction. Numbers are Spearman's rank correlations over the pairs of a sentence, as "
    "they are, given the distance in tokens, and given besides a number of each token, by which some are changed, or "
    "change others, more than their like: what then is left is about pairs. To see what special tokens do, edges and "
    "R are also formed of rows without their keys (words' keys), without null maps of their own. A constant counts "
    "as 0. Of a layer, the mean of its heads' scores is taken; “with depth” is the rank correlation of a sentence's "
    "scores with the layers' numbers. Last, head, layer and cut are chosen by rank correlation on a drawn half of "
    "the sentences and read on the other, for null maps too. Means over sentences ± standard error. What a removal "
    "changes is the model's output, no cause in the world.",
    measure,
    tables,
    draw,
)

if __name__ == "__main__":
    run(STUDY)

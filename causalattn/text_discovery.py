"""The graphs of a text's attention, one a head of a layer, beside those of attention without structure."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .analysis import capture
from .attention import attention_rows
from .covariance import attention_correlation
from .discovery import Discovery, discover, null_discoveries, token_names


class HeadGraph(NamedTuple):
    """A head's graph, and how many edges each null map of its entropies gave."""

    head: int
    found: Discovery
    null_edges: list[int]

    @property
    def edges(self) -> int:
        return int(self.found.pag.skeleton.sum()) // 2

    @property
    def z(self) -> float:
        """Edges less the null's mean, in its standard deviations; NaN where all null maps have as many."""
        null = torch.tensor(self.null_edges, dtype=torch.float64)
        spread = float(null.std()) if len(null) > 1 else 0.0
        return (self.edges - float(null.mean())) / spread if spread > 0 else float("nan")


class TextDiscovery(NamedTuple):
    """tokens that are in the graphs, their layer, whether they were ordered in time, and the heads' graphs."""

    tokens: list[str]
    layer: int
    ordered: bool
    null: str
    heads: list[HeadGraph]

    def best(self) -> HeadGraph:
        """The head whose number of edges is furthest from its null's."""
        return max(self.heads, key=lambda head: abs(head.z) if head.z == head.z else -1.0)

    def to_json(self) -> str:
        heads = []
        for head in self.heads:
            pag = head.found.pag
            edges = [
                {"edge": f"{pag.names[a]} {symbol} {pag.names[b]}", "tokens": [a, b], "symbol": symbol,
                 "strength": float(head.found.strength[a, b])}
                for a, b, symbol in pag.edges()
            ]  # fmt: skip
            separated = [{"tokens": [*pair], "given": [*given]} for pair, given in head.found.sepsets.items()]
            levels = [level._asdict() for level in head.found.levels]
            heads.append(
                {"head": head.head, "edges": edges, "separated": separated, "cuts": [*head.found.cuts],
                 "levels": levels, "complete": head.found.complete, "null_edges": head.null_edges}
            )  # fmt: skip
        whole = {"tokens": self.tokens, "layer": self.layer, "ordered": self.ordered, "null": self.null, "heads": heads}
        return json.dumps(whole, ensure_ascii=False)


def discover_text(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: Sequence[str],
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    special: Sequence[str] = (),
    cut: float | None = None,
    n: float | None = None,
    alpha: float | None = None,
    max_order: int | None = None,
    null: str = "random_logits",
    draws: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> TextDiscovery:
    """Search the graph of each head of one layer, the last by default, by the correlations of A Aᵀ.

    The tokens in special are in no graph, but their keys count. Where no token may attend a later one the search is
    OrdICD in the order of the text.

    Args, Raises:
        As `discover` and `null_discoveries`; inputs is one sequence without padding, and tokens are its strings. A
        ValueError too where fewer than two tokens are left, or the model has no such layer or head.
    """
    calls = capture(model, inputs, None if layer is None else [layer])
    layer = max(calls)
    call, options = calls[layer], calls[layer].options()
    chosen = [t for t, token in enumerate(tokens) if token not in special]
    if len(chosen) < 2:
        raise ValueError(f"a graph needs at least 2 tokens, got {len(chosen)} beside special ones")
    ordered = bool((call.intervals.stop[0] <= torch.arange(1, call.q.shape[2] + 1)).all())
    search = {"cut": cut, "n": n, "alpha": alpha, "max_order": max_order, "order": "time" if ordered else None}
    names = token_names([tokens[t] for t in chosen])
    rows = torch.tensor(chosen)
    R = attention_correlation(call.q, call.k, tokens=rows, **options)[0]
    A = attention_rows(call.q, call.k, rows, **options)[0]
    found = []
    wanted = range(len(R)) if heads is None else heads
    for done, head in enumerate(wanted):
        if not 0 <= head < len(R):
            raise ValueError(f"heads must lie in 0…{len(R) - 1}, got {head}")
        graph = discover(R[head], names=names, **search)
        generator = torch.Generator().manual_seed(head)
        nulls = null_discoveries(A[head], null=null, draws=draws, generator=generator, **search)
        found.append(HeadGraph(head, graph, [int(x.pag.skeleton.sum()) // 2 for x in nulls]))
        if progress is not None:
            progress(done + 1, len(wanted))
    return TextDiscovery([*names], layer, ordered, null, found)


def draw(result: TextDiscovery):
    """The graph of the head that is furthest from its null, an edge as wide as it is strong."""
    from .plot.pag import draw_pag

    best = result.best()
    mean = sum(best.null_edges) / len(best.null_edges)
    title = f"layer {result.layer}, head {best.head}: {best.edges} edges, {mean:.1f} in its null"
    strengths = torch.from_numpy(best.found.strength).nan_to_num(0).clamp(max=10).numpy()
    return draw_pag(best.found.pag, strengths=strengths, title=title)


def table(result: TextDiscovery) -> list[str]:
    """A head a line beside its null, then the edges of the head that is furthest from it."""
    pairs = len(result.tokens) * (len(result.tokens) - 1) // 2
    cuts = ", ".join(f"{cut:.4f}" for cut in result.best().found.cuts)
    lines = [
        f"layer {result.layer}, {len(result.tokens)} tokens, {pairs} pairs, independent below |r| = {cuts}"
        + (", in the order of the text" if result.ordered else ""),
        f"head  edges  null ({result.null.replace('_', ' ')}): mean  least  most       z",
    ]
    for head in result.heads:
        mean = sum(head.null_edges) / len(head.null_edges)
        few, many = min(head.null_edges), max(head.null_edges)
        lines.append(f"{head.head:>4}  {head.edges:>5}  {mean:>30.1f}  {few:>5}  {many:>4}  {head.z:>+6.1f}")
    best = result.best()
    lines.append(f"head {best.head}, strength is the least |r| / cut of all tests of the pair:")
    lines += [
        f"{best.found.strength[a, b]:>8.2f}  {best.found.pag.names[a]} {symbol} {best.found.pag.names[b]}"
        for a, b, symbol in best.found.pag.edges()
    ]
    lines.append("A graph comes out of any attention: what is not beyond its null says nothing of the model.")
    return lines

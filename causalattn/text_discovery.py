"""The graphs of a text's attention, one a head of a layer, beside those of attention without structure."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import capture, pick_heads
from .attention import attention_rows
from .covariance import attention_correlation
from .discovery import CutSweep, Discovery, discover, null_discoveries, sweep_cuts, token_names
from .discovery.ci import cuts
from .discovery.nulls import NULLS
from .integrations.transformers.attention import AttentionCall

TEXT_NULLS = (*NULLS, "untrained")
# separated pairs in a table
SHOWN = 20


class HeadGraph(NamedTuple):
    """A head's graph, its correlations R [T, T], and how many edges each null of it gave; none before they are made."""

    head: int
    found: Discovery
    R: Tensor
    null_edges: list[int]

    @property
    def edges(self) -> int:
        return edge_count(self.found)

    @property
    def beyond(self) -> float:
        """Edges less the null's mean."""
        return self.edges - sum(self.null_edges) / len(self.null_edges)

    @property
    def z(self) -> float:
        """`beyond` in the null's standard deviations; NaN where all null graphs have as many edges."""
        spread = float(torch.tensor(self.null_edges, dtype=torch.float64).std()) if len(self.null_edges) > 1 else 0.0
        return self.beyond / spread if spread > 0 else math.nan

    def to_dict(self) -> dict:
        """What JSON holds of it."""
        pag, strength = self.found.pag, self.found.strength
        edges = [
            {"edge": f"{pag.names[a]} {symbol} {pag.names[b]}", "tokens": [a, b], "symbol": symbol,
             "r": float(self.R[a, b]), "strength": float(strength[a, b]) if np.isfinite(strength[a, b]) else None}
            for a, b, symbol in pag.edges()
        ]  # fmt: skip
        separated = [{"tokens": [*pair], "given": [*given]} for pair, given in self.found.sepsets.items()]
        levels = [level._asdict() for level in self.found.levels]
        graph = {"head": self.head, "edges": edges, "separated": separated, "cuts": [*self.found.cuts]}
        return graph | {"levels": levels, "complete": self.found.complete, "null_edges": self.null_edges}


class TextDiscovery(NamedTuple):
    """tokens that are in the graphs, their layer, whether they were ordered in time, and the heads' graphs.

    sweep: the best head's graphs at many cuts, where they were asked for.
    """

    tokens: list[str]
    layer: int
    ordered: bool
    null: str
    heads: list[HeadGraph]
    sweep: CutSweep | None = None

    def best(self) -> HeadGraph:
        """The head whose number of edges is furthest from its null's by |z|, or as it is where no head has a z."""
        known = [head for head in self.heads if not math.isnan(head.z)]
        return max(known, key=lambda head: abs(head.z)) if known else max(self.heads, key=lambda head: abs(head.beyond))

    def to_json(self) -> str:
        whole = self._asdict() | {"heads": [head.to_dict() for head in self.heads]}
        if self.sweep is not None:
            best = self.best().found.pag
            shares = {f"{a} {b}": float(self.sweep.edges[a, b]) for a, b, _ in best.edges()}
            whole["sweep"] = {"head": self.best().head, "cuts": [*self.sweep.cuts], "shares": shares}
        return json.dumps(whole, ensure_ascii=False, allow_nan=False)


class TextCorrelations(NamedTuple):
    """Names of the chosen tokens, the layer and whether no token attends a later one, its call, and R, [H, T, T]."""

    names: tuple[str, ...]
    layer: int
    ordered: bool
    call: AttentionCall
    R: Tensor


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
    null: Literal["random_logits", "permute", "untrained"] = "random_logits",
    draws: int = 20,
    sweep: int = 0,
    on_level: Callable[[TextDiscovery], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextDiscovery:
    """Search the graph of each head of one layer, the last by default, by the correlations of A Aᵀ.

    The tokens in special are in no graph, but their keys count. Where no token may attend a later one the search is
    OrdICD in the order of the text.

    Args:
        model, inputs: as in `analyze`; one sequence without padding.
        tokens: its strings, one a position.
        layer, heads: their numbers in the model; the last layer and all heads by default.
        special: strings whose tokens are left out.
        cut, n, alpha, max_order: as in `discover`.
        null: as in `null_attention`, or "untrained": the same heads of models of the same configuration whose weights
            were drawn anew.
        draws: of the null.
        sweep: search the best head again at this many cuts from half its own to twice it, or half way to 1 where that
            is less; 0: do not.
        on_level: called with all graphs so far after every level of a head and after every null of one.
        progress: called with how many searches are done and all.

    Returns:
        TextDiscovery.

    Raises:
        NotImplementedError: an encoder-decoder, or as `analyze`.
        ValueError: several sequences, padding, tokens that are not one a position, fewer than two that are not special,
            a layer or head that the model lacks, an unknown null, draws < 1, sweep < 0, or what `discover` refuses.
        TypeError: as `analyze`, or special is a string.

    Source: Rohekar et al. 2023 (arXiv:2310.20307), whose cut is that of n = the hidden size at α = 0.01.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> result = discover_text(BertModel(small).eval(), inputs, ["storm", "ship", "sank"], cut=0.1, draws=2)
        >>> [len(head.null_edges) for head in result.heads]
        [2, 2]
    """
    if null not in TEXT_NULLS:
        raise ValueError(f"null must be one of {', '.join(TEXT_NULLS)}, got {null!r}")
    for name, value, least in (("draws", draws, 1), ("sweep", sweep, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value}")
    if isinstance(special, str):
        raise TypeError(f"special must be a collection of tokens, got the string {special!r}")
    # what is wrong with these is no head's
    cuts(cut, n, alpha)
    chosen = [t for t, token in enumerate(tokens) if token not in special]
    text = text_correlations(model, inputs, tokens, chosen, layer, heads)
    numbers = [*range(len(text.R))] if heads is None else [*heads]
    search = {"cut": cut, "n": n, "alpha": alpha, "max_order": max_order, "order": "time" if text.ordered else None}
    whole = TextDiscovery([*text.names], text.layer, text.ordered, null, [])
    steps = _Steps(len(numbers) * (1 + draws) + sweep, progress)
    for graph in _graphs(whole, text, numbers, search, on_level):
        whole.heads.append(graph)
        steps()
    for at, edges in _nulls(model, inputs, tokens, chosen, text, numbers, null, draws, search):
        whole.heads[at].null_edges.append(edges)
        steps()
        if on_level is not None:
            on_level(whole)
    return whole if sweep == 0 else whole._replace(sweep=_sweep(whole.best(), sweep, search, steps))


def text_correlations(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: Sequence[str],
    chosen: Sequence[int],
    layer: int | None,
    heads: Sequence[int] | None = None,
) -> TextCorrelations:
    """Run a text and correlate the attention rows of the chosen tokens, a head of one layer at a time."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(f"graphs of encoder-decoders are not there: {type(model).__name__} is one")
    if len(chosen) < 2:
        raise ValueError(f"a graph needs at least 2 tokens, got {len(chosen)} beside special ones")
    calls = capture(model, inputs, None if layer is None else [layer])
    layer = max(calls)
    call = calls[layer] if heads is None else pick_heads(calls[layer], [*heads])
    B, _, T, _ = call.q.shape
    if B != 1:
        raise ValueError(f"inputs must be one sequence, got {B}")
    if len(tokens) != T:
        raise ValueError(f"tokens must be {T}, one a position, got {len(tokens)}")
    empty = int((call.intervals.start >= call.intervals.stop).sum())
    if empty:
        raise ValueError(f"inputs must have no padding, got {empty} tokens that attend nothing")
    R = attention_correlation(call.q, call.k, tokens=torch.tensor([*chosen]), **call.options())[0].cpu()
    return TextCorrelations(token_names([tokens[t] for t in chosen]), layer, in_order(call), call, R)


def in_order(call: AttentionCall) -> bool:
    """Whether no token of a text may attend a later one."""
    stop = call.intervals.stop[0]
    return bool((stop <= torch.arange(1, len(stop) + 1, device=stop.device)).all())


def edge_count(found: Discovery) -> int:
    return int(found.pag.skeleton.sum()) // 2


class _Steps:
    """Searches done, of all that there will be."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None):
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, *_) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _graphs(
    whole: TextDiscovery, text: TextCorrelations, heads: list[int], search: dict,
    on_level: Callable[[TextDiscovery], None] | None,
) -> Iterator[HeadGraph]:  # fmt: skip
    """Each head's graph; on_level sees whole, with the head's graph so far behind the others."""
    for head, R in zip(heads, text.R, strict=True):

        def tell(found: Discovery, head: int = head, R: Tensor = R) -> None:
            on_level(whole._replace(heads=[*whole.heads, HeadGraph(head, found, R, [])]))

        try:
            found = discover(R, names=text.names, on_level=on_level and tell, **search)
        except ValueError as error:
            raise ValueError(f"head {head}: {error}") from error
        yield HeadGraph(head, found, R, [])


def _nulls(
    model: nn.Module, inputs: Mapping[str, Tensor], tokens: Sequence[str], chosen: list[int], text: TextCorrelations,
    heads: list[int], null: str, draws: int, search: dict,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """The place of a head and the edges of a null graph of it."""
    if null == "untrained":
        for seed in range(draws):
            fresh = text_correlations(untrained(model, seed), inputs, tokens, chosen, text.layer, heads)
            yield from ((at, edge_count(discover(R, **search))) for at, R in enumerate(fresh.R))
        return
    call, rows = text.call, torch.tensor(chosen)
    A = attention_rows(call.q, call.k, rows, **call.options())[0].cpu()
    start, stop = (x[0, rows, None].cpu() for x in call.intervals[:2])
    keys = torch.arange(A.shape[-1])
    # what a bias forbids is known by its weight alone
    allowed = (start <= keys) & (keys < stop) if call.bias is None else None
    for at, head in enumerate(heads):
        options = {"null": null, "draws": 1, "allowed": allowed, "generator": torch.Generator().manual_seed(head)}
        for _ in range(draws):
            yield at, edge_count(null_discoveries(A[at], **options, **search)[0])


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same class and configuration, its weights drawn anew."""
    with torch.random.fork_rng(devices=[]):
        # not `torch.manual_seed`, which would seed a GPU's generators too
        torch.default_generator.manual_seed(seed)
        fresh = type(model)(model.config)
    parameter = next(model.parameters())
    return fresh.to(parameter.device, parameter.dtype).eval()


def _sweep(best: HeadGraph, count: int, search: dict, steps: _Steps) -> CutSweep:
    """The best head at cuts from half its own to twice it, in equal ratios; one: at its own."""
    own = best.found.cuts[0]
    swept = np.geomspace(own / 2, min(2 * own, (1 + own) / 2), count) if count > 1 else [own]
    rest = {name: search[name] for name in ("max_order", "order")}
    return sweep_cuts(best.R, map(float, swept), progress=steps, **rest)


def table(result: TextDiscovery) -> list[str]:
    """A head a line beside its null, then the edges of the head furthest from it and what separates other pairs."""
    pairs = len(result.tokens) * (len(result.tokens) - 1) // 2
    used = ", ".join(f"{cut:.4f}" for cut in result.best().found.cuts)
    lines = [
        f"layer {result.layer}, {len(result.tokens)} tokens, {pairs} pairs, independent below |r| = {used}"
        + (", in the order of the text" if result.ordered else ""),
        f"head  edges  null ({result.null.replace('_', ' ')}): mean  least  most       z",
    ]
    for head in result.heads:
        null, z = head.null_edges, "–" if math.isnan(head.z) else f"{head.z:+.1f}"
        mean = head.edges - head.beyond
        lines.append(f"{head.head:>4}  {head.edges:>5}  {mean:>30.1f}  {min(null):>5}  {max(null):>4}  {z:>6}")
    lines += _edge_lines(result) + _separated_lines(result.best())
    lines.append("A graph comes out of any attention: what is not beyond its null says nothing of the model.")
    return lines


def _edge_lines(result: TextDiscovery) -> list[str]:
    best, sweep = result.best(), result.sweep
    stands = "" if sweep is None else f", stands at how many of {len(sweep.cuts)} cuts"
    lines = [f"head {best.head}: r, strength (the least |r| / cut of all tests of the pair){stands}, edge"]
    for a, b, symbol in best.found.pag.edges():
        share = "" if sweep is None else f"  {round(float(sweep.edges[a, b]) * len(sweep.cuts)):>4}"
        edge = f"{best.found.pag.names[a]} {symbol} {best.found.pag.names[b]}"
        lines.append(f"{float(best.R[a, b]):>8.3f}  {best.found.strength[a, b]:>6.2f}{share}  {edge}")
    return lines


def _separated_lines(best: HeadGraph) -> list[str]:
    """The first pairs without an edge, and the tokens given which they are independent."""
    names = best.found.pag.names
    lines = [f"separated pairs of head {best.head}, and given what:"] if best.found.sepsets else []
    for (a, b), given in list(best.found.sepsets.items())[:SHOWN]:
        lines.append(f"{'':>8}  {names[a]}, {names[b]} | {', '.join(names[t] for t in given) or 'nothing'}")
    rest = len(best.found.sepsets) - SHOWN
    return [*lines, f"{'':>8}  and {rest} more, in --json"] if rest > 0 else lines

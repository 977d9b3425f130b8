"""What the attention heads of a transformers model do on one input, every score beside its null."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import attention_rows
from .integrations.transformers.attention import AttentionCall, recorder
from .integrations.transformers.families import self_attention, using
from .masks import Intervals
from .nulls import Null, null_from_stats
from .short_layers import mapped, parted, stacked
from .statistics import DEFAULT, AttentionStats, attention_stats, score_asymmetry
from .statistics.short import fits_one_tile, is_short, short_stats

WANT = (*DEFAULT, "received", "received_mean", "asymmetry")
SCORED = ("mass", "sum_sq", "below", "dag_score")

Operator = Callable[..., AttentionStats]
Visit = Callable[[int, AttentionCall, int], AttentionStats | None]


class HeadScores(NamedTuple):
    """The scores of one layer's heads, each [B, H]; None where not asked for, and where a mask with holes has no null.

    causal: no query attends a later key, so dag_score is 1 − mean(diag A) whatever the model learnt.
    sink_removed: the DAG score with each row's first real key masked.
    unmasked: the DAG score of the same q and k with the causal mask taken away; None for a bidirectional layer.
    """

    causal: bool
    dag_score: Null | None
    sink_removed: Null | None
    unmasked: Null | None
    unmasked_asymmetry: Tensor | None
    score_asymmetry: Tensor | None


class Report(NamedTuple):
    """Statistics of the chosen layers and heads of one forward pass, on the CPU.

    layers: one AttentionStats a layer, [B, heads, …]; layer_ids and head_ids: their numbers in the model.
    tokens: one list of strings a sequence. intervals: who may attend whom, a layer.
    """

    layers: list[AttentionStats]
    layer_ids: list[int]
    head_ids: list[list[int]]
    tokens: list[list[str]]
    scores: list[HeadScores]
    intervals: list[Intervals]

    def rows(self, top: int = 3) -> list[dict]:
        """One dict a layer, sequence and head; top is how many of the most received tokens each names."""
        return [row for at in range(len(self.layers)) for row in _layer_rows(self, at, top)]

    def to_json(self, top: int = 3) -> str:
        """The tokens and rows as JSON; a number that is not finite becomes null."""
        return json.dumps({"tokens": self.tokens, "rows": self.rows(top)}, ensure_ascii=False, allow_nan=False)


def analyze(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    want: str | Iterable[str] = WANT,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    null: bool = True,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run one forward pass and report what each attention head did, in O(T) memory a layer.

    The model's outputs are not changed; its attention implementation and training flags are put back, also on an error.

    Args:
        model: a transformers model; its self-attention layers are analyzed.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        want: names of AttentionStats fields to keep, or "all".
        layers: layer numbers; all by default.
        heads: head numbers, the same in every layer; all by default.
        null: also score each head against its permutation null, without the sink and, if causal, without the mask.
        tokens: the input's tokens as strings, one list or one a sequence; by default its input ids, else positions.
        progress: called as progress(done, total) after each layer.

    Returns:
        Report.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or it calls one attention module twice.
        TypeError: model is no transformers model, or inputs is no mapping.
        ValueError: an unknown want, layer or head; tokens that do not fit the input.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> report = analyze(BertModel(small), {"input_ids": torch.tensor([[5, 6, 7]])})
        >>> [row["head"] for row in report.rows()]
        [0, 1]
    """
    if isinstance(want, str):
        want = AttentionStats._fields if want == "all" else (want,)
    kept = set(want)
    texts = resolve_tokens(inputs, tokens)
    heads = None if heads is None else list(heads)
    found: dict[int, tuple] = {}
    waiting: dict[int, AttentionCall] = {}
    numbers: dict[int, list[int]] = {}

    def measure(call: AttentionCall, operator: Operator) -> tuple[AttentionStats, HeadScores, Intervals]:
        stats = operator(call.q, call.k, want=kept | {*SCORED, "columns"}, **call.options())
        scores = _score(call, stats, null, "asymmetry" in kept, operator)
        stats = stats._replace(**{name: None for name in stats._fields if name not in kept})
        return stats, scores, _per_sequence(call)

    def visit(layer: int, call: AttentionCall, total: int) -> None:
        numbers[layer] = list(range(call.q.shape[1])) if heads is None else heads
        call = pick_heads(call, numbers[layer])
        # of a batch no text's numbers may depend on how long the others are
        short = call.q.shape[0] == 1 and is_short(call.q, call.k)
        if short and fits_one_tile(call.q, call.k):
            waiting[layer] = call
        else:
            found[layer] = to_cpu(measure(call, short_stats if short else attention_stats))
        if progress is not None:
            progress(len(numbers), total)

    each_layer(model, inputs, layers, visit)
    for group, call in stacked(waiting):
        found |= zip(group, parted(measure(call, short_stats), len(group)), strict=True)
    ids = sorted(found)
    stats, scores, intervals = ([found[i][part] for i in ids] for part in range(3))
    if texts is None:
        sequences, T = intervals[0].start.shape
        texts = [[str(position) for position in range(T)]] * sequences
    return Report(stats, ids, [numbers[i] for i in ids], texts, scores, intervals)


def capture(
    model: nn.Module, inputs: Mapping[str, Tensor], layers: Iterable[int] | None = None
) -> dict[int, AttentionCall]:
    """Run one forward pass and return what the attention of the chosen layers was computed from, O(T·D) each.

    Args:
        model, inputs, layers: as in analyze.

    Returns:
        {layer number: AttentionCall}; operator(call.q, call.k, **call.options()) repeats the layer's scores.

    Raises:
        As analyze.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> calls = capture(BertModel(small), {"input_ids": torch.tensor([[5, 6, 7]])})
        >>> attention_stats(calls[0].q, calls[0].k, **calls[0].options()).entropy.shape
        torch.Size([1, 2, 3])
    """
    found: dict[int, AttentionCall] = {}

    def keep(layer: int, call: AttentionCall, total: int) -> None:
        found[layer] = call

    each_layer(model, inputs, layers, keep)
    return dict(sorted(found.items()))


def each_layer(model: nn.Module, inputs: Mapping, layers: Iterable[int] | None, visit: Visit) -> None:
    """Call visit(layer, call, how many layers there will be) in each chosen layer of one forward pass."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map names to tensors, as a tokenizer returns them, got {type(inputs).__name__}")
    numbers = self_attention(model)
    chosen = set(numbers) if layers is None else set(layers)
    if not chosen or not chosen <= set(numbers):
        raise ValueError(f"layers must be among {sorted(numbers)}, got {sorted(chosen - set(numbers))}")
    modules = {model.get_submodule(name): layer for layer, name in numbers.items() if layer in chosen}
    seen = set()

    def record(module: nn.Module, call: AttentionCall) -> AttentionStats | None:
        layer = modules.get(module)
        if layer is None:
            return None
        if layer in seen:
            family = model.config.model_type
            raise NotImplementedError(f"{family} attends in {numbers[layer]} more than once a forward pass")
        seen.add(layer)
        return visit(layer, call, len(modules))

    with using(model), torch.no_grad(), recording(record):
        model(**cheapest(model, inputs))


@contextmanager
def recording(record):
    token = recorder.set(record)
    try:
        yield
    finally:
        recorder.reset(token)


def cheapest(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict:
    """The inputs, without a cache and without logits for every token: neither changes what attention sees."""
    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False}
    if "labels" not in inputs:
        extra["logits_to_keep"] = 1
    return {**{name: value for name, value in extra.items() if name in takes}, **inputs}


def pick_heads(call: AttentionCall, heads: list[int]) -> AttentionCall:
    """The call with these of its heads, in this order."""
    H = call.q.shape[1]
    if not heads or len(set(heads)) < len(heads) or not all(0 <= head < H for head in heads):
        raise ValueError(f"heads must be different numbers from 0 to {H - 1}, got {heads}")
    if heads == list(range(H)):
        return call
    index = torch.tensor(heads, device=call.q.device)
    groups = H // call.k.shape[1]
    return call._replace(
        q=call.q[:, index],
        k=call.k[:, index // groups],
        v=call.v[:, index // groups],
        bias=call.bias if call.bias is None or call.bias.shape[1] == 1 else call.bias[:, index],
        sink=None if call.sink is None else call.sink[index],
    )


def pick_sequence(call: AttentionCall, sequence: int) -> AttentionCall:
    """The call with one sequence of its batch, as a batch of one."""
    B = call.q.shape[0]
    if not 0 <= sequence < B:
        raise ValueError(f"sequence must be from 0 to {B - 1}, got {sequence}")

    at = slice(sequence, sequence + 1)

    def one(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[at]

    return call._replace(
        q=call.q[at],
        k=call.k[at],
        v=call.v[at],
        intervals=Intervals(*map(one, call.intervals[:3]), call.intervals.offset),
        last=one(call.last),
        bias=None if call.bias is None else one(call.bias),
    )


def window_probs(call: AttentionCall, window: range, *, sequence: int = 0) -> Tensor:
    """A of queries and keys in the window, exactly as in the full map: [H, W, W] float32 on the CPU.

    Takes O(W·S) memory: one head's whole rows at a time.

    Args:
        call: from capture, with T = S.
        window: consecutive positions.
        sequence: which of the batch.
    """
    call = pick_sequence(call, sequence)
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    parts = []
    for head in range(call.q.shape[1]):
        one = pick_heads(call, [head])
        rows = attention_rows(one.q, one.k, window, probs_dtype=dtype, **one.options())
        parts.append(rows[0, 0, :, window.start : window.stop].float().cpu())
    return torch.stack(parts)


def _score(call: AttentionCall, stats: AttentionStats, null: bool, asymmetry: bool, operator: Operator) -> HeadScores:
    start, stop, *_ = call.intervals
    S, T = call.k.shape[2], call.q.shape[2]
    exact = null and (call.bias is None or not bool(call.bias.isneginf().any()))

    def measure(intervals: Intervals, want: set[str]) -> AttentionStats:
        return operator(call.q, call.k, want=want, columns=(), **call.options() | {"mask": intervals})

    scores = None
    if T == S:
        # a zeroed query and key leave no trace in a padded token's row and column
        real = (stop > start)[:, None, :, None]
        scores = score_asymmetry(call.q * real, call.k * real)
    return head_scores(measure, stats, call.intervals, call.last, S, exact, asymmetry and T == S, scores)


def head_scores(
    measure: Callable[[Intervals, set[str]], AttentionStats],
    stats: AttentionStats,
    intervals: Intervals,
    last: Tensor,
    S: int,
    exact: bool,
    asymmetry: bool,
    scores: Tensor | None,
) -> HeadScores:
    """Every score beside its null, unless a mask with holes has none; measure gives statistics under another mask."""
    positions = intervals.offset + torch.arange(1, intervals.stop.shape[1] + 1, device=intervals.stop.device)
    causal = bool((intervals.stop <= positions).all())

    def against_null(intervals: Intervals, *want: str) -> tuple[Null, AttentionStats]:
        stats = measure(intervals, {*SCORED, *want})
        return null_from_stats(stats, intervals, S, "dag_score"), stats

    unmasked = unmasked_asymmetry = None
    if causal and exact:
        unmasked, whole = against_null(_whole(intervals, last), *["asymmetry"] * asymmetry)
        unmasked_asymmetry = whole.asymmetry and whole.asymmetry.ratio
    return HeadScores(
        causal,
        null_from_stats(stats, intervals, S, "dag_score") if exact else None,
        against_null(intervals.without_first())[0] if exact else None,
        unmasked,
        unmasked_asymmetry,
        scores,
    )


def _whole(intervals: Intervals, last: Tensor) -> Intervals:
    """Every real query of a sequence attends all of its real keys."""
    start, stop, first, offset = intervals
    padded = stop <= start
    return Intervals(first.clamp(min=0).masked_fill(padded, 0), last.masked_fill(padded, 0), first, offset)


def _per_sequence(call: AttentionCall) -> Intervals:
    return Intervals(*(x.expand(call.q.shape[0], -1) for x in call.intervals[:3]), call.intervals.offset)


def to_cpu(value):
    return mapped(value, Tensor.cpu)


def resolve_tokens(inputs: Mapping[str, Tensor], tokens) -> list[list[str]] | None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if tokens is None:
        return None if ids is None else [[str(i) for i in sequence] for sequence in ids.tolist()]
    texts = [list(tokens)] if not tokens or isinstance(tokens[0], str) else [list(sequence) for sequence in tokens]
    if ids is not None and [len(text) for text in texts] != [ids.shape[1]] * ids.shape[0]:
        raise ValueError(f"tokens must hold {list(ids.shape)} strings, got lengths {[len(text) for text in texts]}")
    return texts


def _layer_rows(report: Report, at: int, top: int) -> list[dict]:
    stats, scores, intervals = report.layers[at], report.scores[at], report.intervals[at]
    columns = {"dag_score": stats.dag_score}
    for name, null in (("", scores.dag_score), ("sink_removed", scores.sink_removed), ("unmasked", scores.unmasked)):
        prefix = f"{name}_" if name else ""
        if name:
            columns[name] = null and null.value
        columns |= {f"{prefix}null": null and null.mean, f"{prefix}null_std": null and null.std}
        columns |= {f"{prefix}lift": null and null.lift, f"{prefix}z": null and null.z}
    columns["sink_mass"] = None if stats.columns is None else _row_mean(stats.columns[..., 0], intervals)
    columns["asymmetry"] = stats.asymmetry and stats.asymmetry.ratio
    columns["unmasked_asymmetry"] = scores.unmasked_asymmetry
    columns["score_asymmetry"] = scores.score_asymmetry
    columns["entropy"] = None if stats.entropy is None else _row_mean(stats.entropy, intervals)
    numbers = {name: None if x is None else x.tolist() for name, x in columns.items()}
    received = None if stats.received_mean is None else _received(stats.received_mean, report.tokens, top)
    return [
        {"sequence": b, "layer": report.layer_ids[at], "head": head, "causal": scores.causal}
        | {name: None if x is None or not math.isfinite(x[b][h]) else x[b][h] for name, x in numbers.items()}
        | {"received": received[b][h] if received else []}
        for b in range(len(intervals.start))
        for h, head in enumerate(report.head_ids[at])
    ]


def _row_mean(value: Tensor, intervals: Intervals) -> Tensor:
    """Mean of value [B, H, T] over the rows that may attend something, [B, H] float64."""
    filled = intervals.stop > intervals.start
    return torch.stack([x[:, rows].double().mean(1).nan_to_num(0) for x, rows in zip(value, filled, strict=True)])


def _received(received: Tensor, tokens: list[list[str]], top: int) -> list[list[list[dict]]]:
    """The keys with the largest mean attention received, ties to the earlier; padding is never among them."""
    values, keys = received.sort(dim=-1, descending=True, stable=True)
    texts = [text if len(text) == received.shape[2] else None for text in tokens]
    return [
        [
            [
                {"index": j, "token": None if text is None else text[j], "mean": value}
                for value, j in zip(*of_head, strict=True)
                if value > 0
            ]
            for of_head in zip(*of_sequence, strict=True)
        ]
        for text, *of_sequence in zip(texts, values[..., :top].tolist(), keys[..., :top].tolist(), strict=True)
    ]

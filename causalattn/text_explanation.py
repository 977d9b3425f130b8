"""Why a model predicts what it does: the smallest sets of tokens that a prediction hangs on, by the heads' graphs."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .analysis import capture
from .discovery import Discovery, Explanations, discover, explain
from .integrations.transformers.families import using
from .text_discovery import TextCorrelations, in_order, text_correlations

READABLE = {"input_ids", "attention_mask", "token_type_ids"}


class Replacement:
    """A tester for `explain`: what is predicted once all tokens of a set are replaced, a batch of sets a forward pass.

    choose: ids [N, T] → the N predictions. before: the prediction of ids as they are. after: that of each set tested.
    forwards: how many passes there were.
    """

    def __init__(
        self, choose: Callable[[Tensor], Tensor], ids: Tensor, replacement: int, positions: Sequence[int] | None = None
    ) -> None:
        self.choose, self.ids, self.replacement = choose, ids.reshape(1, -1), replacement
        self.positions = [*range(self.ids.shape[1])] if positions is None else [*positions]
        self.forwards, self.after = 0, {}
        self.before = self.predictions([()])[0]

    def predictions(self, sets: Sequence[tuple[int, ...]]) -> list[int]:
        """Of each set of nodes, node n the token at positions[n]."""
        ids = self.ids.repeat(len(sets), 1)
        for row, nodes in zip(ids, sets, strict=True):
            row[[self.positions[n] for n in nodes]] = self.replacement
        found = self.choose(ids).tolist()
        self.forwards += 1
        self.after.update(zip(sets, found, strict=True))
        return found

    def __call__(self, sets: Sequence[tuple[int, ...]], target: int) -> list[bool]:
        return [after != self.before for after in self.predictions(sets)]


class ReplacedSet(NamedTuple):
    """The positions of a set and its tokens, the sum of their distances from the target, and what is predicted then."""

    positions: list[int]
    tokens: list[str]
    distance: int
    prediction: str


class TextExplanation(NamedTuple):
    """What a prediction hangs on.

    tokens: the text in which the attention was read. target: the position explained in it. prediction: that of the text
    as it is. found: the sets of least size, nearest first. replacement: the id put in their place. layer, heads: of the
    graphs, searched with cut (of |S| = 0), in which `adjacent` tokens have an edge to the target. tested: sets;
    forwards: the passes that took, one of them of the text as it is.
    """

    tokens: list[str]
    target: int
    prediction: str
    found: list[ReplacedSet]
    replacement: int
    layer: int
    heads: list[int]
    cut: float
    adjacent: int
    tested: int
    forwards: int

    def to_json(self) -> str:
        whole = self._asdict() | {"found": [each._asdict() for each in self.found]}
        return json.dumps(whole, ensure_ascii=False)


class _Question(NamedTuple):
    """asked: the ids whose sets are replaced, choose: what is predicted of such ids; read: what the attention is read
    of, and the target in it; classes: whether a class is predicted, not a token.
    """

    asked: Tensor
    read: Mapping[str, Tensor]
    target: int
    choose: Callable[[Tensor], Tensor]
    classes: bool


def explain_text(
    model: nn.Module, inputs: Mapping[str, Tensor], tokens: Sequence[str], *, target: int | None = None,
    tokenizer=None, replacement: int | None = None, special: Sequence[str] | None = None, abduct: bool = True,
    layer: int | None = None, heads: Sequence[int] | None = None, cut: float | None = None, n: float | None = None,
    alpha: float | None = None, max_order: int | None = None, max_size: int | None = None,
    max_range: int | None = None, batch: int = 64, progress: Callable[[int, int], None] | None = None,
) -> TextExplanation:  # fmt: skip
    """Find the smallest sets of tokens whose replacement changes what a model predicts at a target, by CLEANN.

    The candidates are those of `discovery.explain`, of the graphs of all heads of one layer together. What is predicted
    is the model's own most likely choice:

        masked models      the token at target, which is masked while sets are tested
        causal models      the token at target, of the tokens before it; later ones are dropped
        classifiers        the class of the whole sequence; target is the token whose state is classified, the last one
                           where no token attends a later one

    The abductive step: the attention is read with the predicted token in place at the target, in a causal model at its
    end; row `target` of the maps is that token's own. Without it the attention is read of what is tested, and a causal
    model's graph is that of the last token, whose state predicts: then that token is in no set.

    A set that changes a prediction is one the model reacts to, not what caused the text, and any search of many sets
    finds some: compare with sets in an order of attention, and with graphs of `null_attention`.

    Args:
        model: a transformers model that returns logits: of a class of the sequence, or of tokens.
        inputs: one sequence without padding: input_ids, and attention_mask and token_type_ids where the model has them.
        tokens: its tokens as strings.
        target: a position; by default what follows the text of a causal language model, and of a classifier its first
            token, its last where no token attends a later one.
        tokenizer: names predicted tokens, and says what is special and what replaces.
        replacement: the id that replaces tokens; by default the tokenizer's mask, else its padding.
        special: tokens in no graph and no set, though their keys count; by default the tokenizer's.
        abduct: as above; a classifier has no such step.
        layer, heads: whose graphs are pooled; the last layer's, all of them by default.
        cut, n, alpha, max_order: as in `discover`.
        max_size, max_range, batch, progress: as in `explain`; without max_size every subset may be tested.

    Returns:
        TextExplanation; found is empty where no candidate changes the prediction.

    Raises:
        NotImplementedError: logits of something else than tokens or one of several classes, or an encoder-decoder.
        TypeError: a model without logits.
        ValueError: no replacement; more than one sequence, padding or other inputs; a target that is special, outside
            the text, missing for a masked model or first in a causal one; no room for the token that follows the text;
            a replacement outside the vocabulary; else as in `discover` and `explain`.

    Source: CLEANN of Rohekar et al. 2023 (arXiv:2310.20307).

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
        >>> explained = explain_text(BertForSequenceClassification(small), inputs, list("^abc"), replacement=0, cut=0.1)
        >>> explained.tokens[explained.target], len(explained.prediction)
        ('^', 7)
    """
    replacement = _replacement(tokenizer, replacement)
    special = _special(tokenizer, special)
    mask = getattr(tokenizer, "mask_token_id", None)
    _check_inputs(inputs, tokens)
    _check_model(model, replacement)
    with using(model), torch.no_grad():
        question = _question(model, inputs, tokens, target, replacement if mask is None else mask, abduct)
        name = _namer(model, inputs, tokens, tokenizer, question.classes)
        if not question.classes:
            _check_ordinary(target, tokens, special, inputs["input_ids"][0].tolist(), mask)
        target = question.target
        words = _words(question.read["input_ids"][0].tolist(), inputs["input_ids"][0].tolist(), tokens, name)
        chosen = [t for t, word in enumerate(words) if t == target or word not in special]
        maps = text_correlations(model, question.read, words, chosen, layer, heads)
        graphs = head_graphs(maps, heads, cut=cut, n=n, alpha=alpha, max_order=max_order)
        tester = Replacement(question.choose, question.asked, replacement, chosen)
        bounds = {"max_size": max_size, "max_range": max_range, "batch": batch, "progress": progress}
        explained = explain(graphs.values(), chosen.index(target), tester, **bounds)
    return _explanation(question, words, chosen, name, maps, graphs, tester, explained)


def _explanation(
    question: _Question, words: list[str], chosen: list[int], name: Callable[[int], str], maps: TextCorrelations,
    graphs: dict[int, Discovery], tester: Replacement, explained: Explanations,
) -> TextExplanation:  # fmt: skip
    """What was found, by name: node n of the graphs is the token at chosen[n]."""
    found = [
        _found(each.tokens, each.distance, chosen, words, name(tester.after[each.tokens])) for each in explained.found
    ]
    at = chosen.index(question.target)
    adjacent = len({token for graph in graphs.values() for token in graph.pag.adjacent(at)})
    used = next(iter(graphs.values())).cuts[0]
    return TextExplanation(
        words, question.target, name(tester.before), found, tester.replacement, maps.layer, [*graphs], used, adjacent,
        explained.tested, tester.forwards,
    )  # fmt: skip


def head_graphs(maps: TextCorrelations, heads: Sequence[int] | None = None, **search) -> dict[int, Discovery]:
    """The graph of each head of maps, whose numbers heads are, searched in the order of the text where there is one."""
    numbers = range(len(maps.R)) if heads is None else heads
    order = "time" if maps.ordered else None
    return {head: discover(R, names=maps.names, order=order, **search) for head, R in zip(numbers, maps.R, strict=True)}


def table(result: TextExplanation) -> list[str]:
    """A set a line with what is predicted without it, and what the search took."""
    heads = f"{len(result.heads)} heads of layer {result.layer}"
    lines = [
        f"{result.prediction!r} is predicted; explained at {result.tokens[result.target]!r} @{result.target}",
        f"{heads}, independent below |r| = {result.cut:.4f}; {result.adjacent} tokens have an edge to it",
    ]
    if result.found:
        lines.append("distance  predicted then  tokens replaced")
        for each in result.found:
            tokens = ", ".join(f"{token} @{t}" for token, t in zip(each.tokens, each.positions, strict=True))
            lines.append(f"{each.distance:>8}  {each.prediction:>14}  {tokens}")
    else:
        lines.append("no set of tokens that the graphs connect to it changes the prediction")
    lines.append(f"{result.tested} sets tested in {result.forwards} forward passes; any search of many sets finds some")
    return lines


def _question(
    model: nn.Module, inputs: Mapping[str, Tensor], tokens: Sequence[str], target: int | None, mask: int, abduct: bool
) -> _Question:
    """What is put to a model of this kind at this target."""
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise TypeError(f"model must return logits, got {type(model).__name__}")
    T = len(tokens)
    causal = in_order(next(iter(capture(model, inputs).values())))
    if logits.ndim == 2:
        if logits.shape[1] < 2:
            raise NotImplementedError(
                f"logits must be of several classes, got {logits.shape[1]} of {type(model).__name__}"
            )
        target = (T - 1 if causal else 0) if target is None else target
        # a model that reads the last token that is no padding must find it there
        _check_target(target, T - 1 if causal else 0, T - 1)
        return _Question(inputs["input_ids"][0], inputs, target, _chooser(model, inputs, None), True)
    if logits.ndim != 3 or model.get_output_embeddings() is None:
        raise NotImplementedError(f"logits must be of tokens or of a class, got {type(model).__name__}'s")
    if causal:
        target = T if target is None else target
        _check_target(target, 1, T)
        _check_room(model, target + abduct)
        asked, row = _resized(inputs, target), target - 1
    else:
        if target is None:
            raise ValueError("target must be given for a masked model, got none")
        _check_target(target, 0, T - 1)
        asked, row = {name: x.clone() for name, x in inputs.items()}, target
        asked["input_ids"][0, target] = mask
    choose = _chooser(model, asked, row)
    ids = asked["input_ids"]
    if not abduct:
        return _Question(ids[0], asked, row, choose, False)
    read = _resized(asked, target + 1) if causal else asked | {"input_ids": ids.clone()}
    read["input_ids"][0, target] = choose(ids)
    return _Question(ids[0], read, target, choose, False)


def _chooser(model: nn.Module, inputs: Mapping[str, Tensor], row: int | None) -> Callable[[Tensor], Tensor]:
    """ids [N, T] → the likeliest class of each, or token by the logits of a row; the other inputs are repeated."""

    def choose(ids: Tensor) -> Tensor:
        rest = {name: x.expand(len(ids), -1) for name, x in inputs.items() if name != "input_ids"}
        logits = model(input_ids=ids, **rest).logits
        return (logits if row is None else logits[:, row]).argmax(-1)

    return choose


def _resized(inputs: Mapping[str, Tensor], T: int) -> dict[str, Tensor]:
    """The first T columns; where there are fewer, the last one again."""
    return {name: x[:, torch.arange(T).clamp(max=x.shape[1] - 1)] for name, x in inputs.items()}


def _namer(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Sequence[str], tokenizer, classes: bool):
    """What a predicted number is called; without a tokenizer as the same number in the text."""
    if classes:
        labels = model.config.id2label or {}
        return lambda number: labels.get(number, str(number))
    if tokenizer is not None:
        return tokenizer.convert_ids_to_tokens
    known = dict(zip(inputs["input_ids"][0].tolist(), tokens, strict=True))
    return lambda number: known.get(number, str(number))


def _words(ids: list[int], given: list[int], tokens: Sequence[str], name: Callable[[int], str]) -> list[str]:
    """The tokens of the text that is read: as given, and what was put in by its name."""
    same = [t < len(given) and number == given[t] for t, number in enumerate(ids)]
    return [tokens[t] if same[t] else name(number) for t, number in enumerate(ids)]


def _found(nodes: tuple[int, ...], distance: int, chosen: list[int], words: list[str], prediction: str) -> ReplacedSet:
    positions = [chosen[node] for node in nodes]
    return ReplacedSet(positions, [words[t] for t in positions], distance, prediction)


def _special(tokenizer, given: Sequence[str] | None) -> set[str]:
    if isinstance(given, str):
        raise TypeError(f"special must be a collection of tokens, got the string {given!r}")
    return set(getattr(tokenizer, "all_special_tokens", ()) if given is None else given)


def _replacement(tokenizer, given: int | None) -> int:
    for number in (given, getattr(tokenizer, "mask_token_id", None), getattr(tokenizer, "pad_token_id", None)):
        if number is not None:
            return number
    raise ValueError("replacement must be given where no tokenizer has a mask or padding token, got none")


def _check_inputs(inputs: Mapping[str, Tensor], tokens: Sequence[str]) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map names to tensors, as a tokenizer returns them, got {type(inputs).__name__}")
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    strange = {*inputs} ^ ({*inputs} & READABLE | {"input_ids"})
    if strange:
        raise ValueError(f"inputs must hold input_ids, and of others {sorted(READABLE)}, got wrong: {sorted(strange)}")
    shape = [1, len(tokens)]
    for name, x in inputs.items():
        if [*x.shape] != shape:
            raise ValueError(f"{name} must be one sequence of its tokens, {shape}, got {[*x.shape]}")
    if not inputs.get("attention_mask", torch.ones(1)).all():
        raise ValueError("inputs must be without padding, got an attention_mask with zeros")


def _check_model(model: nn.Module, replacement: int) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(f"explanations of encoder-decoders are not there: {type(model).__name__} is one")
    vocabulary = model.get_input_embeddings().num_embeddings
    if not isinstance(replacement, int) or not 0 <= replacement < vocabulary:
        raise ValueError(f"replacement must be an id in 0…{vocabulary - 1}, got {replacement!r}")


def _check_room(model: nn.Module, T: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and T > most:
        raise ValueError(f"the token that is predicted must find room after the text, got {T} tokens and {most} places")


def _check_target(target: int, first: int, last: int) -> None:
    if not isinstance(target, int):
        raise TypeError(f"target must be a position, got {target!r}")
    if not first <= target <= last:
        raise ValueError(f"target must lie in {first}…{last}, got {target}")


def _check_ordinary(target: int | None, tokens: Sequence[str], special: set[str], ids: list[int], mask: int | None):
    """Of a language model: special tokens are not predicted, though a mask stands for one that is."""
    if target is not None and target < len(tokens) and tokens[target] in special and ids[target] != mask:
        raise ValueError(f"target must not be a special token, got {tokens[target]!r} at {target}")

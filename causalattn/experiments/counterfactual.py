"""What a model would attend, and say, had the queries or keys of one layer been made by other weights."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..analysis import WANT, to_cpu
from ..integrations.transformers.attention import AttentionCall
from ..integrations.transformers.families import self_attention, using
from ..statistics import AttentionStats, attention_stats
from .trial import check_inputs, chosen_layers, infer, watching

# what separate projections of queries and keys are called
PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("wq", "wk"), ("to_q", "to_k"))

Edit = Tensor | tuple[Tensor, Tensor]


class Inference(NamedTuple):
    """One forward pass: the layer's statistics, and the model's logits or else last hidden state, on the CPU."""

    stats: AttentionStats
    outputs: Tensor


class Counterfactual(NamedTuple):
    """The model as it is, and as it would be."""

    before: Inference
    after: Inference


def counterfactual(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    layer: int,
    *,
    query: Edit | None = None,
    key: Edit | None = None,
    want: str | Iterable[str] = WANT,
) -> Counterfactual:
    """Replace or edit W_q or W_k of one layer, infer again, and return both forward passes.

        S'_ij = scale·(W'_q x_i)·(W'_k x_j), with W' given, or W' = W + U Vᵀ

    Biases, norms and rotary positions stay what they are, and so does all that comes before the layer; everything after
    it follows from the changed attention. The edit is in force for one forward pass: the model's weights are never
    written to.

    Args:
        model: a transformers model; its implementation and training flags are put back, also on an error.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        layer: number of the layer, as in `analyze`.
        query, key: W' of the weight's shape [out, in] (one row a channel of a head), or a pair (U [out, r], V [in, r]).
            With fewer key heads than heads, an edit of keys reaches all queries of their groups.
        want: names of AttentionStats fields, or "all".

    Returns:
        Counterfactual.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or projects queries and keys by one weight.
        TypeError: model is no transformers model, inputs no mapping, or an edit neither a tensor nor a pair of them.
        ValueError: an unknown layer or want, no edit, or one of another shape.

    Source: a counterfactual in the sense of Pearl 2009, Causality, ch. 7: the same input, another mechanism.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> found = counterfactual(BertModel(small), inputs, 0, query=torch.zeros(8, 8))
        >>> found.after.stats.entropy.exp().round()  # a query of zeros attends uniformly
        tensor([[[3., 3., 3.],
                 [3., 3., 3.]]])
    """
    inputs = check_inputs(inputs)
    chosen_layers(model, [layer])
    edited = _edited(model, layer, query, key)
    wanted = want if isinstance(want, str) else tuple(want)
    found: list[AttentionStats] = []

    def score(_: int, call: AttentionCall, out: Tensor) -> None:
        found.append(to_cpu(attention_stats(call.q, call.k, want=wanted, **call.options())))

    with using(model), torch.no_grad():
        passes = []
        for tensors in ({}, edited):
            with watching(model, [layer], score):
                outputs = _main(infer(model, inputs, tensors))
            passes.append(Inference(found[-1], outputs.cpu()))
    return Counterfactual(*passes)


def _main(outputs: Mapping[str, Tensor]) -> Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def _edited(model: nn.Module, layer: int, query: Edit | None, key: Edit | None) -> dict[str, Tensor]:
    """The edited weights by their names in the model."""
    place = self_attention(model)[layer]
    attention = model.get_submodule(place)
    names = next((pair for pair in PROJECTIONS if all(_is_linear(attention, name) for name in pair)), None)
    if names is None:
        raise NotImplementedError(
            f"{model.config.model_type} is not supported: {type(attention).__name__} has no separate weights for its "
            "queries and keys"
        )
    if query is None and key is None:
        raise ValueError("counterfactual needs an edit of query or key, got neither")
    edits = zip(names, ("query", "key"), (query, key), strict=True)
    return {
        f"{place}.{name}.weight": _applied(getattr(attention, name).weight.detach(), edit, role)
        for name, role, edit in edits
        if edit is not None
    }


def _is_linear(attention: nn.Module, name: str) -> bool:
    return isinstance(getattr(attention, name, None), nn.Linear)


def _applied(weight: Tensor, edit: Edit, name: str) -> Tensor:
    parts = [edit] if isinstance(edit, Tensor) else list(edit) if isinstance(edit, tuple | list) else []
    if len(parts) not in (1, 2) or not all(isinstance(x, Tensor) for x in parts):
        raise TypeError(f"{name} must be a tensor, or a pair (U, V) of tensors, got {type(edit).__name__}")
    shapes = [list(x.shape) for x in parts]
    out, of = weight.shape
    if isinstance(edit, Tensor):
        if shapes != [[out, of]]:
            raise ValueError(f"{name} must have shape {[out, of]}, got {shapes[0]}")
        return edit.to(weight)
    if [len(shape) for shape in shapes] != [2, 2] or shapes != [[out, shapes[0][1]], [of, shapes[0][1]]]:
        raise ValueError(f"{name} must be (U [{out}, r], V [{of}, r]), got shapes {shapes}")
    U, V = (x.to(weight) for x in parts)
    return weight + U @ V.mT

"""What a readout of the model loses with each head, or each layer's heads, switched off."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.transformers.attention import AttentionCall
from ..integrations.transformers.families import using
from ..interventions import Do
from .trial import Progress, Readout, Trial, chosen_layers, plain, watching


class Ablation(NamedTuple):
    """baseline [] or [B]; effect [layers, heads] or [layers], with B last where the readout has one number a sequence.

    effect is NaN for a head that a layer does not have. float64 on the CPU. layers: their numbers, a place each.
    """

    baseline: Tensor
    effect: Tensor
    layers: list[int]


def ablate(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    readout: Readout,
    *,
    unit: Literal["head", "layer"] = "head",
    value: Literal["zero", "mean"] = "zero",
    layers: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """Switch off each attention head in turn and read the model out, one forward pass a head.

        effect_lh = M(do(o_lh := 0)) − M, or with o_lh := its mean over the sequence's tokens

    A head is switched off at its own output, before the output projection mixes the heads. Nothing later is held fixed,
    so a head whose work another takes over shows less than it does.

    Args:
        model: a transformers model; its implementation and training flags are put back, also on an error.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        readout: M, a function of the model's outputs that returns one number a sequence, [B], or one of all.
        unit: "head", or "layer" for all heads of a layer together.
        value: what takes a head's place, "zero" or "mean".
        layers: layer numbers; all by default.
        progress: called as progress(done, total) after each forward pass under a do.

    Returns:
        Ablation.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or a layer runs twice.
        TypeError: model is no transformers model, inputs no mapping, or readout returns no tensor.
        ValueError: an unknown unit, value or layer, or a readout of another shape.

    Source: knockout of heads as in Michel et al. 2019 (arXiv:1905.10650).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> ablate(BertModel(small), inputs, lambda outputs: outputs.last_hidden_state[:, 0, 0]).effect.shape
        torch.Size([1, 2, 1])
    """
    if unit not in ("head", "layer"):
        raise ValueError(f"unit must be 'head' or 'layer', got {unit!r}")
    trial = Trial(model, inputs, readout)
    numbers = chosen_layers(model, layers)
    heads: dict[int, int] = {}

    def count(layer: int, call: AttentionCall, out: Tensor) -> None:
        heads[layer] = out.shape[2]

    with using(model):
        with torch.no_grad(), watching(model, numbers, count):
            baseline = plain(trial.run())
        if unit == "layer":
            shape = (len(numbers),)
            plans = {(at,): Do.layer_off(layer, value=value) for at, layer in enumerate(numbers)}
        else:
            shape = (len(numbers), max(heads.values()))
            places = [(at, head) for at, layer in enumerate(numbers) for head in range(heads[layer])]
            plans = {(at, head): Do.head_off(head, layers=numbers[at], value=value) for at, head in places}
        return Ablation(baseline, trial.grid(plans, shape, progress) - baseline, numbers)

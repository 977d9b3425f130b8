"""Which heads, layers or positions carry what a readout needs: a clean run's heads put into a corrupted run."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.transformers.attention import AttentionCall
from ..integrations.transformers.families import using
from ..interventions import Do, Plan
from .trial import Progress, Readout, Trial, chosen_layers, plain, watching

AXES = {
    "layer": ("layer",),
    "head": ("layer", "head"),
    "position": ("layer", "position"),
    "head_position": ("layer", "head", "position"),
}


See = Callable[[int, AttentionCall], None]


class Patching(NamedTuple):
    """clean, corrupt: the two runs' readouts, [] or [B].

    patched and recovery: [layers], [layers, heads], [layers, positions] or [layers, heads, positions], with B last
    where the readout has one number a sequence; NaN for a head, or a position, that a layer does not have. float64 on
    the CPU.
    layers, heads, positions: the numbers of what was patched, a place each; None where all were patched together.
    """

    clean: Tensor
    corrupt: Tensor
    patched: Tensor
    recovery: Tensor
    layers: list[int]
    heads: list[int] | None
    positions: list[int] | None


class Run(NamedTuple):
    """A run as each layer saw it: its heads' outputs [B, H, T, V], and which tokens are real, [B or 1, T]."""

    outputs: dict[int, Tensor]
    real: dict[int, Tensor]

    def heads(self) -> int:
        """The most that a layer has."""
        return max(out.shape[1] for out in self.outputs.values())

    def tokens(self) -> int:
        return max(span(real) for real in self.real.values())


def patch(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    readout: Readout,
    *,
    over: Literal["head", "layer", "position", "head_position"] = "head",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Patching:
    """Run the corrupted input with one part of its attention taken from the clean run, a forward pass for each part.

        recovery = (M_patched − M_corrupt) / (M_clean − M_corrupt): 0 is the corrupted run, 1 the clean one

    What is taken is a head's own output, before the output projection. Recovery is not held between 0 and 1. Restoring
    what was corrupted finds parts that suffice; exchange clean and corrupt to find those that are needed.

    Args:
        model: a transformers model; its implementation and training flags are put back, also on an error.
        clean, corrupt: two inputs with as many sequences and tokens, as a tokenizer returns them.
        readout: M, a function of the model's outputs that returns one number a sequence, [B], or one of all.
        over: what is patched at a time, in every layer: "layer" all heads at all positions, "head" one head,
            "position" one token of all heads, "head_position" one token of one head.
        layers, heads, positions: which; all by default. Heads or positions that over does not take apart are patched
            together. Positions count the real tokens of each sequence, negative ones from its end.
        progress: called as progress(done, total) after each patched forward pass.

    Returns:
        Patching.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or a layer runs twice.
        TypeError: model is no transformers model, an input no mapping, or readout returns no tensor.
        ValueError: an unknown over, layer, head or position, inputs whose tokens do not match, M_clean = M_corrupt, or
            a readout of another shape.

    Source: activation patching as in Vig et al. 2020 (arXiv:2004.12265); pitfalls in Zhang & Nanda 2023
        (arXiv:2309.16042).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> clean, corrupt = ({"input_ids": torch.tensor([ids])} for ids in ([5, 6, 7], [5, 8, 7]))
        >>> readout = lambda outputs: outputs.last_hidden_state[:, 0, 0]
        >>> patch(BertModel(small), clean, corrupt, readout, over="head_position").recovery.shape
        torch.Size([1, 2, 3, 1])
    """
    if over not in AXES:
        raise ValueError(f"over must be among {', '.join(AXES)}, got {over!r}")
    right, wrong = (Trial(model, inputs, readout) for inputs in (clean, corrupt))
    numbers = chosen_layers(model, layers)
    with using(model):
        m_clean, m_corrupt, source = both_runs(right, wrong, numbers)
        heads = chosen("heads", heads, source.heads(), 0)
        positions = chosen("positions", positions, source.tokens(), -source.tokens())
        axes = {"layer": numbers, "head": heads, "position": positions}
        everything = {"head": range(source.heads()), "position": range(source.tokens())}
        apart = {axis: list(axes[axis] or everything[axis]) for axis in AXES[over]}
        shape = [len(places) for places in apart.values()]
        patched = wrong.grid(_plans(source, apart, heads, positions), shape, progress)
    recovery = (patched - m_corrupt) / (m_clean - m_corrupt)
    return Patching(m_clean, m_corrupt, patched, recovery, numbers, apart.get("head"), apart.get("position"))


def both_runs(clean: Trial, corrupt: Trial, layers: list[int], see: See | None = None) -> tuple[Tensor, Tensor, Run]:
    """The two readouts, and the clean run, whose calls see is shown.

    Raises:
        ValueError: inputs whose tokens do not match, or readouts that are equal.
    """
    (m_clean, source), (m_corrupt, other) = _observed(clean, layers, see), _observed(corrupt, layers, None)
    _check_same_tokens(source, other)
    if bool((m_clean == m_corrupt).any()):
        raise ValueError(f"recovery is undefined where the clean and corrupt readouts are equal, got {m_clean}")
    return m_clean, m_corrupt, source


def _observed(trial: Trial, layers: list[int], see: See | None) -> tuple[Tensor, Run]:
    run = Run({}, {})

    def keep(layer: int, call: AttentionCall, out: Tensor) -> None:
        if see is not None:
            see(layer, call)
        run.outputs[layer] = out.transpose(1, 2)
        run.real[layer] = call.intervals.stop > call.intervals.start

    with torch.no_grad(), watching(trial.model, layers, keep):
        return plain(trial.run()), run


def _check_same_tokens(clean: Run, corrupt: Run) -> None:
    for layer, out in clean.outputs.items():
        shapes = [list(run.outputs[layer].shape[::2]) for run in (clean, corrupt)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"clean and corrupt must have as many sequences and tokens, got {shapes[0]} and {shapes[1]}"
            )
        real = [run.real[layer].expand(len(out), -1) for run in (clean, corrupt)]
        if not torch.equal(*real):
            raise ValueError("clean and corrupt must have their padding in the same places")


def chosen(name: str, numbers: Iterable[int] | None, count: int, least: int) -> list[int] | None:
    if numbers is None:
        return None
    numbers = list(numbers)
    if not numbers or not all(least <= n < count for n in numbers):
        raise ValueError(f"{name} must be numbers from {least} to {count - 1}, got {numbers}")
    return numbers


def _plans(
    source: Run, apart: dict[str, list[int]], heads: list[int] | None, positions: list[int] | None
) -> dict[tuple[int, ...], Plan]:
    """The patch of each place in the grid of what is patched apart, but of none that a layer does not have."""
    plans = {}
    for place in product(*(range(len(numbers)) for numbers in apart.values())):
        at = {axis: numbers[n] for (axis, numbers), n in zip(apart.items(), place, strict=True)}
        out, count = source.outputs[at["layer"]], span(source.real[at["layer"]])
        rows = [at["position"]] if "position" in at else positions
        if at.get("head", 0) < out.shape[1] and (rows is None or any(-count <= row < count for row in rows)):
            plans[place] = Do.patch(out, rows, heads=at.get("head", heads), layers=at["layer"])
    return plans


def span(real: Tensor) -> int:
    """From the first real token of a sequence to its last, of the longest: that is how plans count tokens."""
    places = torch.arange(real.shape[-1], device=real.device).expand_as(real)
    first = places.masked_fill(~real, real.shape[-1]).amin(-1)
    return int((places.masked_fill(~real, -1).amax(-1) + 1 - first).max())

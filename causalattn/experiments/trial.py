"""A model switched over, one input and a readout: run as it is, seen from within, or under one plan after another."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..integrations.transformers.attention import AttentionCall, watcher
from ..integrations.transformers.families import self_attention
from ..interventions import Plan, do

Readout = Callable[..., Tensor]
Progress = Callable[[int, int], None]
Visit = Callable[[int, AttentionCall, Tensor], None]


class Trial:
    """Forward passes of one model on one input, each read out as a number, or a number a sequence.

    Raises:
        TypeError: inputs is no mapping, or readout cannot be called.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], readout: Readout):
        if not callable(readout):
            raise TypeError(f"readout must be a function of the model's outputs, got {type(readout).__name__}")
        self.model, self.inputs, self.readout = model, check_inputs(inputs), readout

    def run(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The readout of one forward pass, with its gradient: [] or [B]; tensors take the place of the model's own."""
        value = self.readout(infer(self.model, self.inputs, tensors))
        if not isinstance(value, Tensor):
            raise TypeError(f"readout must return a tensor, got {type(value).__name__}")
        B = self.sequences()
        if value.shape not in ((), (B,)) or not value.is_floating_point():
            raise ValueError(
                f"readout must return one real number, or {B}, one a sequence, got {value.dtype} of shape "
                f"{list(value.shape)}"
            )
        return value

    def sequences(self) -> int:
        """B, of the input that the model is named after or else of the first tensor."""
        tensors = {name: x for name, x in self.inputs.items() if isinstance(x, Tensor) and x.ndim}
        main = getattr(self.model, "main_input_name", None)
        return len(tensors.get(main, next(iter(tensors.values()), [None])))

    def sweep(self, plans: Sequence[Plan], progress: Progress | None = None) -> Tensor:
        """The readout under each plan, one forward pass a plan: [plans] or [plans, B], float64 on the CPU."""
        values = []
        for done, plan in enumerate(plans, 1):
            with do(plan), torch.no_grad():
                values.append(plain(self.run()))
            if progress is not None:
                progress(done, len(plans))
        return torch.stack(values)

    def grid(
        self, plans: Mapping[tuple[int, ...], Plan], shape: Sequence[int], progress: Progress | None = None
    ) -> Tensor:
        """The sweep of plans at their places: [*shape] or [*shape, B], NaN where there is none."""
        values = self.sweep(list(plans.values()), progress)
        grid = torch.full((*shape, *values.shape[1:]), torch.nan, dtype=torch.float64)
        grid[tuple(torch.tensor(list(plans)).T)] = values
        return grid


def check_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map names to tensors, as a tokenizer returns them, got {type(inputs).__name__}")
    return dict(inputs)


def infer(model: nn.Module, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None):
    """The model's outputs, with no cache kept; tensors, by name, take the place of its parameters and buffers."""
    takes = inspect.signature(model.forward).parameters
    cacheless = {"use_cache": False} if "use_cache" in takes else {}
    return functional_call(model, dict(tensors or {}), kwargs=cacheless | dict(inputs))


def plain(value: Tensor) -> Tensor:
    """The value as float64 on the CPU."""
    return value.detach().double().cpu()


def gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """∂(Σ value)/∂x of each tensor, 0 where value does not depend on it.

    Raises:
        ValueError: value has no gradient.
    """
    if not value.requires_grad:
        raise ValueError("readout must be a differentiable function of the model's outputs, got one without a gradient")
    slopes = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(tensors, slopes, strict=True)]


def chosen_layers(model: nn.Module, layers: Iterable[int] | None) -> list[int]:
    """These self-attention layers, ascending; all where layers is None.

    Raises:
        TypeError: model is no transformers model.
        NotImplementedError: a family that cannot be switched over.
        ValueError: no layers, or an unknown one.
    """
    numbers = self_attention(model)
    chosen = set(numbers) if layers is None else set(layers)
    if not chosen or not chosen <= set(numbers):
        raise ValueError(f"layers must be among {sorted(numbers)}, got {sorted(chosen - set(numbers))}")
    return sorted(chosen)


@contextmanager
def watching(model: nn.Module, layers: Iterable[int], visit: Visit) -> Iterator[None]:
    """Call visit(layer, call, heads' outputs [B, T, H, V]) in each of these layers of one forward pass.

    Raises:
        NotImplementedError: in the forward pass, a layer that runs twice.
    """
    names = self_attention(model)
    modules = {model.get_submodule(names[layer]): layer for layer in layers}
    seen = set()

    def see(module: nn.Module, call: AttentionCall, out: Tensor) -> None:
        layer = modules.get(module)
        if layer is None:
            return
        if layer in seen:
            family = model.config.model_type
            raise NotImplementedError(f"{family} attends in {names[layer]} more than once a forward pass")
        seen.add(layer)
        visit(layer, call, out)

    token = watcher.set(see)
    try:
        yield
    finally:
        watcher.reset(token)

"""How a readout of the model answers to small changes of each input token or parameter: derivatives, checked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..integrations.transformers.families import using
from .trial import Progress, Readout, Trial, gradients, plain

METHODS = ("both", "gradient", "difference")
NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Influence(NamedTuple):
    """Of each token [B, T], or of each parameter tensor [P]; float64 on the CPU, None where the method leaves it out.

    norm: ‖∂M/∂x‖. derivative: ⟨∂M/∂x, u⟩ along the direction u. difference: the same by a central difference.
    disagreement: ‖derivative − difference‖ / ‖difference‖ over all of them, one number; 0 / 0 is 0.
    names: of the parameters, None for tokens.
    """

    norm: Tensor | None
    derivative: Tensor | None
    difference: Tensor | None
    disagreement: Tensor | None
    names: list[str] | None


def influence(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    readout: Readout,
    *,
    of: Literal["tokens", "parameters"] = "tokens",
    method: Literal["both", "gradient", "difference"] = "both",
    direction: Literal["own", "random"] = "own",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Influence:
    """Measure how a readout answers to each input token, or to each parameter tensor, to first order.

        derivative = ⟨∂M/∂x, u⟩, by one backward pass, in the model's dtype
        difference = (M(x + h u) − M(x − h u)) / 2h, by two forward passes for each x, in float64 throughout

    x is the embedding of a token, or a parameter; u = x asks what it is worth as it stands (gradient × input). Of a
    difference the error is h² times the third derivative, so a disagreement well above the model's own rounding says
    that the gradient is wrong. This is no influence function: nothing here asks about examples of the training set.

    Args:
        model: a transformers model; it runs switched over, in evaluation mode, and is left as it was.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        readout: M, a differentiable function of the model's outputs: one number a sequence, [B], whose sum is taken, or
            one of all.
        of: "tokens", what the model's input embedding returns, or "parameters", every one, tied ones once.
        method: "both", or one of "gradient" and "difference"; differences take 2T or 2P forward passes (2BT of
            tokens, where the readout is one number), and a model that cannot run in float64 has none.
        direction: u, "own" for x itself or "random" for a unit vector drawn for each x.
        generator: of the random directions, on the CPU; torch's own by default.
        progress: called as progress(done, total) after each pair of forward passes.

    Returns:
        Influence.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or embeds its input more than once.
        TypeError: model is no transformers model, inputs no mapping, or readout returns no tensor.
        ValueError: an unknown of, method or direction, a readout of another shape or without a gradient.

    Source: gradient × input, Shrikumar et al. 2016 (arXiv:1605.01713).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> found = influence(BertModel(small), inputs, lambda outputs: outputs.last_hidden_state[:, 0, 0])
        >>> found.derivative.shape, bool(found.disagreement < 1e-3)
        (torch.Size([1, 3]), True)
    """
    for name, value, known in (
        ("of", of, ("tokens", "parameters")),
        ("method", method, METHODS),
        ("direction", direction, ("own", "random")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}, got {value!r}")
    trial = Trial(model, inputs, readout)
    drawn = _Directions(direction == "random", generator)
    with using(model):
        study = _Tokens(trial, drawn) if of == "tokens" else _Parameters(trial, drawn)
        norm = derivative = difference = disagreement = None
        if method != "difference":
            norm, derivative = study.gradient()
        if method != "gradient":
            difference = study.difference(progress)
        if method == "both":
            distance = (derivative - difference).norm()
            disagreement = torch.where(distance > 0, distance / difference.norm(), 0)
    return Influence(norm, derivative, difference, disagreement, study.names)


class _Directions:
    """The direction u of each x, and how far to step along it; axes are those of one x."""

    def __init__(self, random: bool, generator: torch.Generator | None):
        self.random, self.generator = random, generator

    def of(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        if not self.random:
            return x.detach()
        u = torch.randn(x.shape, dtype=torch.float64, generator=self.generator).to(x.device)
        return u / u.square().sum(axes, keepdim=True).sqrt()

    def step(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """h, in proportion to x: the cube root of a rounding, where a central difference is best."""
        one = torch.finfo(torch.float64).eps ** (1 / 3)
        size = x.double().square().sum(axes, keepdim=True).sqrt()
        return one * size.where(size > 0, 1.0) if self.random else torch.full_like(size, one)


class _Tokens:
    """The embeddings of the input, [B, T, E]."""

    names = None

    def __init__(self, trial: Trial, drawn: _Directions):
        self.trial, self.seen = trial, []
        with torch.no_grad(), self._embedding(self.seen.append):
            self.many = trial.run().ndim > 0
        self._check_seen()
        (x,) = self.seen
        self.u, self.h = drawn.of(x, (-1,)), drawn.step(x, (-1,))

    def gradient(self) -> tuple[Tensor, Tensor]:
        (x,) = (x.detach().requires_grad_() for x in self.seen)
        with torch.enable_grad(), self._embedding(lambda _: x):
            (slope,) = gradients(self.trial.run(), [x])
        return plain(slope.double().norm(dim=-1)), plain((slope.double() * self.u).sum(-1))

    def difference(self, progress: Progress | None) -> Tensor:
        B, T = self.u.shape[:2]
        # a readout of all sequences cannot tell whose token it was
        sequences = [slice(None)] if self.many else [slice(b, b + 1) for b in range(B)]
        places = [(which, token) for which in sequences for token in range(T)]
        found = torch.empty(B, T, dtype=torch.float64)
        for done, place in enumerate(places, 1):
            shift = torch.zeros_like(self.u, dtype=torch.float64)
            shift[place] = self.h[place] * self.u[place]
            ends = [self._moved(shift), self._moved(-shift)]
            found[place] = (ends[0] - ends[1]) / (2 * plain(self.h[place])[..., 0])
            if progress is not None:
                progress(done, len(places))
        return found

    def _moved(self, shift: Tensor) -> Tensor:
        with torch.no_grad(), _Wide(), self._embedding(lambda x: x + shift):
            return plain(self.trial.run())

    @contextmanager
    def _embedding(self, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """edit(x) takes the place of what the input embedding returns, unless it is None."""
        handle = self.trial.model.get_input_embeddings().register_forward_hook(lambda module, _, x: edit(x))
        try:
            yield
        finally:
            handle.remove()

    def _check_seen(self) -> None:
        if not self.seen:
            raise ValueError(f"inputs must hold what the model's input embedding takes, got {list(self.trial.inputs)}")
        if len(self.seen) > 1:
            family = self.trial.model.config.model_type
            raise NotImplementedError(f"{family} embeds its input {len(self.seen)} times a forward pass")


class _Parameters:
    """Every parameter of floating point."""

    def __init__(self, trial: Trial, drawn: _Directions):
        self.trial = trial
        self.x = {name: p.detach() for name, p in trial.model.named_parameters() if p.is_floating_point()}
        self.names = list(self.x)
        axes = {name: tuple(range(x.ndim)) for name, x in self.x.items()}
        self.u = {name: drawn.of(x, axes[name]) for name, x in self.x.items()}
        self.h = {name: float(drawn.step(x, axes[name])) for name, x in self.x.items()}

    def gradient(self) -> tuple[Tensor, Tensor]:
        # copies, so that a frozen parameter has a gradient too, and none is left in the model
        leaves = {name: x.clone().requires_grad_() for name, x in self.x.items()}
        with torch.enable_grad():
            slopes = gradients(self.trial.run(leaves), list(leaves.values()))
        slopes = {name: slope.double() for name, slope in zip(self.names, slopes, strict=True)}
        norm = torch.stack([plain(slopes[name].norm()) for name in self.names])
        return norm, torch.stack([plain((slopes[name] * self.u[name]).sum()) for name in self.names])

    def difference(self, progress: Progress | None) -> Tensor:
        found = []
        for done, name in enumerate(self.names, 1):
            shift = self.h[name] * self.u[name].double()
            with torch.no_grad(), _Wide():
                ends = [plain(self.trial.run({name: self.x[name].double() + sign * shift}).sum()) for sign in (1, -1)]
            found.append((ends[0] - ends[1]) / (2 * self.h[name]))
            if progress is not None:
                progress(done, len(self.names))
        return torch.stack(found)


class _Wide(TorchDispatchMode):
    """Computes in float64 whatever a model or a readout holds, or asks for, in less."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in NARROW:
            kwargs["dtype"] = torch.float64
        if not function._schema.is_mutable:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return function(*args, **kwargs)


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.dtype in NARROW else x

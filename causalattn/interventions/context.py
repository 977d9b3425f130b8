"""Plans in force while a model runs: a context variable, so each thread and task has its own."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..masks import Intervals
from .edges import Call, Frame, Surgery, resolve
from .plan import Plan, check_plan
from .receipt import Receipt


class Running:
    """A plan in force: which of it each layer gets, and how each sequence's tokens count."""

    def __init__(self, plan: Plan, receipt: Receipt):
        self.plan, self.receipt = plan, receipt
        self._order: dict[nn.Module, int] = {}
        self._prompts: dict[nn.Module, list[tuple[int, int]]] = {}

    def layer(self, module: nn.Module) -> int:
        """The module's own layer_idx, else its place among those that have run."""
        own = getattr(module, "layer_idx", None)
        return own if isinstance(own, int) else self._order.setdefault(module, len(self._order))

    def check(self, layers: Collection[int]) -> None:
        """Every layer that an item names is among those of the model.

        Raises:
            ValueError: one is not.
        """
        for item in self.plan.items:
            if missing := [layer for layer in item.layers or () if layer not in layers]:
                raise ValueError(
                    f"layers of {item} must be among the model's {len(layers)}, {list(layers)}, got {missing}"
                )

    def resolve(
        self, module: nn.Module, layer: int, q: Tensor, k: Tensor, intervals: Intervals, bias: Tensor | None
    ) -> tuple[list[Surgery], list[int | Tensor]]:
        """The surgeries of one call, whose real rows are those that intervals leaves any key."""
        B, H, T, _ = q.shape
        start, stop, _, offset = intervals
        plan = Plan(tuple(self.plan.at(layer).values()))
        frames = self._frames(module, intervals, B)
        return resolve(plan, Call(B, H, T, k.shape[2], offset, start, stop, bias, False), frames, layer)

    def _frames(self, module: nn.Module, intervals: Intervals, B: int) -> list[Frame]:
        """Tokens count from each sequence's first real key; the prompt's last is −1, in later steps too."""
        start, stop, first, offset = (x.cpu() if isinstance(x, Tensor) else x for x in intervals)
        filled = stop > start
        positions = torch.arange(offset, offset + start.shape[1])
        origin = torch.where(filled, first, 2**30).amin(1)
        end = torch.where(filled, positions + 1, -(2**30)).amax(1)
        begins = torch.where(filled, positions, 2**30).amin(1) <= origin
        found = list(zip(origin.tolist(), end.tolist(), begins.tolist(), strict=True))
        found = found * B if len(found) < B else found
        known = self._prompts.get(module, [])
        frames = []
        for b, (low, high, new) in enumerate(found):
            if not new and b < len(known):
                # keys that a sliding cache has dropped leave negative positions behind
                frames.append(Frame(low, *known[b]))
            else:
                frames.append(Frame(low, max(0, high - low), max(0, high - low)))
        self._prompts[module] = [(frame.rows, frame.keys) for frame in frames]
        return frames


running: ContextVar[Running | None] = ContextVar("causalattn_do", default=None)


@contextmanager
def do(
    plan: Plan,
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    tokens: Sequence[str] | None = None,
) -> Iterator[Receipt]:
    """Run a model under a plan: every attention call within the `with` is intervened on, in forward and in generate.

    The model must be one that `integrations.transformers.use` has switched over. Rows and columns count the real tokens
    of each sequence, whatever its padding; negative ones count from the end of the prompt. A row that a later step of
    generate reaches is intervened on there. The plan is in force in this thread alone, and ends with the `with`, also
    on an error. Padding must stand at either end; a prompt that is read in several chunks ends, for negative numbers,
    with its first; and a model that recomputes its forward pass for a gradient must do so within the `with`.

    Args:
        plan: made by `Do`.
        layers, heads: where items act that do not choose their own; everywhere by default. Layers count as in
            `analyze`, and cross-attention is never intervened on.
        tokens: one sequence's real tokens as strings, for a plan that names some.

    Yields:
        Receipt, to be read afterwards.

    Raises:
        ValueError: on leaving, an item that matched nothing, or that names a layer which did not run; before, a text
            without tokens, or one that occurs never or more than once; in the model, what `attention` refuses and, at
            its first layer, a layer that it does not have.
        RuntimeError: a plan is in force already.

    Example:
        >>> from causalattn import Do, do, integrations
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> model = integrations.transformers.use(BertModel(small).eval())
        >>> with do(Do.cut(2, 0)) as receipt:
        ...     outputs = model(torch.tensor([[5, 6, 7]]))
        >>> receipt.edges
        2
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a causalattn Plan, such as Do.cut(7, 2), got {type(plan).__name__}")
    if not plan.items:
        raise ValueError("plan must hold at least one item, got none")
    if isinstance(tokens, str):
        raise TypeError("tokens must be a list of strings, one a token, got one string")
    plan = check_plan(plan if tokens is None else plan.locate(tokens)).within(layers=layers, heads=heads)
    if running.get() is not None:
        raise RuntimeError("a plan is in force already: join the two with +")
    receipt = Receipt(plan)
    token = running.set(Running(plan, receipt))
    try:
        yield receipt
    finally:
        running.reset(token)
    for item, edges in zip(plan.items, receipt.items, strict=True):
        if edges == 0:
            raise ValueError(
                f"{item} matched nothing: no such layer or token ran, the mask forbids the edge, or the model was not "
                "switched over by integrations.transformers.use"
            )
        if missing := sorted(set(item.layers or ()) - set(receipt.layers)):
            raise ValueError(f"{item} names layers that did not run: {missing}")

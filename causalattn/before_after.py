"""A text before and under interventions: what each plan moved, in attention and in the model's last hidden states."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .analysis import recording
from .attention import attention_rows
from .integrations.transformers.attention import AttentionCall, places
from .integrations.transformers.families import self_attention, using
from .interventions import Plan, do
from .interventions.address import parse_span
from .interventions.receipt import Moved

WINDOW = 128


class Under(NamedTuple):
    """One plan as it was written: its receipt, the mean attention of the shown layer [W, W], the rows it names there,
    and by how much each token's last hidden state moved, ‖h' − h‖ / ‖h‖, [T].
    """

    plan: str
    edges: int
    layers: dict[int, Moved]
    attention: Tensor
    rows: list[int]
    moved: Tensor


class BeforeAfter(NamedTuple):
    """tokens [T], the layer shown, the window of tokens shown, its mean attention over heads [W, W], and each plan."""

    tokens: list[str]
    layer: int
    window: range
    attention: Tensor
    under: list[Under]

    def to_json(self) -> str:
        """Plans with their receipts and, of each, the tokens that moved."""
        plans = []
        for each in self.under:
            layers = {n: {name: float(x) for name, x in moved._asdict().items()} for n, moved in each.layers.items()}
            plans.append({"plan": each.plan, "edges": each.edges, "layers": layers, "moved": each.moved.tolist()})
        return json.dumps({"tokens": self.tokens, "layer": self.layer, "plans": plans}, ensure_ascii=False)


def compare_plans(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    plans: Sequence[Plan],
    tokens: Sequence[str],
    *,
    layer: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BeforeAfter:
    """Run a text without intervention and under each plan.

    Args:
        model: a transformers model; its implementation and training flags are put back, also on an error.
        inputs: one sequence without padding, as a tokenizer returns it.
        plans: each is in force alone; texts in them name tokens.
        tokens: the input's tokens as strings.
        layer: the layer whose attention is kept; by default the last that a plan acts on.
        progress: called as progress(done, total) after each run.

    Returns:
        BeforeAfter; of a long text the window around the first row that is intervened on.

    Raises:
        ValueError: no such layer or token, or what `do` refuses.
    """
    names, plans = list(map(str, plans)), [plan.locate(tokens) for plan in plans]
    numbers = sorted(self_attention(model))
    if layer is None:
        chosen = [n for plan in plans for item in plan.items for n in item.layers or numbers]
        layer = max(set(chosen) & set(numbers), default=numbers[-1])
    if layer not in numbers:
        raise ValueError(f"layer must be among {numbers}, got {layer}")
    touched = [_rows(plan, layer, len(tokens)) for plan in plans]
    window = _window(min((rows[0] for rows in touched if rows), default=0), len(tokens))
    before, attention = _run(model, inputs, layer, window, None)
    runs = []
    for done, (name, plan, rows) in enumerate(zip(names, plans, touched, strict=True), 1):
        with do(plan) as receipt:
            after, changed = _run(model, inputs, layer, window, plan)
        moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
        runs.append(Under(name, receipt.edges, receipt.layers, changed, rows, moved))
        if progress is not None:
            progress(done, len(plans))
    return BeforeAfter(list(tokens), layer, window, attention, runs)


def table(result: BeforeAfter, top: int = 5) -> list[str]:
    """What each plan did, as lines to print."""
    lines = []
    for each in result.under:
        lines += ["", f"{each.plan}: {each.edges} edges"]
        lines.append("layer  probability taken    KL, nats  rows emptied")
        for layer, moved in each.layers.items():
            lines.append(f"{layer:>5}  {float(moved.mass):>17.4f}  {float(moved.kl):>10.4f}  {int(moved.emptied):>12}")
        order = each.moved.argsort(descending=True, stable=True)[:top].tolist()
        tokens = ", ".join(f"{result.tokens[i]} @{i} {each.moved[i]:.3f}" for i in order)
        lines.append(f"last hidden states that moved most, ‖Δh‖/‖h‖: {tokens}")
    return lines[1:]


def _run(
    model: nn.Module, inputs: Mapping[str, Tensor], layer: int, window: range, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    """The last hidden states [T, D], and the mean attention of a layer over its heads within the window [W, W]."""
    found = []

    def keep(module: nn.Module, call: AttentionCall) -> None:
        if places[module].layer == layer:
            here = None if plan is None else _acting(plan, layer)
            A = attention_rows(call.q, call.k, window, do=here, **call.options())
            found.append(A[0, :, :, window.start : window.stop].float().mean(0).cpu())

    with using(model), torch.no_grad(), recording(keep):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    return hidden.float().cpu(), found[0]


def _acting(plan: Plan, layer: int) -> Plan | None:
    items = plan.at(layer).values()
    return Plan(tuple(item.on(layer) for item in items)) if items else None


def _rows(plan: Plan, layer: int, T: int) -> list[int]:
    """The rows that a plan names in a layer, in order; none where it takes all of them."""
    rows: set[int] = set()
    for item in plan.at(layer).values():
        if isinstance(item.row, str):
            rows |= set(range(T)[parse_span(item.row)])
        else:
            rows |= {row % T for row in (*(item.row or ()), *(row for row, _ in item.edges or ()))}
    return sorted(rows)


def _window(row: int, T: int) -> range:
    first = min(max(0, row - WINDOW // 2), max(0, T - WINDOW))
    return range(first, min(T, first + WINDOW))

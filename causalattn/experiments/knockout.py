"""The attention edges that a readout depends on most: all screened to first order, the top ones cut for real."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..edge_effects import edge_effects
from ..integrations.transformers.attention import AttentionCall
from ..integrations.transformers.families import using
from ..interventions import Do, Plan
from ..masks import Intervals
from .trial import Progress, Readout, Trial, chosen_layers, gradients, plain, watching

# how many edges of one row edge_effects can name
MOST = 64

Kind = Literal["cut", "soft", "hard"]


class KnockoutSweep(NamedTuple):
    """N edges, those with the largest screened effect first; on the CPU.

    edges [N, 5]: sequence, layer, head, row and col, as `Do` counts them. screened, verified [N], float64: the change
    of the readout to first order, and by a forward pass. baseline [] or [B]: the readout itself.
    agreement: Spearman's ρ of screened and verified; size_agreement: of their absolute values. Both are of the N edges
    alone, and NaN where either side is constant.
    """

    edges: Tensor
    screened: Tensor
    verified: Tensor
    baseline: Tensor
    agreement: float
    size_agreement: float


def knockout_sweep(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    readout: Readout,
    *,
    top: int = 50,
    layers: Iterable[int] | None = None,
    kind: Kind = "cut",
    strength: float | None = None,
    progress: Progress | None = None,
) -> KnockoutSweep:
    """Screen every attention edge of every head by one backward pass, and intervene for real on the top ones.

        screened = g_i·(o'_i − o_i), g_i = ∂M/∂o_i: exact at the head's output, first order in all that follows
        verified = M(do) − M, one forward pass an edge

    A cut of the only edge of a row leaves o' = 0. An edge that the screening misses is never verified: where later
    layers saturate or make up for a loss, a small first-order effect may stand for a large one. The agreement says how
    far to trust the order among those found.

    Args:
        model: a transformers model; its implementation and training flags are put back, also on an error.
        inputs: what the model's forward takes, as a tokenizer returns it with return_tensors="pt".
        readout: M, a differentiable function of the model's outputs: one number a sequence, [B], where an edge's effect
            is that on its own sequence's number, or one of all.
        top: how many edges to verify; beyond 64, at most 64 of one row are found.
        layers: layer numbers; all by default.
        kind, strength: the intervention, as in `edge_effects`.
        progress: called as progress(done, total) after each verifying forward pass.

    Returns:
        KnockoutSweep, with fewer than top edges where the model has no more.

    Raises:
        NotImplementedError: the model's family cannot be switched over, or a layer runs twice.
        TypeError: model is no transformers model, inputs no mapping, or readout returns no tensor.
        ValueError: top below 1, an unknown layer or kind, a strength that kind does not take, or a readout of another
            shape or without a gradient.

    Source: screening as in attribution patching, Syed et al. 2023 (arXiv:2310.10348), by closed forms in place of
        derivatives of the scores.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> found = knockout_sweep(BertModel(small), inputs, lambda out: out.last_hidden_state[:, 0, 0], top=4)
        >>> found.edges.shape, found.verified.shape
        (torch.Size([4, 5]), torch.Size([4]))
    """
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be at least 1, got {top!r}")
    trial = Trial(model, inputs, readout)
    numbers = chosen_layers(model, layers)
    with using(model):
        seen, baseline = _differentiated(trial, numbers)
        options = {"kind": kind, "strength": strength, "n": min(top, MOST)}
        found = None
        while seen:
            layer, (call, slope) = seen.popitem()
            found = _largest(top, found, _screened(layer, call, slope, options))
        screened, edges = found
        values = trial.sweep([_plan(kind, strength, edge) for edge in edges.tolist()], progress)
    change = values - baseline
    verified = change if change.ndim == 1 else change.gather(1, edges[:, :1])[:, 0]
    agreement = _spearman(screened, verified), _spearman(screened.abs(), verified.abs())
    return KnockoutSweep(edges, screened, verified, baseline, *agreement)


def _differentiated(trial: Trial, layers: list[int]) -> tuple[dict[int, tuple[AttentionCall, Tensor]], Tensor]:
    """Of each layer its call and ∂M/∂o [B, H, T, V]; and M."""
    calls, outs = {}, {}

    def keep(layer: int, call: AttentionCall, out: Tensor) -> None:
        # of a model whose parameters are frozen, the first heads start the graph
        outs[layer] = out if out.requires_grad else out.requires_grad_()
        calls[layer] = AttentionCall(*(x.detach() if isinstance(x, Tensor) else x for x in call))

    with torch.enable_grad(), watching(trial.model, layers, keep):
        value = trial.run()
        slopes = gradients(value, list(outs.values()))
    slopes = {layer: slope.transpose(1, 2) for layer, slope in zip(outs, slopes, strict=True)}
    return {layer: (calls[layer], slopes[layer]) for layer in calls}, plain(value)


def _screened(layer: int, call: AttentionCall, slope: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """The effects of the layer's edges, [N], and the edges, [N, 5]."""
    with torch.no_grad():
        found = edge_effects(
            call.q, call.k, call.v, measure="readout", readout=slope, want="topk", **options, **call.options()
        ).topk
    origin = _origin(call.intervals).expand(len(call.q))
    places = (found.indices >= 0).nonzero()
    b, head, row, _ = places.T
    col = found.indices[tuple(places.T)].long()
    row, col = row + call.intervals.offset - origin[b], col - origin[b]
    edges = torch.stack([b, torch.full_like(b, layer), head, row, col], 1)
    return plain(found.values[tuple(places.T)]), edges.cpu()


def _origin(intervals: Intervals) -> Tensor:
    """The position from which a plan counts each sequence's tokens: its first real key, [B or 1]."""
    filled = intervals.stop > intervals.start
    return torch.where(filled, intervals.first, torch.iinfo(torch.int32).max).amin(1).long()


def _largest(top: int, *parts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The top effects by size among the parts, equal ones in the order of their edges."""
    values, edges = (torch.cat(x) for x in zip(*(part for part in parts if part is not None), strict=True))
    for column in reversed(range(edges.shape[1])):
        order = edges[:, column].argsort(stable=True)
        values, edges = values[order], edges[order]
    order = values.abs().argsort(descending=True, stable=True)[:top]
    return values[order], edges[order]


def _plan(kind: Kind, strength: float | None, edge: list[int]) -> Plan:
    sequence, layer, head, row, col = edge
    place = {"batch": sequence, "layers": layer, "heads": head}
    return Do.soft(row, col, strength, **place) if kind == "soft" else getattr(Do, kind)(row, col, **place)


def _spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of ranks, equal values sharing their mean rank."""
    a, b = (_ranks(z) - (len(z) - 1) / 2 for z in (x, y))
    return float((a @ b) / (a.norm() * b.norm()))


def _ranks(x: Tensor) -> Tensor:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2)[place].double()

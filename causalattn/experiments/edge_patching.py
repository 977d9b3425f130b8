"""Which attention edges carry what a readout needs: a clean run's probabilities put into a corrupted run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import attention_rows
from ..integrations.transformers.attention import AttentionCall
from ..integrations.transformers.families import using
from ..interventions import Do
from ..interventions.arguments import pairs
from .patching import both_runs, chosen
from .trial import Progress, Readout, Trial, chosen_layers


class EdgePatching(NamedTuple):
    """clean, corrupt: the two runs' readouts, [] or [B].

    patched and recovery: [layers, heads, edges], with B last where the readout has one number a sequence; NaN for a
    head or an edge that a layer does not have. float64 on the CPU. layers, heads, edges: what was patched.
    """

    clean: Tensor
    corrupt: Tensor
    patched: Tensor
    recovery: Tensor
    layers: list[int]
    heads: list[int]
    edges: list[tuple[int, int]]


def patch_edges(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    readout: Readout,
    edges: Iterable[tuple[int, int]],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> EdgePatching:
    """Run the corrupted input with one attention edge at its probability in the clean run, a forward pass for each.

        recovery = (M_patched − M_corrupt) / (M_clean − M_corrupt): 0 is the corrupted run, 1 the clean one

    The rest of the edge's row keeps its proportions, as `Do.patch_edges` has it; the values stay the corrupted run's.

    Args:
        model, clean, corrupt, readout, layers, heads, progress: as in `patch`.
        edges: (row, col), which count the real tokens of each sequence from 0.

    Returns:
        EdgePatching.

    Raises:
        NotImplementedError, TypeError: as in `patch`.
        ValueError: an unknown layer or head, no edges, one that no layer has or that the mask forbids, inputs whose
            tokens do not match, M_clean = M_corrupt, or a readout of another shape.

    Source: as `patch`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> clean, corrupt = ({"input_ids": torch.tensor([ids])} for ids in ([5, 6, 7], [5, 8, 7]))
        >>> readout = lambda outputs: outputs.last_hidden_state[:, 0, 0]
        >>> patch_edges(BertModel(small), clean, corrupt, readout, [(0, 1), (2, 1)]).recovery.shape
        torch.Size([1, 2, 2, 1])
    """
    edges = list(pairs(edges))
    if min(map(min, edges)) < 0:
        raise ValueError(f"edges must count from 0, got {min(edges, key=min)}")
    right, wrong = (Trial(model, inputs, readout) for inputs in (clean, corrupt))
    numbers = chosen_layers(model, layers)
    shares: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int, call: AttentionCall) -> None:
        shares[layer] = _shares(call, edges)

    with using(model):
        m_clean, m_corrupt, source = both_runs(right, wrong, numbers, see)
        heads = chosen("heads", heads, source.heads(), 0) or list(range(source.heads()))
        plans = {}
        for place, layer in enumerate(numbers):
            c, there = shares[layer]
            for m, head in enumerate(heads):
                for n in there.nonzero()[:, 0].tolist() if head < c.shape[1] else ():
                    plans[place, m, n] = Do.patch_edges(c[..., n : n + 1], edges=[edges[n]], heads=head, layers=layer)
        if missing := [edge for n, edge in enumerate(edges) if not any(there[n] for _, there in shares.values())]:
            raise ValueError(f"edges must lie among the tokens, got {missing}")
        patched = wrong.grid(plans, (len(numbers), len(heads), len(edges)), progress)
    recovery = (patched - m_corrupt) / (m_clean - m_corrupt)
    return EdgePatching(m_clean, m_corrupt, patched, recovery, numbers, heads, edges)


def _shares(call: AttentionCall, edges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The probabilities of edges, [B, H, edges], and which of them lie among the tokens of some sequence, [edges]."""
    start, stop, first, offset = call.intervals
    B, H, T, _ = call.q.shape
    filled = (stop > start).expand(B, -1)
    origin = torch.where(filled, first, torch.iinfo(torch.int32).max).amin(1).long()
    rows, keys = (origin[:, None] + x for x in torch.tensor(edges, device=origin.device).T)
    rows = rows - offset
    there = (rows < T) & (keys < call.k.shape[2])
    rows, keys = rows.clamp(0, T - 1), keys.clamp(0, call.k.shape[2] - 1)
    there &= filled.gather(1, rows)
    each, at = rows.unique(return_inverse=True)
    A = attention_rows(call.q, call.k, each, **call.options())
    b, h = torch.arange(B, device=at.device)[:, None, None], torch.arange(H, device=at.device)[:, None]
    return A[b, h, at[:, None], keys[:, None]], there.any(0)

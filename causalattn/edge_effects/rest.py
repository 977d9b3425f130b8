"""The edge that holds most of its row, from the row without it: 1 − p and v_j − o cancel, what is left does not."""

import math

import torch
from torch import Tensor

from .._backend import use_triton
from .._checks import Logits
from .._tiles import LN2, LOG2E
from ..attention.forward import attend_torch
from .edit import divergence, edit_of, moved_share, scaled

# a row's edge of p above this is taken from the rest; every pass finds it as the one of p > 0.5, whatever it rounds
DOMINANT = 0.55


@torch.library.custom_op("causalattn::attention_rest", mutates_args=())
def attend_rest(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start: Tensor,
    stop: Tensor,
    offset: int,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    ceiling: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, pivot and largest as of `attend`, of each row's scores up to ceiling [B, H, T], which is in base 2.

    Rows whose ceiling is ∞ give anything.
    """
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, sink)
    if use_triton(backend, q):
        from ..kernels.attention.forward import attention_fwd

        out, _, pivot, largest, _ = attention_fwd(q, k, v, *logits, None, ceiling)
    else:
        out, _, pivot, largest, _ = attend_torch(q, k, v, logits, ceiling=ceiling)
    return out, pivot, largest


@attend_rest.register_fake
def _(q, k, v, start, stop, offset, bias, slopes, scale, softcap, sink, ceiling, backend):
    out = q.new_empty(0) if v is None else v.new_empty(*q.shape[:3], v.shape[3])
    return out, torch.empty_like(ceiling), torch.empty_like(ceiling)


def ceiling_of(pivot: Tensor, largest: Tensor) -> Tensor:
    """The score, in base 2, above which a row's dominant edge lies: ∞ where there is none."""
    return torch.where(largest > DOMINANT, pivot - torch.log2(2 * largest), torch.inf)


def dominant_effects(
    out: Tensor,
    pivot: Tensor,
    rest: tuple[Tensor, Tensor, Tensor],
    sink: Tensor | None,
    readout: Tensor | None,
    strength: float,
    measure: str,
) -> Tensor:
    """The effect of each row's dominant edge, from what `attend_rest` gives of the row without it and without a sink.

    With q = 1 − p and r the output without the edge, λ on the edge is −λ on all the others together: the output moves
    by w / (1 + w)·(r − o) with w = q·(e^−λ − 1), and the divergence is that of one edge of probability q.
    """
    rest, rest_pivot, rest_largest = rest
    others = torch.where(rest_largest > 0, rest_pivot.double() - torch.log2(rest_largest.double()), -torch.inf)
    share = 1.0
    if sink is not None:
        with_sink = torch.logaddexp2(others, sink.double()[:, None] * LOG2E)
        # a sink of −∞ beside no other key
        share = torch.exp2(others - with_sink).nan_to_num(0)
        others = with_sink
    odds = pivot.double() - others
    log2_rest = -(odds.clamp(min=0) + torch.log2(1 + torch.exp2(-odds.abs())))
    if measure == "kl":
        effect = _divergence_of_rest(log2_rest, -strength)
    else:
        move = out.double() - rest.double() * (share[..., None] if sink is not None else 1.0)
        size = torch.linalg.vector_norm(move, dim=-1) if readout is None else (readout.double() * move).sum(-1)
        moved = _moved_by_rest(log2_rest, -strength)
        effect = moved.abs() * size if readout is None else -moved * size
    return effect.to(pivot.dtype)


def _moved_by_rest(log2_rest: Tensor, strength: float) -> Tensor:
    if strength == math.inf:
        return torch.ones_like(log2_rest)
    edit = edit_of(strength)
    return moved_share(scaled(log2_rest.clone(), edit), edit)


def _divergence_of_rest(log2_rest: Tensor, strength: float) -> Tensor:
    if strength == math.inf:
        return -log2_rest * LN2
    edit = edit_of(strength)
    return divergence(scaled(log2_rest.clone(), edit), log2_rest, edit)

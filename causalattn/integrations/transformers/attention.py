"""The attention function that transformers calls in every layer.

Outputs stay what they were: a plain full or causal layer, and a single query, go through the SDPA call transformers
makes; any other layer goes through causalattn.attention. Statistics are computed only for whoever asked:
output_attentions=True, or a recorder.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..._checks import resolve_logits
from ...attention import attention
from ...attention.forward import attend
from ...attention.intervene import Inputs, operate
from ...interventions.context import Running, running
from ...masks import Intervals
from ...statistics import AttentionStats, attention_stats
from .masks import ModelMask, dense_mask, unmasked


class AttentionCall(NamedTuple):
    """What one layer's attention was computed from: q [B, H, T, D] and k, v [B, H_kv, S, ·] after position encoding.

    intervals has padded queries empty; last [B or 1, T] is one past the last real key of the row's own sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    intervals: Intervals
    last: Tensor
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sink: Tensor | None

    def options(self) -> dict:
        """The keyword arguments that every operator of causalattn takes for these scores."""
        options = {"mask": self.intervals, "bias": self.bias, "scale": self.scale}
        return options | {"softcap": self.softcap, "sink": self.sink}


Recorder = Callable[[nn.Module, AttentionCall], AttentionStats | None]

recorder: ContextVar[Recorder | None] = ContextVar("causalattn_recorder", default=None)

Watcher = Callable[[nn.Module, AttentionCall, Tensor], None]

# sees each layer's heads too, [B, T, H, V] before the output projection, with their gradient
watcher: ContextVar[Watcher | None] = ContextVar("causalattn_watcher", default=None)


Takeover = Callable[[nn.Module, Tensor, Tensor, Tensor, float | None, dict], Tensor]

# computes each layer's heads, [B, T, H, V], in place of what follows: its tokens are not all here
takeover: ContextVar[Takeover | None] = ContextVar("causalattn_takeover", default=None)


class Place(NamedTuple):
    """The number of an attention module's layer, None for cross-attention, and those of all layers of its model."""

    layer: int | None
    layers: tuple[int, ...]


# the attention modules of models that were switched over
places: WeakKeyDictionary[nn.Module, Place] = WeakKeyDictionary()


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, AttentionStats | None]:
    """Return the layer's output [B, T, H, V] and, where somebody asked, its AttentionStats."""
    _refuse(module, kwargs)
    attend_elsewhere = takeover.get()
    if attend_elsewhere is not None:
        return attend_elsewhere(module, query, key, value, scaling, kwargs), None
    mask = _mask_of(module, query, key, attention_mask, kwargs)
    softcap, sink = kwargs.get("softcap"), kwargs.get("s_aux")
    call = AttentionCall(query, key, value, mask.statistics, mask.last, mask.bias, scaling, softcap, sink)
    plan = running.get()
    layer = None if plan is None else _layer(module, plan)
    if layer is not None and plan.plan.at(layer):
        if dropout > 0:
            raise NotImplementedError(f"{type(module).__name__}: dropout must be 0 under a do, got {dropout}")
        out = _intervened(module, layer, call, mask.outputs, plan).transpose(1, 2).contiguous()
    elif softcap is None and sink is None and (mask.plain is not None or query.shape[2] == 1):
        out = _sdpa(module, query, key, value, mask, scaling, dropout)
    else:
        if dropout > 0:
            raise NotImplementedError(
                f"{type(module).__name__}: dropout must be 0 unless attention is plainly full or causal, got {dropout}"
            )
        options = {"bias": mask.bias, "scale": scaling, "softcap": softcap, "sink": sink}
        out = attention(query, key, value, mask=mask.outputs, **options).out.transpose(1, 2).contiguous()
    watch = watcher.get()
    if watch is not None:
        watch(module, call, out)
    return out, _statistics(module, call, kwargs)


def _intervened(module: nn.Module, layer: int, call: AttentionCall, outputs: Intervals, plan: Running) -> Tensor:
    """The layer's output [B, H, T, V] under the plan in force; outputs is the model's own mask."""
    options = {"bias": call.bias, "scale": call.scale, "softcap": call.softcap, "sink": call.sink}
    logits = resolve_logits(call.q, call.k, outputs, alibi_slopes=None, **options)
    out, lse, *_ = attend(call.q, call.k, call.v, *logits, None, "auto")
    surgeries, matched = plan.resolve(module, layer, call.q, call.k, call.intervals, logits.bias)
    out, _, moved = operate(surgeries, Inputs(call.q, call.k, call.v, logits, "auto"), out, lse)
    plan.receipt.note(layer, plan.plan.at(layer), matched, moved)
    return out


def _layer(module: nn.Module, plan: Running) -> int | None:
    """What number the plan in force knows a module by; None for cross-attention."""
    if module not in places:
        return plan.layer(module)
    layer, layers = places[module]
    plan.check(layers)
    return layer


def _refuse(module: nn.Module, kwargs: dict) -> None:
    for name in ("position_bias", "cache", "block_table"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__}: attention with {name} is not supported")


def _mask_of(module: nn.Module, query: Tensor, key: Tensor, attention_mask, kwargs: dict) -> ModelMask:
    T, S = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Tensor):
        return dense_mask(attention_mask, T, S)
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return unmasked(T, S, causal=causal and T > 1, window=kwargs.get("sliding_window"), device=query.device)
    if attention_mask.keys != S or attention_mask.outputs.start.shape[1] != T:
        made = [attention_mask.outputs.start.shape[1], attention_mask.keys]
        raise ValueError(f"{type(module).__name__}: the mask was made for [T, S] = {made}, got {[T, S]}")
    return attention_mask


def _sdpa(module, query, key, value, mask: ModelMask, scaling, dropout: float) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dense = None
    if mask.plain is None:  # of one query, dense is O(S)
        dense = mask.outputs.to_dense(key.shape[2])[:, None]
        if mask.bias is not None:
            dense = mask.bias.masked_fill(~dense, -torch.inf).to(query.dtype)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": mask.plain == "causal"}
    return sdpa_attention_forward(module, query, key, value, dense, **options)[0]


def _statistics(module: nn.Module, call: AttentionCall, kwargs: dict) -> AttentionStats | None:
    record = recorder.get()
    if record is None and not (kwargs.get("output_attentions") or _outputs_attentions()):
        return None
    with torch.no_grad():
        call = AttentionCall(*(x.detach() if isinstance(x, Tensor) else x for x in call))
        return attention_stats(call.q, call.k, **call.options()) if record is None else record(module, call)


def _outputs_attentions() -> bool:
    """Whether the running forward collects attentions; some models take the flag out of what their layers see."""
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and not {"attentions", "cross_attentions"}.isdisjoint(collected)

"""How far each token reaches through the layers by attention alone: rows of the product of their matrices."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .._backend import accumulator
from ..attention import attention
from ..integrations.transformers.attention import AttentionCall

Calls = Mapping[int, AttentionCall]


def rollout(calls: Calls, position: int | Tensor, *, layers: Iterable[int] | None = None) -> Tensor:
    """Roll attention out from one position: the weight of every input token there, were attention all there is.

        x = e_position, then from the last layer to the first x ← ½(Aᵀx + x), A the mean of the layer's heads

    It is one row of Π_l ½(A_l + I), in O(T) memory: Aᵀx is a gradient of attention with respect to its values. Values,
    the output projection and the MLPs have no say in it, so it is a picture of routing and no effect on any output.

    Args:
        calls: {layer: AttentionCall} of `capture`, as many keys as queries.
        position: of the row: a number, which counts padding and may be negative, or one a sequence, [B].
        layers: which of the calls to go through, in ascending order; all by default.

    Returns:
        [B, S], float32 (float64 for float64 calls), on the calls' device. A row sums to 1, to less where a learned sink
        takes part of the attention.

    Raises:
        TypeError: calls is no mapping of AttentionCalls.
        ValueError: no such layer, a position out of range or of padding, or keys that are not the queries.

    Source: Abnar & Zuidema 2020 (arXiv:2005.00928), heads averaged, residual weight ½.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from causalattn import capture
        >>> small = BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> calls = capture(BertModel(small), {"input_ids": torch.tensor([[5, 6, 7]])})
        >>> row = rollout(calls, 0)
        >>> row.shape, round(row.sum().item(), 5)
        (torch.Size([1, 3]), 1.0)
    """
    path = _path(calls, layers)
    real = _real(path[-1])
    B, T = real.shape
    rows = torch.as_tensor(position, device=real.device)
    if rows.is_floating_point() or rows.shape not in ((), (B,)):
        raise ValueError(f"position must be one number, or {B}, one a sequence, got {position}")
    if not bool(((rows >= -T) & (rows < T)).all()):
        raise ValueError(f"position must be from {-T} to {T - 1}, got {position}")
    chosen = torch.nn.functional.one_hot(rows.expand(B) % T, T).bool()
    if not bool((chosen & real).any(-1).all()):
        sequence = int((chosen & real).any(-1).int().argmin())
        raise ValueError(f"position {position} is padding in sequence {sequence}")
    return _descend(path, chosen)


def token_influence(calls: Calls, *, rows: Iterable[int] | None = None, layers: Iterable[int] | None = None) -> Tensor:
    """Share out the outputs of a model among its input tokens: the mean of `rollout` over rows.

        influence_j = mean over the sequence's rows i of rollout(i)_j

    Args:
        calls, layers: as in `rollout`.
        rows: positions whose outputs matter, which count padding and may be negative; every real token by default.
            Padding among them is passed over.

    Returns:
        [B, S], as in `rollout`. It sums to 1 where no sink takes part; it is 0 for a sequence without such a row.

    Raises:
        TypeError: calls is no mapping of AttentionCalls.
        ValueError: no such layer, rows none or out of range, or keys that are not the queries.

    Source: as `rollout`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from causalattn import capture
        >>> small = BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        >>> calls = capture(BertModel(small), {"input_ids": torch.tensor([[5, 6, 7]])})
        >>> token_influence(calls, rows=[0, 2]).shape
        torch.Size([1, 3])
    """
    path = _path(calls, layers)
    chosen = _real(path[-1])
    T = chosen.shape[1]
    if rows is not None:
        rows = list(rows)
        if not rows or not all(-T <= row < T for row in rows):
            raise ValueError(f"rows must be numbers from {-T} to {T - 1}, got {rows}")
        kept = torch.zeros_like(chosen)
        kept[:, rows] = True
        chosen = chosen & kept
    return _descend(path, chosen)


def _path(calls: Calls, layers: Iterable[int] | None) -> list[AttentionCall]:
    if not isinstance(calls, Mapping) or not all(isinstance(call, AttentionCall) for call in calls.values()):
        raise TypeError(
            f"calls must be what capture returns, layer numbers to AttentionCalls, got {type(calls).__name__}"
        )
    chosen = set(calls) if layers is None else set(layers)
    if not chosen or not chosen <= set(calls):
        raise ValueError(f"layers must be among {sorted(calls)}, got {sorted(chosen - set(calls))}")
    path = [calls[layer] for layer in sorted(chosen)]
    for call in path:
        T, S = call.q.shape[2], call.k.shape[2]
        if T != S or T != path[0].q.shape[2]:
            raise ValueError(f"rollout needs the same tokens as queries and keys in every layer, got T = {T}, S = {S}")
    return path


def _real(call: AttentionCall) -> Tensor:
    """Which rows are no padding: [B, T]."""
    return (call.intervals.stop > call.intervals.start).expand(call.q.shape[0], -1)


def _descend(path: list[AttentionCall], chosen: Tensor) -> Tensor:
    """From the mean of the chosen rows down: [B, S]."""
    x = chosen.to(accumulator(path[-1].q))
    x = x / x.sum(-1, keepdim=True).clamp(min=1)
    for call in reversed(path):
        x = (_received(call, x) + x) / 2
    return x


def _received(call: AttentionCall, x: Tensor) -> Tensor:
    """Aᵀx with A the mean of the heads: the gradient of attention with respect to v is Aᵀ times its cotangent."""
    q, k = (tensor.detach().to(accumulator(tensor)) for tensor in (call.q, call.k))
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        v = q.new_zeros(*k.shape[:3], 1).requires_grad_()
        out = attention(q, k, v, **call.options()).out
        cotangent = (x[:, None, :, None] / q.shape[1]).expand_as(out)
        (received,) = torch.autograd.grad(out, v, cotangent)
    return received.sum((1, 3))

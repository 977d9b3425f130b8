"""Probabilities of chosen queries, as the forward pass writes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import check_probs_dtype, check_qk, resolve_logits, resolve_mask
from ..interventions.edges import surgeries_of
from ..interventions.plan import Plan
from ..masks import Intervals, Mask
from .forward import attend
from .intervened_rows import edited_rows


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor | Sequence[int],
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    do: Plan | None = None,
    probs_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the probabilities A_ij of chosen queries i and every key j, in O(R·S) memory.

    A_ij = exp(S_ij − lse_i), with S and lse as in `attention`; each row is what `attention(return_probs=True)` has.

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H.
        rows: the queries i, R of them in any order and with repeats, counted from 0 and negative ones from the end. A
            sequence is checked, and so is a tensor on the CPU; the values of a CUDA tensor cannot be read without
            waiting for it, so there one out of range gives the nearest row. torch.compile checks no tensor's values.
            For a CUDA graph they must be on q's device already.
        causal, mask, bias, alibi_slopes, scale, softcap, sink, do: as in `attention`. Slopes and interventions become a
            dense bias here, of the output's size.
        probs_dtype: A's dtype, q's (the default) or float32 (float64 for float64 q).
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        A of the chosen rows, [B, H, R, S]; 0 where a row may not attend. Differentiable as `attention` is.

    Raises:
        ValueError: a row out of range, or a shape, device, mask, softcap or intervention that does not fit.
        TypeError: rows that are not integers, a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); computed online as in Dao et al. 2022 (arXiv:2205.14135).

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> attention_rows(q, k, [-1], causal=True)
        tensor([[[[0.3302, 0.6698]]]])
    """
    check_qk(q, k)
    dtype = check_probs_dtype(probs_dtype, q)
    rows = _resolve_rows(rows, q)
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    if do is not None:
        return edited_rows(surgeries_of(do, q, k, logits), q, k, logits, rows, dtype, backend)[0]
    logits = logits.of_rows(rows, k.shape[2], accumulator(q))
    # indexing, whose gradient adds up a repeated row in order
    return attend(q[:, :, rows], k, None, *logits, dtype, backend)[4]


def _resolve_rows(rows: Tensor | Sequence[int], q: Tensor) -> Tensor:
    """rows as positions 0 … T − 1 on q's device, [R] int64."""
    T = q.shape[2]
    if isinstance(rows, Tensor) and rows.is_cuda and not q.is_cuda:
        raise ValueError(f"rows must be on q's device {q.device}, got {rows.device}")
    try:
        chosen = torch.as_tensor(rows)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise TypeError(f"rows must be a sequence of integers, got {type(rows).__name__}") from None
    if chosen.numel() == 0:
        chosen = chosen.long()
    if chosen.ndim != 1:
        raise ValueError(f"rows must have shape [R], got {list(chosen.shape)}")
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(f"rows must be integers, got {str(chosen.dtype).removeprefix('torch.')}")
    if isinstance(rows, Tensor):
        values = [] if rows.is_cuda or torch.compiler.is_compiling() else rows.tolist()
    else:
        values = rows
    wrong = [i for i in values if not -T <= i < T]
    if wrong or (T == 0 and chosen.numel()):
        raise ValueError(f"rows must lie in {-T}…{T - 1}, got {wrong[0] if wrong else 'some of an empty q'}")
    chosen = chosen.to(q.device, torch.int64)
    return torch.where(chosen < 0, chosen + T, chosen).clamp(0, max(T - 1, 0))

"""Probabilities of chosen queries, as the forward pass writes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import check_probs_dtype, check_qk, resolve_logits, resolve_mask, resolve_rows
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
    rows = resolve_rows("rows", rows, q)
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    if do is not None:
        return edited_rows(surgeries_of(do, q, k, logits), q, k, logits, rows, dtype, backend)[0]
    logits = logits.of_rows(rows, k.shape[2], accumulator(q))
    # indexing, whose gradient adds up a repeated row in order
    return attend(q[:, :, rows], k, None, *logits, dtype, backend)[4]

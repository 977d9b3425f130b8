"""Covariances and correlations between the rows of an attention matrix, from q and k, without the matrix."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import Logits, check_qk, check_v, resolve_logits, resolve_mask, resolve_rows
from ..attention.forward import attend
from ..masks import Intervals, Mask
from .operators import covariance_of_attention, covariance_of_rows
from .rows import FAR

__all__ = ["attention_correlation", "attention_covariance"]


def attention_covariance(
    q: Tensor,
    k: Tensor,
    *,
    v: Tensor | None = None,
    heads: Iterable[int] | None = None,
    sum_heads: bool = False,
    tokens: Tensor | Sequence[int] | None = None,
    center: bool = False,
    condition_on_sink: bool = False,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    backend: Backend = "auto",
) -> Tensor:
    """Return C = A Aᵀ, the inner products of the rows of an attention matrix that is never held whole.

        C_ij = Σ_k A_ik A_jk, A as in `attention`;  with v, C = Z Zᵀ of its outputs Z = A V

    Only tiles on and above the diagonal are multiplied, over the keys that both rows may attend, and mirrored. Beside
    C it takes two panels of 1024 rows of A (2048 on a GPU), in dtype.

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H.
        v: values, [B, H_kv, S, V], for the covariance of the outputs in place of that of the rows of A.
        heads: head numbers, distinct, negative ones from the end; all by default. What they need is copied.
        sum_heads: Σ_h C_h over the heads.
        tokens: the queries i, n of them as in `attention_rows`; all T by default. Slopes become a dense bias here, of
            [H, n, S].
        center: subtract from each row of A its mean over the keys that count, forbidden ones among them as 0: those
            from the first to the last that some query of the sequence may attend, all S where nothing is padded. So
            C is (S − 1)·numpy.cov(A), and no row is short of keys any more: the products are over all of them. With v,
            from each row of Z its mean over the V channels.
        condition_on_sink: given the first real key of each row's own sequence or segment: forbid it, by masking, and
            renormalise. The row of that token under a causal mask is then empty.
        causal, mask, bias, alibi_slopes, scale, softcap, sink: as in `attention`. What `sink` takes is no key's.
        dtype: float64, in which the products of float32 P are exact, or float32 where q is no float64.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        C in dtype, without gradient, symmetric to the last bit: [B, H, n, n], or [B, n, n] with sum_heads. A row that
        may attend nothing has covariance 0. A NaN in q or k reaches the rows and columns of the queries that may
        attend it.

    Raises:
        ValueError: heads or tokens out of range, heads that repeat, a sink key that is not the leftmost of a row, or a
            shape, device, mask or softcap that does not fit.
        TypeError: a dtype that does not fit, heads or tokens that are no integers, or float64 with backend="triton".
        NotImplementedError: an input that requires grad where gradients are recorded, or backend="triton" without
            the triton package.

    Source: Rohekar, Gurwicz and Nisimov 2023 (arXiv:2310.20307).

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> attention_covariance(q, k, causal=True, dtype=torch.float32)
        tensor([[[[1.0000, 0.3302],
                  [0.3302, 0.5576]]]])
    """
    chosen = _Chosen(heads, sum_heads, tokens, center, condition_on_sink, False, dtype)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    return _covariance(q, k, v, chosen, causal, mask, options, backend)


def attention_correlation(
    q: Tensor,
    k: Tensor,
    *,
    v: Tensor | None = None,
    heads: Iterable[int] | None = None,
    sum_heads: bool = False,
    tokens: Tensor | Sequence[int] | None = None,
    center: bool = False,
    condition_on_sink: bool = False,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    backend: Backend = "auto",
) -> Tensor:
    """Return R_ij = C_ij / √(C_ii C_jj) of `attention_covariance`, the correlations that causal discovery tests.

    The scale of a row cancels: of one head without v, R comes from P = exp(S − max_j S) and no denominator enters it.
    Not centred, unless told so, R is a cosine, and 0 ≤ R where v is not given.

    Args:
        q, k, v, heads, sum_heads, tokens, center, condition_on_sink, dtype, backend: as in `attention_covariance`;
            sum_heads is the correlation of the sum.
        causal, mask, bias, alibi_slopes, scale, softcap, sink: as in `attention`.

    Returns:
        R in dtype, without gradient, symmetric to the last bit, its diagonal exactly 1: [B, H, n, n], or [B, n, n]
        with sum_heads. A row that may attend nothing (padding, the sink's own under condition_on_sink and a causal
        mask) is 0 throughout, on the diagonal too: nothing says that it is related to anything, and the 0 on the
        diagonal says that it is empty. |R| may exceed 1 by a rounding. Under center the row of a constant A, whose
        deviations are roundings, has correlations of roundings.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `attention_covariance`.

    Source: Rohekar, Gurwicz and Nisimov 2023 (arXiv:2310.20307).

    Example:
        >>> q = k = torch.eye(2).view(1, 1, 2, 2)
        >>> attention_correlation(q, k, causal=True, dtype=torch.float32)
        tensor([[[[1.0000, 0.4422],
                  [0.4422, 1.0000]]]])
    """
    chosen = _Chosen(heads, sum_heads, tokens, center, condition_on_sink, True, dtype)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    return _covariance(q, k, v, chosen, causal, mask, options, backend)


class _Chosen(NamedTuple):
    """What of a covariance is asked for."""

    heads: Iterable[int] | None
    sum_heads: bool
    tokens: Tensor | Sequence[int] | None
    center: bool
    condition_on_sink: bool
    correlation: bool
    dtype: torch.dtype


def _covariance(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    chosen: _Chosen,
    causal: bool,
    mask: Mask | Intervals | None,
    options: dict[str, Tensor | float | None],
    backend: Backend,
) -> Tensor:
    check_qk(q, k)
    if v is not None:
        check_v(v, k)
    check_dtype(chosen.dtype, q)
    intervals = resolve_mask(q, k, mask, causal)
    logits = resolve_logits(q, k, intervals, **options)
    inputs = (q, k, v, logits.bias, logits.sink)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise NotImplementedError(
            f"{'attention_correlation' if chosen.correlation else 'attention_covariance'} has no gradient: "
            "pass q.detach() and k.detach(), and multiply the rows of attention_rows"
        )
    if chosen.condition_on_sink:
        _check_first(intervals)
        intervals = intervals.without_first()
        logits = logits._replace(start=intervals.start, stop=intervals.stop)
    hull = _hull(intervals) if chosen.center and v is None else None
    if chosen.heads is not None:
        q, k, v, logits = _of_heads(_resolve_heads(chosen.heads, q.shape[1]), q, k, v, logits)
    if chosen.tokens is not None:
        rows = resolve_rows("tokens", chosen.tokens, q)
        logits = logits.of_rows(rows, k.shape[2], accumulator(q))
        q = q[:, :, rows]
    last = (chosen.sum_heads, chosen.correlation, chosen.dtype, backend)
    if v is not None:
        out = attend(q, k, v.to(accumulator(v)), *logits, None, backend)[0]
        return covariance_of_rows(out, chosen.center, *last)
    ordered = chosen.tokens is None and (causal or (isinstance(mask, Mask) and mask.is_causal()))
    _, _, pivot, largest, _ = attend(q, k, None, *logits, None, backend)
    unit = None if chosen.correlation and not chosen.sum_heads else largest
    return covariance_of_attention(q, k, *logits[:-1], pivot, unit, hull, ordered, *last)


def check_dtype(dtype: torch.dtype, x: Tensor) -> None:
    """A C of x's rows is float64, or float32 unless x is float64."""
    narrow = dtype == torch.float32 and x.dtype != torch.float64
    if dtype != torch.float64 and not narrow:
        allowed = "float64" if x.dtype == torch.float64 else "float64 or float32"
        raise TypeError(f"dtype must be {allowed}, got {str(dtype).removeprefix('torch.')}")


def _check_first(intervals: Intervals) -> None:
    if intervals.first.is_cuda or torch.compiler.is_compiling():
        return
    inside = (intervals.start < intervals.first) & (intervals.first < intervals.stop)
    if inside.any():
        raise ValueError(
            "condition_on_sink needs the first real key of a row to be its leftmost key, "
            f"got a row with keys before it: {int(inside.any(0).nonzero()[0, 0])}"
        )


def _hull(intervals: Intervals) -> Tensor:
    """The first and one past the last key that some query of a sequence may attend, [B or 1, 2] int32."""
    start, stop = intervals.start, intervals.stop
    # one more column: there may be no query
    low = F.pad(torch.where(stop > start, start, FAR), (0, 1), value=FAR).amin(1)
    high = F.pad(stop, (0, 1)).amax(1)
    return torch.stack([torch.minimum(low, high), high], 1)


def _resolve_heads(heads: Iterable[int], H: int) -> list[int]:
    try:
        numbers = list(heads)
    except TypeError:
        raise TypeError(f"heads must be a sequence of integers, got {type(heads).__name__}") from None
    for h in numbers:
        if not isinstance(h, int) or isinstance(h, bool):
            raise TypeError(f"heads must be a sequence of integers, got one of {type(h).__name__}")
        if not -H <= h < H:
            raise ValueError(f"heads must lie in {-H}…{H - 1}, got {h}")
    numbers = [h % H for h in numbers]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"heads must be distinct and at least one, got {numbers}")
    return numbers


def _of_heads(
    numbers: list[int], q: Tensor, k: Tensor, v: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor, Tensor | None, Logits]:
    """What some heads take, a key head for each of them unless one serves all."""
    group = q.shape[1] // k.shape[1]
    keys = [h // group for h in numbers]

    def of(x: Tensor | None, chosen: list[int], axis: int = 1) -> Tensor | None:
        if x is None or x.shape[axis] == 1:
            return x
        # slices: a list of numbers would have to reach a GPU first
        return torch.stack([x.select(axis, h) for h in chosen], axis)

    logits = logits._replace(
        bias=of(logits.bias, numbers), slopes=of(logits.slopes, numbers), sink=of(logits.sink, numbers, 0)
    )
    return of(q, numbers), of(k, keys), of(v, keys), logits

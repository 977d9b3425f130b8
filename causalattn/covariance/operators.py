"""The registered operators: covariances of attention from q and k, and of rows at hand."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._backend import use_triton
from .._checks import Logits
from .._tiles import heads
from .gram import MatrixRows, Rows, add_products, normalize, panel_dtype
from .rows import HeadRows, KernelRows


@torch.library.custom_op("causalattn::covariance", mutates_args=())
def covariance_of_attention(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    stop: Tensor,
    offset: int,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    pivot: Tensor,
    unit: Tensor | None,
    hull: Tensor | None,
    causal: bool,
    sum_heads: bool,
    correlation: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """C of P_ij = exp2(score − pivot_i)·unit_i, each row less its mean over the keys of hull [B or 1, 2] if given.

    causal: no row i attends a key after offset + i, which on a GPU cannot be read from start and stop.
    """
    logits = Logits(start, stop, offset, bias, slopes, scale, softcap, None)
    kernel = use_triton(backend, q)
    B, H, T, _ = q.shape
    C = q.new_empty((B, T, T) if sum_heads else (B, H, T, T), dtype=dtype)
    for b, h, rows in _every_head(q, k, logits, pivot, unit, hull, causal, kernel):
        head = C[b] if sum_heads else C[b, h]
        add_products(head, rows, panel_dtype(q, dtype, kernel), sum_heads and h > 0)
    return _finished(C, correlation)


@covariance_of_attention.register_fake
def _(q, k, start, stop, offset, bias, slopes, scale, softcap, pivot, unit, hull, causal, sum_heads, correlation, dtype,
      backend):  # fmt: skip
    B, H, T, _ = q.shape
    return q.new_empty((B, T, T) if sum_heads else (B, H, T, T), dtype=dtype)


@torch.library.custom_op("causalattn::covariance_of_rows", mutates_args=())
def covariance_of_rows(
    x: Tensor, center: bool, sum_heads: bool, correlation: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    """X Xᵀ of x [B, H, T, W], each row less its mean with center."""
    kernel = use_triton(backend, x)
    B, H, T, _ = x.shape
    C = x.new_empty((B, T, T) if sum_heads else (B, H, T, T), dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for b in range(B):
            for h in range(H):
                rows = MatrixRows(x[b, h], center, kernel)
                head = C[b] if sum_heads else C[b, h]
                add_products(head, rows, panel_dtype(x, dtype, kernel), sum_heads and h > 0)
    return _finished(C, correlation)


@covariance_of_rows.register_fake
def _(x, center, sum_heads, correlation, dtype, backend):
    B, H, T, _ = x.shape
    return x.new_empty((B, T, T) if sum_heads else (B, H, T, T), dtype=dtype)


def _every_head(
    q: Tensor, k: Tensor, logits: Logits, pivot: Tensor, unit: Tensor | None, hull: Tensor | None, causal: bool,
    kernel: bool,
) -> Iterator[tuple[int, int, Rows]]:  # fmt: skip
    """Every head's rows with its place, autocast off while they are gone through."""

    def hull_of(b: int) -> Tensor | None:
        return None if hull is None else hull[b if len(hull) > 1 else 0]

    if not kernel:
        for head in heads(q, k, logits):
            yield head.b, head.h, HeadRows(head, pivot, unit, hull_of(head.b))
        return
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                yield b, h, KernelRows(q, k, logits, pivot, unit, hull_of(b), causal, b, h)


def _finished(C: Tensor, correlation: bool) -> Tensor:
    if correlation:
        for c in C.flatten(0, -3):
            normalize(c)
    return C

"""What a user would run instead: eager torch, SDPA, and the identities that trick stock kernels into a statistic."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_probs(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    x = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        x = x.masked_fill_(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1), -math.inf)
    return torch.softmax(x, -1, dtype=torch.float32)


def eager_dag_score(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    A = eager_probs(q, k, causal)
    return A.tril(-1).sum((-1, -2)) / A.sum((-1, -2))


def eager_row_statistics(q: Tensor, k: Tensor, causal: bool = False) -> dict[str, Tensor]:
    A = eager_probs(q, k, causal)
    positions = torch.arange(A.shape[-1], device=A.device)
    return {
        "max": A.amax(-1),
        "entropy": torch.special.entr(A).sum(-1),
        "sum_sq": A.square().sum(-1),
        "below": A.tril(-1).sum(-1),
        "diag": A.diagonal(dim1=-2, dim2=-1),
        "distance": (A * (positions[:, None] - positions).abs()).sum(-1),
        "columns": A[..., :1],
    }


def dense_dag_score(A: Tensor) -> Tensor:
    return A.tril(-1).sum((-1, -2)) / A.sum((-1, -2))


def dense_asymmetry(A: Tensor) -> dict[str, Tensor]:
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    d, total = (A - A.mT).flatten(-2), (A + A.mT).flatten(-2)
    frobenius = d.norm(dim=-1)
    return {
        "frobenius": frobenius,
        "ratio": frobenius / total.norm(dim=-1),
        "l1": d.abs().sum(-1),
        "max": d.abs().amax(-1),
        "net_flow": A.sum(-1) - A.sum(-2),
    }


def dense_row_statistics(A: Tensor) -> dict[str, Tensor]:
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    positions = torch.arange(A.shape[-1], device=A.device)
    below = A.tril(-1).sum(-1)
    return {
        "max": A.amax(-1),
        "mass": A.sum(-1),
        "entropy": torch.special.entr(A).sum(-1),
        "sum_sq": A.square().sum(-1),
        "below": below,
        "diag": A.diagonal(dim1=-2, dim2=-1),
        "distance": (A * (positions[:, None] - positions).abs()).sum(-1),
        "columns": A[..., :1],
        "dag_score": below.sum(-1) / A.sum((-1, -2)),
    }


def eager_bytes(q: Tensor, k: Tensor) -> int:
    """What eager must hold at once: the scores and their softmax, float32."""
    return 2 * 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def stock_lse(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of the fused kernel behind SDPA (its own operator: SDPA itself keeps lse to itself)."""
    if q.is_cuda:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def stock_entropy(q: Tensor, k: Tensor) -> Tensor:
    """lse − s·q·Attn(V = k)."""
    attended, lse = stock_lse(q, k, k)
    return lse - (q * attended).sum(-1) * q.shape[-1] ** -0.5


def stock_sum_sq(q: Tensor, k: Tensor) -> Tensor:
    """exp(lse(2s) − 2·lse(s))."""
    scale = q.shape[-1] ** -0.5
    return torch.exp(stock_lse(q, k, k, scale=2 * scale)[1] - 2 * stock_lse(q, k, k, scale=scale)[1])


def stock_dag_score(q: Tensor, k: Tensor) -> Tensor:
    """Mass below from two log-sum-exps; the strict causal one is the causal one of queries moved down a row."""
    full = stock_lse(q, k, k)[1]
    below = stock_lse(q[:, :, 1:], k[:, :, :-1], k[:, :, :-1], causal=True)[1]
    return torch.exp(below - full[:, :, 1:]).sum(-1) / q.shape[2]


def stock_received(q: Tensor, k: Tensor) -> Tensor:
    """dV of SDPA with dO = 1."""
    v = torch.zeros_like(k).requires_grad_()
    F.scaled_dot_product_attention(q, k, v).backward(torch.ones_like(q))
    return v.grad[..., 0]

"""What a user would run instead: eager torch, SDPA, Flex, and identities that trick stock kernels into a statistic."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def eager_probs(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    x = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        x = x.masked_fill_(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1), -math.inf)
    return torch.softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return eager_probs(q, k, causal).to(v.dtype) @ v


def eager_attention_probs(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    A = eager_probs(q, k, causal).to(v.dtype)
    return A @ v, A


def plain_write(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """As many bytes as the probabilities have."""
    return q.new_empty(*q.shape[:3], k.shape[2]).fill_(1)


def eager_rows(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    return eager_probs(q, k, False)[:, :, rows]


def eager_chosen_rows(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """The softmax of the chosen rows alone, written by hand."""
    return eager_probs(q[:, :, rows], k, False)


def eager_topk(q: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return tuple(eager_probs(q, k, False).topk(n))


def eager_map(q: Tensor, k: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """mean and max over cells, of a length that they divide."""
    A, size = eager_probs(q, k, False), q.shape[2] // cells
    return F.avg_pool2d(A, size), F.max_pool2d(A, size)


def eager_edge_effects(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ over rows and columns of p / (1 − p)·‖v_j − o_i‖ and its 16 largest of a row."""
    A = eager_probs(q, k, False)
    effects = torch.cdist(A.to(v.dtype) @ v, v).mul_(A).div_(1 - A)
    return effects.sum(-1), effects.sum(-2), *effects.topk(16)


def eager_entropy_received(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    A = eager_probs(q, k, False)
    return torch.special.entr(A).sum(-1), A.sum(-2)


def eager_asymmetry(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    return dense_asymmetry(eager_probs(q, k, False))


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


def eager_bytes(q: Tensor, k: Tensor, matrices: int = 2) -> int:
    """What eager must hold at once: float32 matrices, the scores and their softmax at least."""
    return 4 * matrices * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def sdpa_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """SDPA by the backend that it chooses itself."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """SDPA by one backend, which raises where it cannot run."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """FlexAttention, compiled for each length by itself."""
    return _compiled_flex()(q, k, v, block_mask=_causal_blocks(q.shape[2], q.device.type) if causal else None)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@functools.cache
def _causal_blocks(T: int, device: str) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def colreduce(q: Tensor, k: Tensor) -> Tensor:
    """flash-colreduce's column sums, in q's dtype."""
    from flash_colreduce import flash_colreduce

    return flash_colreduce(q, k, reduction="sum")


def stock_lse(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of the fused kernel behind SDPA (its own operator: SDPA itself keeps lse to itself)."""
    if q.is_cuda:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def stock_entropy(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """lse − s·q·Attn(V = k)."""
    attended, lse = stock_lse(q, k, k, causal)
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


def linear_loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Linear attention a token at a time; elu + 1 and normalised without decay, plain features with it."""
    if decay is None:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    s, z = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), q.new_zeros(*q.shape[:2], q.shape[3])
    out = torch.empty_like(v)
    for t in range(q.shape[2]):
        if decay is not None:
            kept = decay[:, :, t].exp()
            s = s * (kept[..., None, None] if decay.ndim == 3 else kept[..., None])
        s = s + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (q[:, :, t, None] @ s)[:, :, 0]
        if decay is None:
            z = z + k[:, :, t]
            out[:, :, t] /= (q[:, :, t] * z).sum(-1, keepdim=True)
    return out


def fla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """The same by flash-linear-attention's chunked kernels, which take [B, T, H, D] and features."""
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if decay is None:
        result = chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)
    else:
        chunked = chunk_simple_gla if decay.ndim == 3 else chunk_gla
        result = chunked(q, k, v, decay.transpose(1, 2), scale=1.0)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A selective scan a token at a time, B by Euler's rule as in Mamba."""
    h, out = u.new_zeros(*u.shape[::2], A.shape[1]), torch.empty_like(u)
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        out[:, t] = (h @ C[:, t, :, None])[..., 0]
    return out


def mamba(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same by mamba-ssm, which takes [B, E, T]."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
    return selective_scan_fn(u, delta, A, B, C).transpose(1, 2)


def eager_hopfield(patterns: Tensor, state: Tensor) -> Tensor:
    """One update of a modern Hopfield network, β = d^−½, the associations formed."""
    return torch.softmax(state @ patterns.mT * state.shape[1] ** -0.5, -1) @ patterns


def sdpa_hopfield(patterns: Tensor, state: Tensor) -> Tensor:
    """The same through SDPA, which scales by d^−½."""
    x = patterns[None, None]
    return F.scaled_dot_product_attention(state[None, None], x, x)[0, 0]


def numpy_partial_correlation(R: Tensor, i: Tensor, j: Tensor, given: Tensor) -> np.ndarray:
    """Every test's block gathered, a batched Cholesky factor, its last row."""
    tokens = np.concatenate([given.cpu().numpy(), np.stack([i.cpu().numpy(), j.cpu().numpy()], 1)], 1)
    L = np.linalg.cholesky(R.cpu().numpy()[tokens[:, :, None], tokens[:, None]])
    return L[:, -1, -2] / np.hypot(L[:, -1, -2], L[:, -1, -1])


def torch_partial_correlation(R: Tensor, i: Tensor, j: Tensor, given: Tensor) -> Tensor:
    tokens = torch.cat([given, i[:, None], j[:, None]], 1)
    L = torch.linalg.cholesky(R[tokens[:, :, None], tokens[:, None]])
    return L[:, -1, -2] / torch.hypot(L[:, -1, -2], L[:, -1, -1])


def causality_lab(R: Tensor, i: Tensor, j: Tensor, given: Tensor) -> list[float]:
    """causality-lab's formula, a test at a time: closed forms of no and one other variable, else an inverse."""
    from scipy.stats import norm

    R, found = R.cpu().numpy(), []
    for x, y, S in zip(i.tolist(), j.tolist(), given.tolist(), strict=True):
        if not S:
            r = R[x, y]
        elif len(S) == 1:
            (z,) = S
            r = (R[x, y] - R[x, z] * R[y, z]) / np.sqrt((1 - R[x, z] ** 2) * (1 - R[y, z] ** 2))
        else:
            tokens = [x, y, *S]
            K = np.linalg.inv(R[np.ix_(tokens, tokens)])
            r = -K[0, 1] / np.sqrt(abs(K[0, 0] * K[1, 1]))
        statistic = np.sqrt(768 - len(S) - 3) * abs(0.5 * np.log1p(2 * r / (1 - r)))
        norm.cdf(statistic)
        found.append(r)
    return found


def fisherz(R: Tensor, i: Tensor, j: Tensor, given: Tensor) -> np.ndarray:
    """causal-learn's own test of data with these correlations, a test at a time; |r| from its p."""
    from causallearn.utils.cit import CIT
    from scipy.special import erfcinv

    from causalattn.discovery import surrogate_data

    test = CIT(surrogate_data(R, 100).numpy(), "fisherz")
    p = np.array([test(x, y, S) for x, y, S in zip(i.tolist(), j.tolist(), given.tolist(), strict=True)])
    return np.tanh(erfcinv(p) * math.sqrt(2 / (100 - given.shape[1] - 3)))


def causality_lab_icd(R: Tensor) -> np.ndarray:
    """causality-lab's search with its own tests, of data with these correlations."""
    from causal_discovery_algs.icd import LearnStructICD
    from causal_discovery_utils.cond_indep_tests import CondIndepParCorr

    from causalattn.discovery import surrogate_data

    test = CondIndepParCorr(dataset=surrogate_data(R, 768).numpy(), threshold=0.01)
    search = LearnStructICD(set(range(len(R))), test)
    search.learn_structure()
    return search.graph.get_adj_mat()


def fci(R: Tensor) -> object:
    """causal-learn's search with its own tests, of data with these correlations."""
    from causallearn.search.ConstraintBased.FCI import fci

    from causalattn.discovery import surrogate_data

    return fci(surrogate_data(R, 768).numpy(), "fisherz", 0.01, show_progress=False)[0]

"""Statistics of the attention map from q and k: per row, per column, per token and per head, never the map itself."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._backend import Backend
from .._checks import Logits, check_qk, check_square, resolve_logits, resolve_mask
from ..interventions.edges import surgeries_of
from ..interventions.plan import Plan
from ..masks import Intervals, Mask
from .chosen import chosen_probs
from .intervened import measure_under
from .pairs import pair_statistics
from .received import received as received_pass
from .results import Asymmetry, AttentionStats, asymmetry_of, chosen_keys, column_statistics, diagonal, share, wanted
from .rows import ROWS, row_statistics

ROW_STATISTICS = ("lse", "max", "mass", "entropy", "sum_sq", "below", "diag", "distance", "columns")
DEFAULT = (*ROW_STATISTICS, "dag_score")
# elements of q that score_asymmetry has in float64 at once, if one head has no more
AT_ONCE = 2**21


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    want: str | Iterable[str] = DEFAULT,
    columns: Sequence[int | str] = ("sink",),
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    do: Plan | None = None,
    backend: Backend = "auto",
) -> AttentionStats:
    """Measure the attention map A of q and k without storing it: one pass for rows, one each for columns and pairs.

    With A_ij = exp(S_ij − lse_i) as in `attention` and query i at key position p_i = i + S − T:

        per row     lse; max_j A_ij; mass Σ_j A_ij (1, less a learned sink's share); entropy Σ_j A_ij (lse_i − S_ij);
                    sum_sq Σ_j A_ij² (1 / sum_sq is the effective number of causes); below Σ_{j < p_i} A_ij;
                    diag A_{i, p_i}; distance Σ_j A_ij |p_i − j|; columns A_ij at chosen j
        per key     received c_j = Σ_i A_ij; received_mean c_j / #{i that may attend j}
        per token   net_flow Σ_j A_ij − c_i: sent less received (T = S)
        per head    dag_score Σ_i below_i / Σ_ij A_ij; asymmetry, see `asymmetry` (T = S)

    Under a causal mask dag_score is 1 − mean(diag) whatever the model learnt: see `permutation_null`.
    All have gradients for q, k, bias and sink but max, the default's and asymmetry's too.

    Args:
        q, k, causal, mask, bias, alibi_slopes, scale, softcap, sink, backend: as in `attention`.
        want: "all", or names of the statistics; by default those of a row and dag_score.
        columns: the j of `columns`: key positions, negative from the end, or "sink", the first real key of the row's
            own sequence or segment.
        do: interventions, as in `attention`. The rows they touch are written out, at most 256 MiB at a time; asymmetry
            cannot be had under them.

    Returns:
        AttentionStats: [B, H, T] a row or token, [B, H, S] a key, [B, H] a head, [B, H, T, len(columns)] for columns.
        Entropies are in nats and distances in tokens. A row that may attend nothing has lse −∞ and 0 elsewhere.

    Raises:
        ValueError: as in `attention`; an unknown want or column; net_flow or asymmetry with T ≠ S.
        NotImplementedError: max or "all" asked for by name where a gradient would be recorded; asymmetry with a do.

    Source: dag_score after the causal reading of attention (q_i·k_j = tr q_i k_jᵀ).

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> attention_stats(q, k, want=["dag_score", "received"], causal=True).received
        tensor([[[2.0833, 1.0833, 0.5833, 0.2500]]])
    """
    check_qk(q, k)
    by_default = want == DEFAULT
    want = wanted(want)
    if "max" in want and not by_default and _records_gradient(q, k, bias, sink):
        raise NotImplementedError("max has no gradient: leave it out of want, got a tensor that requires grad")
    if want & {"net_flow", "asymmetry"}:
        check_square("net_flow and asymmetry", q, k)
    intervals = resolve_mask(q, k, mask, causal)
    chosen = chosen_keys(columns, intervals, k.shape[2])
    logits = resolve_logits(
        q, k, intervals, bias=bias, alibi_slopes=alibi_slopes, scale=scale, softcap=softcap, sink=sink
    )

    def measure(logits: Logits, want: set[str]) -> dict[str, Tensor]:
        return _measure(q, k, logits, intervals, chosen, want, backend)

    if do is None:
        stats = measure(logits, want)
    elif "asymmetry" in want:
        raise NotImplementedError("asymmetry needs all of A under a do: use dense.asymmetry of attention's probs")
    else:
        surgeries = surgeries_of(do, q, k, logits)
        stats = measure_under(surgeries, q, k, logits, intervals, chosen, want, backend, measure)
    return AttentionStats(**{name: value for name, value in stats.items() if name in want})


def dag_score(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Share of the attention mass that lies strictly below the diagonal: Σ_{j < p_i} A_ij / Σ_ij A_ij.

    Args:
        q, k and the rest: as in `attention`.

    Returns:
        [B, H]; 0 where no row may attend anything. Uniform attention scores (T − 1) / 2T without a mask and
        1 − (Σ_{n ≤ T} 1/n) / T under a causal one, where the score says nothing of the model: print it with
        `permutation_null`.

    Raises:
        ValueError, TypeError: as in `attention`.

    Source: the mass of tril(A, −1) over the mass of A.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> dag_score(q, k)
        tensor([[0.3750]])
    """
    options = {"causal": causal, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "scale": scale}
    options |= {"softcap": softcap, "sink": sink}
    return attention_stats(q, k, want=("dag_score",), **options, backend=backend).dag_score


def asymmetry(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> Asymmetry:
    """Distance of the attention map from its transpose, summed from the differences themselves.

        frobenius = ‖A − Aᵀ‖_F;  ratio = ‖A − Aᵀ‖_F / ‖A + Aᵀ‖_F;  l1 = Σ|A_ij − A_ji|;  max = max|A_ij − A_ji|
        net_flow_i = Σ_j A_ij − Σ_j A_ji

    Args:
        q, k and the rest: as in `attention`, with T = S.

    Returns:
        Asymmetry: [B, H] each, net_flow [B, H, T]. Under a causal mask ratio depends on the diagonal alone.

    Raises:
        ValueError: T ≠ S; else as in `attention`.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> asymmetry(q, k).frobenius
        tensor([[0.]])
    """
    options = {"causal": causal, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "scale": scale}
    options |= {"softcap": softcap, "sink": sink}
    return attention_stats(q, k, want=("asymmetry",), **options, backend=backend).asymmetry


def score_asymmetry(q: Tensor, k: Tensor) -> Tensor:
    """‖S − Sᵀ‖_F / ‖S + Sᵀ‖_F of the unmasked scores S = q kᵀ, exactly, in O(T·D²) time and O(D²) memory.

        ‖S‖² = tr((QᵀQ)(KᵀK)),  ⟨S, Sᵀ⟩ = tr((KᵀQ)²),  ratio² = (‖S‖² − ⟨S, Sᵀ⟩) / (‖S‖² + ⟨S, Sᵀ⟩)

    Args:
        q: queries, [B, H, T, D]; k: keys, [B, H_kv, T, D]. Any scale cancels. With rotary embeddings pass the rotated
            q and k.

    Returns:
        [B, H], 0 for symmetric scores, 1 for orthogonal, ∞ for antisymmetric ones, computed in float64; NaN where all
        scores are 0.

    Raises:
        ValueError: T ≠ S; else as in `attention`.

    Example:
        >>> x = torch.randn(1, 1, 16, 4)
        >>> bool(score_asymmetry(x, x) < 1e-6)
        True
    """
    check_qk(q, k)
    check_square("score_asymmetry", q, k)
    H, H_kv = q.shape[1], k.shape[1]
    result = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    several = max(1, AT_ONCE // max(1, q[:1, :1].numel()))
    for b in range(q.shape[0]):
        for h in torch.arange(H, device=q.device).split(several):
            Q, K = q[b, h].double(), k[b, h * H_kv // H].double()
            norm, cross = ((Q.mT @ Q) * (K.mT @ K)).sum((1, 2)), K.mT @ Q
            inner = (cross * cross.mT).sum((1, 2))
            result[b, h] = torch.sqrt((norm - inner).clamp(min=0) / (norm + inner)).to(result.dtype)
    return result


def _measure(
    q: Tensor, k: Tensor, logits: Logits, intervals: Intervals, chosen: Tensor, want: set[str], backend: Backend
) -> dict:
    """The statistics that want names, and some that they are made of: one pass for rows, then those that need it."""
    rows = _rows(q, k, logits, want, backend)
    stats = {name: value for name, value in rows.items() if name in want}
    # the gradient of each later pass goes through the normaliser by itself
    factors = (rows.get("pivot"), rows.get("max"))
    if want & {"diag", "columns"}:
        picked = torch.cat([diagonal(intervals)] * ("diag" in want) + [chosen] * ("columns" in want), -1)
        probs = chosen_probs(q, k, *logits, *factors, picked, backend)
        if "diag" in want:
            stats["diag"], probs = probs[..., 0], probs[..., 1:]
        if "columns" in want:
            stats["columns"] = probs
    if want & {"received", "received_mean", "net_flow", "asymmetry"}:
        stats |= column_statistics(received_pass(q, k, *logits, *factors, backend), rows["mass"], intervals)
    if "dag_score" in want:
        stats["dag_score"] = share(rows["below"], rows["mass"])
    if "asymmetry" in want:
        pairs = pair_statistics(q, k, *logits, *factors, backend)
        stats["asymmetry"] = asymmetry_of(*pairs.unbind(), rows["sum_sq"], stats["net_flow"])
    return stats


def _rows(q: Tensor, k: Tensor, logits: Logits, want: set[str], backend: Backend) -> dict[str, Tensor]:
    """The row statistics that want names, and those that the passes after this one need."""
    needed = set(want)
    if "dag_score" in want:
        needed |= {"below", "mass"}
    if want & {"diag", "columns"}:
        needed |= {"pivot", "max"}
    if want & {"received", "received_mean", "net_flow", "asymmetry"}:
        needed |= {"pivot", "max", "mass"}
    if "asymmetry" in want:
        needed |= {"sum_sq"}
    if _records_gradient(q, k, logits.bias, logits.sink):
        needed |= {"pivot", "max"}
    names = [name for name in ROWS if name in needed]
    packed = row_statistics(q, k, *logits, " ".join(names), backend)
    rows = dict(zip(names, packed.unbind(), strict=True))
    return rows | {name: rows[name].detach() for name in ("pivot", "max") if name in rows}


def _records_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

"""The specification of the statistics, in NumPy float64, from the matrix itself."""

from collections.abc import Sequence

import numpy as np

from .attention import attention, scores


def attention_stats(
    q: np.ndarray,
    k: np.ndarray,
    seen: np.ndarray,
    *,
    first: np.ndarray | None = None,
    offset: int | None = None,
    columns: Sequence[int | str] = ("sink",),
    bias: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: np.ndarray | None = None,
) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
    """Every statistic by name; asymmetry a dict of its own, and net_flow and asymmetry only where T = S.

    seen bool [B or 1, T, S]; first [B or 1, T], each row's sink, 0 by default; offset: query i sits at offset + i.
    """
    logits = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "offset": offset}
    _, lse, A = attention(q, k, k, seen, **logits, sink=sink)
    x = np.where(seen[:, None], scores(q, k, seen, **logits), 0.0)
    entropy = A * (np.where(np.isneginf(lse), 0.0, lse)[..., None] - x)
    entropy = np.where(A > 0, entropy, 0.0).sum(-1)
    return {"lse": lse} | matrix_stats(A, seen, first=first, offset=offset, columns=columns) | {"entropy": entropy}


def matrix_stats(
    A: np.ndarray,
    seen: np.ndarray | None = None,
    *,
    first: np.ndarray | None = None,
    offset: int | None = None,
    columns: Sequence[int | str] = ("sink",),
) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
    """The same from A [B, H, T, S]: all but lse."""
    A = A.astype(np.float64)
    B, _, T, S = A.shape
    seen = np.ones((1, T, S), bool) if seen is None else seen
    first = np.zeros((1, T), int) if first is None else first
    p = np.arange(T) + (S - T if offset is None else offset)
    j = np.arange(S)
    below, distance = j < p[:, None], np.abs(p[:, None] - j)
    stats = {
        "max": A.max(-1, initial=0.0),
        "mass": A.sum(-1),
        "entropy": -(A * np.log(np.where(A > 0, A, 1.0))).sum(-1),
        "sum_sq": (A**2).sum(-1),
        "below": (A * below).sum(-1),
        "diag": (A * (j == p[:, None])).sum(-1),
        "distance": (A * distance).sum(-1),
    }
    keys = [np.broadcast_to(first if c == "sink" else np.full((1, T), c % S), (B, T)) for c in columns]
    chosen = [(A * (j == key[:, None, :, None])).sum(-1) for key in keys]
    stats["columns"] = np.stack(chosen, -1) if chosen else np.zeros((*A.shape[:3], 0))
    stats["received"] = A.sum(-2)
    stats["received_mean"] = stats["received"] / np.maximum(1, seen.sum(-2))[:, None]
    total = A.sum((-2, -1))
    stats["dag_score"] = np.where(total > 0, stats["below"].sum(-1) / np.where(total > 0, total, 1.0), 0.0)
    if T == S:
        stats["net_flow"] = A.sum(-1) - A.sum(-2)
        stats["asymmetry"] = asymmetry(A)
    return stats


def asymmetry(A: np.ndarray) -> dict[str, np.ndarray]:
    """‖A − Aᵀ‖_F, ‖A − Aᵀ‖_F / ‖A + Aᵀ‖_F, Σ|A_ij − A_ji| and max|A_ij − A_ji| of [B, H, T, T], and net_flow."""
    A = A.astype(np.float64)
    difference = A - A.swapaxes(-2, -1)
    frobenius = np.sqrt((difference**2).sum((-2, -1)))
    total = np.sqrt(((A + A.swapaxes(-2, -1)) ** 2).sum((-2, -1)))
    return {
        "frobenius": frobenius,
        "ratio": np.where(total > 0, frobenius / np.where(total > 0, total, 1.0), 0.0),
        "l1": np.abs(difference).sum((-2, -1)),
        "max": np.abs(difference).max((-2, -1), initial=0.0),
        "net_flow": A.sum(-1) - A.sum(-2),
    }


def score_asymmetry(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """‖S − Sᵀ‖_F / ‖S + Sᵀ‖_F of S = q kᵀ, formed: [B, H]."""
    k = np.repeat(k.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    x = np.einsum("bhtd,bhsd->bhts", q.astype(np.float64), k)
    norm = [np.sqrt(((x + sign * x.swapaxes(-2, -1)) ** 2).sum((-2, -1))) for sign in (-1, 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return norm[0] / norm[1]

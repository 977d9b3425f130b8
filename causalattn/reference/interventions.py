"""The specification of interventions on attention, in NumPy float64."""

import numpy as np

from .attention import log_sum_exp


def do_hard(A: np.ndarray, row: int, col: int) -> np.ndarray:
    """Row becomes one-hot at col."""
    out = np.array(A, dtype=np.float64)
    out[..., row, :] = 0.0
    out[..., row, col] = 1.0
    return out


def do_soft(A: np.ndarray, row: int, col: int, strength: float) -> np.ndarray:
    """softmax(log A + strength at col) of the row, times the row's sum; strength −∞ is a cut."""
    out = np.array(A, dtype=np.float64)
    total = out[..., row, :].sum(-1, keepdims=True)
    out[..., row, col] *= np.exp(strength)
    kept = out[..., row, :].sum(-1, keepdims=True)
    out[..., row, :] *= np.where(kept > 0, total / np.where(kept > 0, kept, 1.0), 0.0)
    return out


def attention(
    scores: np.ndarray, v: np.ndarray, gain: np.ndarray, forced: np.ndarray, sink: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, lse and A of softmax(S + gain), rows with forced ≥ 0 one-hot there, with the lse of their one key.

    scores, gain [B, H, T, S], −∞ where forbidden or cut; forced [B, H, T]; v [B, H_kv, S, V].
    """
    x = scores + gain
    lse = log_sum_exp(x, sink)
    A = np.exp(x - np.where(np.isneginf(lse), 0.0, lse)[..., None])
    at = np.maximum(forced, 0)[..., None]
    there = np.take_along_axis(scores, at, -1)[..., 0]
    made = (forced >= 0) & ~np.isneginf(there)
    A = np.where(made[..., None], np.arange(A.shape[-1]) == at, A)
    v = np.repeat(v.astype(np.float64), A.shape[1] // v.shape[1], axis=1)
    return np.einsum("bhts,bhsv->bhtv", A, v), np.where(made, there, lse), A

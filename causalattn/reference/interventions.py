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


def do_patch(A: np.ndarray, row: int, col: int, probability: float) -> np.ndarray:
    """A[row, col] becomes probability, and the rest of the row is scaled to keep the row's sum, which it fills alone
    where nothing else is left.
    """
    out = np.array(A, dtype=np.float64)
    total = out[..., row, :].sum(-1)
    rest = total - out[..., row, col]
    alone = rest <= 0
    out[..., row, :] *= np.where(alone, 0.0, (total - probability) / np.where(alone, 1.0, rest))[..., None]
    out[..., row, col] = np.where(alone, total, probability)
    return out


def attention(
    scores: np.ndarray,
    v: np.ndarray,
    gain: np.ndarray,
    forced: np.ndarray,
    sink: np.ndarray | None = None,
    shares: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, lse and A of softmax(S + gain), rows with forced ≥ 0 one-hot there, with the lse of their one key.

    scores, gain [B, H, T, S], −∞ where forbidden or cut; forced [B, H, T]; v [B, H_kv, S, V]. shares [B, H, T, S], NaN
    for none: probabilities that edges are given, beside which the rest of the row, or its sink, keeps its proportions;
    where there is no rest they are divided by their sum, and lse is that of their keys.
    """
    x = scores + gain
    A, lse = _softmax(x, sink)
    if shares is not None:
        given = ~np.isnan(shares) & ~np.isneginf(x)
        c = np.where(given, shares, 0.0)
        total, here = c.sum(-1), given.any(-1)
        rest, rest_lse = _softmax(np.where(given, -np.inf, x), sink)
        if sink is not None:
            # a row without keys is empty, but here its sink is what is left
            rest_lse = np.where(np.isneginf(rest_lse), sink.astype(np.float64)[:, None], rest_lse)
        alone = np.isneginf(rest_lse) | (total >= 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            blended = np.where(alone[..., None], c / total[..., None], (1.0 - total)[..., None] * rest + c)
            own = log_sum_exp(np.where(given, x, -np.inf), None)
            blended_lse = np.where(alone, own, rest_lse - np.log(1.0 - total))
        emptied = here & (total == 0) & ~np.isfinite(log_sum_exp(np.where(given, -np.inf, x), None))
        A = np.where(here[..., None], np.where(emptied[..., None], 0.0, blended), A)
        lse = np.where(here, np.where(emptied, -np.inf, blended_lse), lse)
    at = np.maximum(forced, 0)[..., None]
    there = np.take_along_axis(scores, at, -1)[..., 0]
    made = (forced >= 0) & ~np.isneginf(there)
    A = np.where(made[..., None], np.arange(A.shape[-1]) == at, A)
    v = np.repeat(v.astype(np.float64), A.shape[1] // v.shape[1], axis=1)
    return np.einsum("bhts,bhsv->bhtv", A, v), np.where(made, there, lse), A


def _softmax(x: np.ndarray, sink: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    lse = log_sum_exp(x, sink)
    return np.exp(x - np.where(np.isneginf(lse), 0.0, lse)[..., None]), lse

"""The specification of covariances between rows of attention, in NumPy float64."""

import numpy as np


def covariance(rows: np.ndarray, *, center: bool = False, keys: np.ndarray | None = None) -> np.ndarray:
    """C_ij = Σ_k X_ik X_jk of X = rows [..., T, S], each less its mean over keys with center: [..., T, T].

    keys: which of S a sequence has, bool [B, S], all by default; the others hold 0.
    """
    x = rows.astype(np.float64)
    if center:
        inside = np.ones(x.shape[-1], bool) if keys is None else keys[:, None, None]
        count = np.maximum(inside.sum(-1, keepdims=True), 1)
        x = np.where(inside, x - x.sum(-1, keepdims=True) / count, 0.0)
    return x @ np.swapaxes(x, -1, -2)


def correlation(C: np.ndarray) -> np.ndarray:
    """R_ij = C_ij / √(C_ii C_jj), 1 on the diagonal; 0 in the row and column of a token whose C_ii is 0."""
    deviation = np.sqrt(np.diagonal(C, axis1=-2, axis2=-1))
    product = deviation[..., :, None] * deviation[..., None, :]
    R = np.divide(C, product, out=np.zeros_like(C), where=product > 0)
    tokens = np.arange(C.shape[-1])
    R[..., tokens, tokens] = deviation > 0
    return R


def attended_keys(seen: np.ndarray) -> np.ndarray:
    """bool [B, S], the keys from the first to the last that some query may attend; seen is bool [B, T, S]."""
    some = seen.any(1)
    return np.logical_or.accumulate(some, 1) & np.logical_or.accumulate(some[:, ::-1], 1)[:, ::-1]

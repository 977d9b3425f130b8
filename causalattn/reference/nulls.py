"""The specification of the permutation null, in NumPy float64, with every weight written out."""

import numpy as np


def weights(statistic: str, T: int, S: int, *, offset: int, column: np.ndarray | None = None) -> np.ndarray:
    """w_ij of Σ_ij w_ij A_ij: [B or 1, T, S]; column [B or 1, T] is each row's key for "column"."""
    p, j = np.arange(T)[:, None] + offset, np.arange(S)
    if statistic == "dag_score":
        return (j < p)[None].astype(np.float64)
    if statistic == "distance":
        return np.abs(p - j)[None].astype(np.float64)
    return (j == column[..., None]).astype(np.float64)


def permutation_null(A: np.ndarray, w: np.ndarray, seen: np.ndarray, statistic: str) -> dict[str, np.ndarray]:
    """value, mean and std, each [B, H], of A [B, H, T, S] with its rows shuffled over seen [B or 1, T, S]."""
    B, H, T, S = A.shape
    w, seen = np.broadcast_to(w, (B, T, S)), np.broadcast_to(seen, (B, T, S))
    value, mean, variance, total = np.zeros((4, B, H))
    for b, h, i in np.ndindex(B, H, T):
        a, u = A[b, h, i, seen[b, i]].astype(np.float64), w[b, i, seen[b, i]]
        if len(a) == 0:
            continue
        value[b, h] += (u * a).sum()
        mean[b, h] += a.sum() * u.mean()
        if len(a) > 1:
            variance[b, h] += ((u - u.mean()) ** 2).sum() * ((a - a.mean()) ** 2).sum() / (len(a) - 1)
        total[b, h] += a.sum() if statistic == "dag_score" else 1.0
    total = np.where(total > 0, total, np.inf)
    return {"value": value / total, "mean": mean / total, "std": np.sqrt(variance) / total}


def shuffled(A: np.ndarray, seen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A [T, S] with the weights of each row permuted over the keys that seen [T, S] allows."""
    result = np.zeros_like(A)
    for i in range(len(A)):
        result[i, seen[i]] = generator.permutation(A[i, seen[i]])
    return result


def offset_null(A: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The mean of A [T, S] over the entries that seen [T, S] allows at the same i − j, 0 where it forbids."""
    i, j = np.indices(A.shape)
    result = np.zeros(A.shape)
    for offset in np.unique(i - j):
        same = seen & (i - j == offset)
        if same.any():
            result[same] = A[same].astype(np.float64).mean()
    return result

"""The specification of dense: the statistics of a matrix are those of `statistics`, its nulls those of `nulls`."""

import numpy as np

from .nulls import offset_null, permutation_null
from .statistics import asymmetry, matrix_stats

__all__ = ["asymmetry", "asymmetry_matrix", "dag_score", "matrix_stats", "offset_null", "permutation_null"]


def dag_score(A: np.ndarray) -> np.ndarray:
    """tril(A, −1).sum() / A.sum() of [..., T, T], 0 where A sums to 0."""
    total = A.sum((-2, -1))
    return np.tril(A, -1).sum((-2, -1)) / np.where(total > 0, total, 1.0)


def asymmetry_matrix(A: np.ndarray) -> np.ndarray:
    return A - A.swapaxes(-2, -1)

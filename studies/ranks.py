"""Rank correlations over the pairs of a sentence's words, as they are and given what else may rank them."""

import numpy as np

GIVEN = ("", ", given distance", ", given distance and tokens")


class Pairs:
    """The pairs of W words, a < b or, with direction, all i ≠ j, what is to be foretold of them, and what is given.

    Given tokens, the ranks of either side are less the best sum of a number of each word, with direction one of each
    word as i and one as j: what is left is about pairs.
    """

    def __init__(self, wanted: np.ndarray, *, directed: bool = False):
        W = len(wanted)
        self.at = np.nonzero(~np.eye(W, dtype=bool)) if directed else np.triu_indices(W, 1)
        i, j = (np.eye(W)[part] for part in self.at)
        one = np.ones((len(i), 1))
        far = ranked(np.abs(self.at[0] - self.at[1]))[:, None]
        tokens = np.hstack([i, j]) if directed else i + j
        self.bases = [basis(np.hstack(parts)) for parts in ([one], [one, far], [one, far, tokens])]
        self.wanted = ranked(wanted[self.at])

    def foretold(self, score: np.ndarray) -> dict[str, float]:
        """Of a score [W, W], by what is given."""
        found = ranked(score[self.at])
        return {
            f"rank{given}": correlated(found, self.wanted, basis)
            for given, basis in zip(GIVEN, self.bases, strict=True)
        }


def correlated(x: np.ndarray, y: np.ndarray, basis: np.ndarray) -> float:
    """r of what a basis leaves of x and y; 0 where it leaves nothing, as of a constant."""
    left = [each - basis @ (basis.T @ each) for each in (x, y)]
    sizes = [np.linalg.norm(each) for each in left]
    if any(size <= 1e-9 * np.linalg.norm(each) for size, each in zip(sizes, (x, y), strict=True)):
        return 0.0
    return float(left[0] @ left[1] / (sizes[0] * sizes[1]))


def basis(columns: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span those."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


def ranked(x: np.ndarray) -> np.ndarray:
    """Ranks, equal numbers with the mean of theirs."""
    _, at, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[at]

"""Random linear structural equation models with hidden causes, their correlations, samples and true graphs."""

from typing import NamedTuple

import numpy as np

from causalattn.discovery import PAG
from causalattn.reference.discovery.truth import true_pag


class System(NamedTuple):
    """x = xW + u: weights [N, N], W[a, b] of a → b; the observed variables, of all N."""

    weights: np.ndarray
    observed: list[int]

    def correlations(self) -> np.ndarray:
        """Of the observed variables, exact, [T, T]."""
        total = np.linalg.inv(np.eye(len(self.weights)) - self.weights)
        covariance = (total.T @ total)[np.ix_(self.observed, self.observed)]
        deviation = np.sqrt(covariance.diagonal())
        return covariance / deviation / deviation[:, None]

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """[n, T], with standard normal u."""
        u = rng.standard_normal((n, len(self.weights)))
        return np.linalg.solve((np.eye(len(self.weights)) - self.weights).T, u.T).T[:, self.observed]

    def truth(self) -> PAG:
        """The PAG that all independencies among the observed variables leave."""
        return PAG(true_pag(self.weights != 0, self.observed))


def random_system(
    rng: np.random.Generator, T: int, *, degree: float = 2.5, hidden: bool = True, weak: bool = False
) -> System:
    """T variables in a random order, about `degree` edges each, weights ±U(0.5, 2), weak ones ±U(0.1, 0.5).

    Half of the variables that have two children or more and no parents are hidden, as in Rohekar et al. 2021.
    """
    order = rng.permutation(T)
    below = np.triu(rng.random((T, T)) < degree / max(T - 1, 1), 1)
    edges = np.zeros((T, T), bool)
    edges[np.ix_(order, order)] = below
    size = rng.uniform(*((0.1, 0.5) if weak else (0.5, 2)), (T, T)) * rng.choice([-1, 1], (T, T))
    roots = np.flatnonzero(~edges.any(0) & (edges.sum(1) >= 2))
    out = set(rng.permutation(roots)[: (len(roots) + 1) // 2].tolist()) if hidden else set()
    return System(edges * size, [a for a in range(T) if a not in out])

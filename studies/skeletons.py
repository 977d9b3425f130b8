"""How far two skeletons agree, and how far they would if one's edges had fallen at random."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from causalattn.discovery import discover

# |r| below which published searches of attention called tokens independent: n = 768, α = .01 and n = 128, α = 1e-5
PUBLISHED = (0.093, 0.376)
MAX_ORDER = 2


def skeleton(R: Tensor, cut: float) -> np.ndarray:
    """Where the search of sets up to MAX_ORDER leaves an edge, of the pairs a < b in order."""
    return above(discover(R, cut=cut, max_order=MAX_ORDER).pag.skeleton)


def above(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal."""
    return np.asarray(matrix)[np.triu_indices(len(matrix), 1)]


def distances(T: int) -> np.ndarray:
    """b − a of the pairs a < b."""
    a, b = np.triu_indices(T, 1)
    return b - a


def f1(ours: np.ndarray, theirs: np.ndarray) -> float:
    """2 |both| / (|ours| + |theirs|) of two sets of pairs, 1 where both are empty."""
    edges = int(ours.sum() + theirs.sum())
    return 2 * int((ours & theirs).sum()) / edges if edges else 1.0


def chance_f1(ours: np.ndarray, theirs: np.ndarray, classes: np.ndarray | None = None) -> float:
    """The mean of f1 over all placements of their edges; with classes, over those that keep each class's number."""
    classes = np.zeros(len(ours), int) if classes is None else classes
    a, b, pairs = np.bincount(classes[ours]), np.bincount(classes[theirs]), np.bincount(classes)
    a, b = (np.pad(x, (0, len(pairs) - len(x))) for x in (a, b))
    edges = int(ours.sum() + theirs.sum())
    return 2 * float((a * b / np.maximum(pairs, 1)).sum()) / edges if edges else 1.0


def agreements(edges: np.ndarray, classes: np.ndarray) -> Iterator[dict]:
    """Of skeletons [layers, heads, pairs], each two layers' mean f1 over pairs of heads, and what chance would give.

    layers: the two. f1, chance, chance by class: as f1 and chance_f1. No head is paired with itself.
    """
    L, H, _ = edges.shape
    flat = edges.reshape(L * H, -1).astype(float)
    sizes = flat.sum(1)
    both = np.maximum(sizes[:, None] + sizes, 1e-300)
    of_class = flat @ (classes[:, None] == np.unique(classes))
    counts = np.unique(classes, return_counts=True)[1]
    found = {"f1": flat @ flat.T, "chance": np.outer(sizes, sizes) / flat.shape[1]}
    found["chance by class"] = (of_class / counts) @ of_class.T
    same = ~np.eye(H, dtype=bool)
    for a in range(L):
        for b in range(a, L):
            at = np.s_[a * H : (a + 1) * H, b * H : (b + 1) * H]
            kept = same if a == b else np.ones_like(same)
            row = {name: np.where(both[at] < 1, 1.0, 2 * x[at] / both[at])[kept].mean() for name, x in found.items()}
            yield {"layers": (a, b)} | row

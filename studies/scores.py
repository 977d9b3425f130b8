"""How near a search comes to a system's true graph, what chance gives, and whether tests or the search went wrong."""

import math
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from systems import System

from causalattn.discovery import PAG, CorrelationTest, Mark, compare
from causalattn.reference.discovery.separation import ancestors
from causalattn.reference.discovery.truth import mag, separating_set

# where correlations are exact, n is only a knob of the cut: at level 0.01 it is |r| < 8.1e-8
EXACT = 1e15


class Truth(NamedTuple):
    """Of a system: its PAG; the MAG that holds every mark; a set for each pair without an edge; an order, causes first.

    places: of each observed variable its place in that order.
    """

    pag: PAG
    mag: PAG
    sets: dict[tuple[int, int], tuple[int, ...]]
    places: np.ndarray


def truth_of(system: System) -> Truth:
    dag, observed = system.weights != 0, system.observed
    pairs = combinations(range(len(observed)), 2)
    sets = {pair: separating_set(dag, observed, (), *pair) for pair in pairs}
    # a cause has fewer ancestors than what it causes
    causes = ancestors(dag).sum(0)[observed]
    return Truth(
        system.truth(),
        PAG(mag(dag, observed)),
        {pair: given for pair, given in sets.items() if given is not None},
        causes.argsort(kind="stable").argsort(),
    )


def score(found: PAG, truth: Truth) -> dict:
    """Edges, and marks: a mark is right when the MAG has it, and to be found when the PAG does."""
    true, sure = compare(found, truth.mag), compare(found, truth.pag)
    claimed = found.skeleton & truth.mag.skeleton & (found.marks != Mark.CIRCLE)
    right = claimed & (found.marks == truth.mag.marks)
    edges = int(found.skeleton.sum()) // 2
    return {
        "edges": edges,
        "pairs": math.comb(len(found.names), 2),
        "precision": true.precision,
        "recall": true.recall,
        "f1": true.f1,
        "chance": sure.chance,
        "arrow_precision": true.arrow_precision,
        "arrow_recall": sure.arrow_recall,
        "tail_precision": true.tail_precision,
        "tail_recall": sure.tail_recall,
        "marks": right.sum() / claimed.sum() if claimed.any() else np.nan,
        "arrows": (truth.mag.marks[truth.mag.skeleton] == Mark.ARROW).mean() if truth.mag.skeleton.any() else np.nan,
        "distance": sure.distance,
    }


def blame(found: PAG, truth: Truth, R: np.ndarray, n: float, alpha: float) -> dict:
    """Edges too few and too many, and what test of R did it.

    missed: true edges not found. uncorrelated: of those, the ones whose |r| given nothing is below the cut.
    extra: found edges that are not true. untried: of those, the ones that their true set would have removed: no test
    of it was wrong, none was made.
    """
    test = CorrelationTest(torch.from_numpy(R), n=n, alpha=alpha)
    pairs = [*zip(*np.triu(found.skeleton != truth.pag.skeleton).nonzero(), strict=True)]
    extra = [pair for pair in pairs if found.skeleton[pair]]
    missed = [pair for pair in pairs if not found.skeleton[pair]]
    return {
        "missed": len(missed),
        "uncorrelated": sum(test.cond_indep(*pair, ()) for pair in missed),
        "extra": len(extra),
        "untried": sum(test.cond_indep(*pair, truth.sets[pair]) for pair in extra),
    }

"""The specification of causal discovery, in NumPy and plain Python: separation, true graphs, rules, searches.

A graph with marks is int8 [T, T]: marks[a, b] is the mark at b on the edge a–b, NONE 0, CIRCLE 1, ARROW 2, TAIL 3, so
a → b is marks[a, b] = ARROW and marks[b, a] = TAIL. A DAG is bool [N, N]: dag[a, b] is a → b. Separating sets are a
dict from (a, b), a < b, to a sorted tuple.
"""

from .rules import RULES, orient, orient_arrowheads, orient_tails, set_marks
from .search import Found, candidates, explanation_sets, icd, ord_icd, pds_distances, possible_ancestors
from .separation import ARROW, CIRCLE, NONE, TAIL, ancestors, d_separated, m_separated
from .truth import mag, oracle, pag_by_enumeration, separating_set, true_pag

__all__ = [
    "ARROW",
    "CIRCLE",
    "NONE",
    "RULES",
    "TAIL",
    "Found",
    "ancestors",
    "candidates",
    "d_separated",
    "explanation_sets",
    "icd",
    "m_separated",
    "mag",
    "oracle",
    "ord_icd",
    "orient",
    "orient_arrowheads",
    "orient_tails",
    "pag_by_enumeration",
    "pds_distances",
    "possible_ancestors",
    "separating_set",
    "set_marks",
    "true_pag",
]

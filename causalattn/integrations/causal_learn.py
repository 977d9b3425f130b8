"""Our tests inside causal-learn's searches, pc(data, indep_test="causalattn") and fci; PAGs as its graphs and back."""

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..discovery.ci import correlate, correlation_lists
from ..discovery.pag import PAG, Mark
from ..partial_corr import Status

if TYPE_CHECKING:
    from causallearn.graph.GeneralGraph import GeneralGraph

MISSING = "causal-learn is not installed: pip install causal-learn"
ENDPOINTS = {0: Mark.NONE, -1: Mark.TAIL, 1: Mark.ARROW, 2: Mark.CIRCLE}


def register(name: str = "causalattn") -> type:
    """Register a test of conditional independence with causal-learn under a name; calling it again changes nothing.

        p = erfc(√(n − |S| − 3)·|artanh r(x, y | S)| / √2)

    `pc` and `fci` then take the name as their test, and pass on two arguments:

        corr    the correlations to test, [T, T], as an array or a tensor; without it those of the columns of data
        n       the sample size; without it the number of rows of data

    Where data is only a place for corr, `surrogate_data(R, n)` makes some. A SINGULAR test (see `partial_correlation`)
    has p = 0, it is no evidence of independence; the test object counts them in `singular`.

    Returns:
        The class that was registered.

    Raises:
        ImportError: causal-learn is not installed.
        ValueError: the name is that of another test.

    Source: the registry of causal-learn (Zheng et al. 2024, JMLR 25).

    Example:
        >>> register()  # doctest: +SKIP
        >>> pc(data, alpha=0.01, indep_test="causalattn", corr=R, n=768)  # doctest: +SKIP
    """
    try:
        from causallearn.utils import cit
    except ImportError as error:
        raise ImportError(MISSING) from error
    known = cit._custom_ci_tests.get(name)
    if not getattr(known, "of_causalattn", known is None) or isinstance(getattr(cit, name, None), str):
        raise ValueError(f"name must be free, got {name!r}, which causal-learn has a test of already")
    return known if getattr(known, "of_causalattn", False) else cit.register_ci_test(name, _test_class(name, cit))


def _test_class(name: str, cit) -> type:
    class CausalAttnTest(cit.CIT_Base):
        of_causalattn = True

        def __init__(self, data, corr=None, n=None, **kwargs):
            super().__init__(data, **kwargs)
            self.assert_input_data_is_valid()
            corr = np.corrcoef(data.T) if corr is None else corr
            R = corr if isinstance(corr, torch.Tensor) else torch.from_numpy(np.array(corr, np.float64))
            if R.shape != (data.shape[1], data.shape[1]):
                raise ValueError(f"corr must have shape {[data.shape[1]] * 2}, got {list(R.shape)}")
            self.R, self.floor = correlation_lists(R)
            self.n = data.shape[0] if n is None else n
            self.tests = self.singular = 0
            # causal-learn's own hash is of an abbreviated print, the same for many large matrices
            self.check_cache_method_consistent(name, hashlib.sha256(repr((self.R, self.n)).encode()).hexdigest())

        def __call__(self, X, Y, condition_set=None):
            (x,), (y,), given, key = self.get_formatted_XYZ_and_cachekey(X, Y, condition_set)
            if key not in self.pvalue_cache:
                self.pvalue_cache[key] = self._p(x, y, given)
            return self.pvalue_cache[key]

        def _p(self, x, y, given):
            if self.n <= len(given) + 3:
                raise ValueError(f"n must be greater than |S| + 3 = {len(given) + 3}, got {self.n}")
            r, status = correlate(self.R, self.floor, x, y, given)
            self.tests += 1
            self.singular += status == Status.SINGULAR
            if status != Status.OK:
                return 0.0
            return math.erfc(math.sqrt((self.n - len(given) - 3) / 2) * abs(math.atanh(r)))

    return CausalAttnTest


def to_causal_learn(pag: PAG) -> "GeneralGraph":
    """Make a graph of causal-learn, whose nodes have pag's names, in order, and whose ancestors are known.

    Its matrix holds the mark at a where marks hold the one at b, with codes of its own:

        graph.graph[a, b] = the mark at a on the edge between a and b: −1 tail, 1 arrow, 2 circle

    Raises:
        ImportError: causal-learn is not installed.

    Example:
        >>> graph = to_causal_learn(PAG.from_edges([(0, 1, "o->")], ["storm", "sank"]))
        >>> print(*graph.get_graph_edges())
        storm o-> sank
    """
    try:
        from causallearn.graph.GeneralGraph import GeneralGraph
        from causallearn.graph.GraphNode import GraphNode
    except ImportError as error:
        raise ImportError(MISSING) from error
    graph = GeneralGraph([GraphNode(name) for name in pag.names])
    codes = {mark: code for code, mark in ENDPOINTS.items()}
    graph.graph = np.array([codes[mark] for mark in range(len(codes))])[pag.marks.T]
    graph.reconstitute_dpath(graph.get_graph_edges())
    graph.set_pag(True)
    return graph


def from_causal_learn(graph: "GeneralGraph") -> PAG:
    """The PAG of a graph of causal-learn, as its `fci` returns first.

    Raises:
        ValueError: two tokens have two edges, an edge has half a mark, or two nodes have the same name.
    """
    theirs = np.asarray(graph.graph).T
    other = theirs[~np.isin(theirs, [*ENDPOINTS])]
    if other.size:
        raise ValueError(f"graph must have single edges of tails, arrows and circles, got a mark {other[0]}")
    marks = np.zeros(theirs.shape, np.int8)
    for code, mark in ENDPOINTS.items():
        marks[theirs == code] = mark
    return PAG(marks, tuple(node.get_name() for node in graph.get_nodes()))

"""From correlations to a partial ancestral graph: the public search."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._backend import Backend
from ..partial_corr import level_tests
from ..partial_corr.arguments import check_correlation
from .background import Background, start_of
from .ci import cuts
from .icd import Level, State, icd
from .pag import PAG

NO_BACKGROUND = Background()


class Discovery(NamedTuple):
    """What a search found.

    pag: the graph. sepsets: of each pair a < b whose edge a test took, the tokens given which it was independent.
    strength: [T, T], the least |r| / cut of all tests of a pair, below 1 where its edge fell, NaN where none was
    decided: how far an edge is from falling; a required one may stand below 1. cuts: the |r| below which a pair was
    independent, for |S| = 0, 1, …. levels: what each level did. complete: nothing was left to test; else max_order,
    max_tests or n ended the search, and the graph is right for sets up to the last level's size.
    """

    pag: PAG
    sepsets: dict[tuple[int, int], tuple[int, ...]]
    strength: np.ndarray
    cuts: tuple[float, ...]
    levels: tuple[Level, ...]
    complete: bool


def discover(
    R: Tensor,
    *,
    cut: float | None = None,
    n: float | None = None,
    alpha: float | None = None,
    order: str | Sequence[int] | None = None,
    max_order: int | None = None,
    max_tests: int = 10**9,
    background: Background = NO_BACKGROUND,
    selection_bias: bool = True,
    names: Sequence[str] | None = None,
    on_level: Callable[[Discovery], None] | None = None,
    backend: Backend = "auto",
) -> Discovery:
    """Find the partial ancestral graph that correlations are compatible with, by ICD, or OrdICD in a known order.

    Two tokens are independent given S where |r| < cut: see `partial_correlation`; a test that is SINGULAR separates
    nothing. Hidden causes are allowed for. All tests of a level are made at once, of the graph as it stood before it,
    and a pair is separated by the set of least |r|: renaming the tokens renames the graph.

    An attention map has no sample size, so n is a knob and so is the cut; and correlations of any attention, of an
    untrained model too, give some graph. Compare with `null_discoveries` before reading one.

    Args:
        R: correlations, [T, T], T ≥ 2, as in `partial_correlation`; those of `attention_correlation` in float64.
        cut: the |r| below which tokens are independent, 0 < cut < 1; else
        n, alpha: sample size and level, from which `critical_correlation` takes the cut for each |S|; sets of n − 3
            tokens or more are not tested.
        order: "time", token t coming before t + 1, or the place of each token in time: OrdICD.
        max_order: the largest |S|; T − 2 by default.
        max_tests: a level that could take more tests is not begun, where its sets come from the graph: |S| ≥ 2, or 1
            in a known order.
        background: required and forbidden edges, tiers.
        selection_bias: whether tokens may have been selected on: undirected edges, rules R5 … R7.
        names: of the tokens; "0", "1", … by default.
        on_level: called with the graph so far after every level.
        backend: of the tests.

    Returns:
        Discovery.

    Raises:
        ValueError: fewer than two tokens, an R that does not fit or in which every token is every other one, both or
            neither of cut and (n, alpha), n ≤ 3, an order, max_order, max_tests, names or background that do not fit.
        TypeError: background edges or a cut that are no numbers, or names that are no strings.

    Source: Rohekar et al. 2021 (arXiv:2111.04095) for ICD, Rohekar et al. 2023 (arXiv:2310.20307) for attention;
        Colombo and Maathuis 2014 for levels that do not depend on the order of the tokens.

    Example:
        >>> A = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]], dtype=torch.float64)
        >>> C = A @ A.T
        >>> found = discover(C / (C.diag()[:, None] * C.diag()).sqrt(), cut=1e-9, names=["a", "b", "c"])
        >>> print(found.pag)
        a o-o b
        b o-o c
    """
    _check_degenerate(R)
    T = R.shape[0]
    cut_of = cuts(cut, n, alpha)
    depth = _depth(T, max_order, n, max_tests)
    _check_cuts(cut_of, depth, n, alpha)
    places = None if order is None else np.arange(T) if isinstance(order, str) else np.asarray(order)
    _check_order(order, places)
    start, required = start_of(T, background, places)
    names = tuple(map(str, range(T))) if names is None else tuple(names)
    # what does not fit is refused before the first level
    PAG(start, names)
    test = partial(_test, R, cut_of, backend)
    found = None
    search = icd(
        test, start, cut=cut_of, order=places, required=required, selection_bias=selection_bias,
        max_order=depth, max_tests=max_tests,
    )  # fmt: skip
    for state in search:
        found = _discovery(state, names, cut_of)
        if on_level is not None:
            on_level(found)
    return found


def _test(R: Tensor, cut_of: Callable[[int], float], backend: Backend, adjacency: Tensor, order: int, candidates):
    on = R.device
    if candidates is not None:
        candidates = type(candidates)(*(x if x is None else x.to(on) for x in candidates))
    found = level_tests(R, adjacency.to(on), order, cut=cut_of(order), candidates=candidates, backend=backend)
    return type(found)(*(x.cpu() for x in found))


def _discovery(state: State, names: tuple[str, ...], cut_of: Callable[[int], float]) -> Discovery:
    used = tuple(cut_of(level.order) for level in state.levels)
    return Discovery(PAG(state.marks, names), state.sepsets, state.least, used, state.levels, state.done)


def _check_degenerate(R: Tensor) -> None:
    flat = check_correlation(R)
    if R.ndim != 2 or R.shape[0] < 2:
        raise ValueError(f"R must be one matrix [T, T] of at least 2 tokens, got {list(R.shape)}")
    if bool((flat[0].abs() >= 1 - 64 * torch.finfo(R.dtype).eps).all()):
        raise ValueError("R must tell tokens apart, got |r| = 1 for every pair: all rows of the attention are the same")


def _depth(T: int, max_order: int | None, n: float | None, max_tests: int) -> int:
    """The largest |S| that may be tested."""
    for name, value in (("max_order", max_order), ("max_tests", max_tests)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (value is None and name == "max_order") and not (whole and value >= 0):
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    limits = [T - 2 if max_order is None else max_order]
    return min(limits if n is None or math.isinf(n) else [*limits, math.ceil(n) - 4])


def _check_cuts(cut_of: Callable[[int], float], depth: int, n: float | None, alpha: float | None) -> None:
    """Refuse n and alpha that no |r| can be told apart by, before a level has been made."""
    for order in (0, max(depth, 0)):
        if not 0 < cut_of(order) < 1:
            raise ValueError(
                f"n and alpha must give a cut between 0 and 1, got {cut_of(order)} of n={n}, alpha={alpha}"
            )


def _check_order(order: str | Sequence[int] | None, places: np.ndarray | None) -> None:
    if isinstance(order, str) and order != "time":
        raise ValueError(f"order must be 'time' or the place of each token, got {order!r}")
    if places is not None and places.ndim == 1 and len(np.unique(places)) < len(places):
        raise ValueError("order must give every token a place of its own: use background tiers for ties")

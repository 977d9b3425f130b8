"""How much of a graph hangs on its cut: the same search at many of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..partial_corr.arguments import check_cut
from .discover import Discovery, discover
from .pag import Mark


class CutSweep(NamedTuple):
    """The graphs of a sweep and what they share.

    cuts: in ascending order; found: a Discovery each. edges: [T, T], the share of graphs in which a pair has an edge.
    arrows, tails: [T, T], of those graphs the share with that mark at b, NaN for a pair without an edge in any.
    """

    cuts: tuple[float, ...]
    found: tuple[Discovery, ...]
    edges: np.ndarray
    arrows: np.ndarray
    tails: np.ndarray


def sweep_cuts(
    R: Tensor, cuts: Iterable[float], *, progress: Callable[[int, int], None] | None = None, **options
) -> CutSweep:
    """Search at many cuts, and count in how many graphs each edge and each mark stands.

        edges_ab = share of the cuts whose graph has an edge between a and b

    An edge that stands at every cut does not hang on the choice of one; that says nothing of whether attention without
    structure has it as well: `null_discoveries`.

    Args:
        R: as in `discover`.
        cuts: at least one |r| in (0, 1), each once.
        progress: called with how many are done and all.
        options: of `discover`, but n, alpha and cut.

    Raises:
        ValueError: no cut, one that repeats or lies outside (0, 1), or what `discover` refuses.

    Source: shares over a range of thresholds as in Meinshausen and Bühlmann 2010 (arXiv:0809.2932), here of one matrix.

    Example:
        >>> import torch
        >>> R = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.05], [0.1, 0.05, 1.0]], dtype=torch.float64)
        >>> sweep_cuts(R, [0.03, 0.2, 0.4, 0.6]).edges[0]
        array([0.  , 0.75, 0.25])
    """
    cuts = sorted(map(check_cut, cuts))
    if not cuts or len({*cuts}) < len(cuts):
        raise ValueError(f"cuts must be distinct and at least one, got {cuts}")
    unknown = {"cut", "n", "alpha"} & {*options}
    if unknown:
        raise ValueError(f"cuts takes the place of cut, n and alpha, got {', '.join(sorted(unknown))}")
    found = []
    for cut in cuts:
        found.append(discover(R, cut=cut, **options))
        if progress is not None:
            progress(len(found), len(cuts))
    marks = np.stack([each.pag.marks for each in found])
    edges = (marks != Mark.NONE).sum(0)
    of_edges = np.where(edges, edges, np.nan)
    arrows, tails = ((marks == mark).sum(0) / of_edges for mark in (Mark.ARROW, Mark.TAIL))
    return CutSweep(tuple(cuts), tuple(found), edges / len(cuts), arrows, tails)

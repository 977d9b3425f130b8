"""PAGs as networkx graphs and back."""

from typing import TYPE_CHECKING

import numpy as np

from ..discovery.pag import PAG, Mark

if TYPE_CHECKING:
    from networkx import DiGraph

WORDS = {Mark.CIRCLE: "circle", Mark.ARROW: "arrow", Mark.TAIL: "tail"}
MARKS = {word: mark for mark, word in WORDS.items()}


def to_networkx(pag: PAG) -> "DiGraph":
    """Make a graph with an edge in both directions where pag has one: graph[a][b]["mark"] is the mark at b.

    Nodes are the names, in order; marks are "circle", "arrow" and "tail". `to_undirected` gives the skeleton.

    Raises:
        ImportError: networkx is not installed.

    Example:
        >>> graph = to_networkx(PAG.from_edges([(0, 1, "o->")], ["storm", "sank"]))
        >>> graph["storm"]["sank"]["mark"], graph["sank"]["storm"]["mark"]
        ('arrow', 'circle')
    """
    try:
        from networkx import DiGraph
    except ImportError as error:
        raise ImportError("networkx is not installed: pip install networkx") from error
    graph = DiGraph()
    graph.add_nodes_from(pag.names)
    for a, b in np.argwhere(pag.skeleton).tolist():
        graph.add_edge(pag.names[a], pag.names[b], mark=WORDS[pag.marks[a, b]])
    return graph


def from_networkx(graph: "DiGraph") -> PAG:
    """The PAG of a graph as `to_networkx` makes it; nodes that are no strings are named by str.

    Raises:
        ValueError: the graph has one direction for both, an edge has no such mark or no mirror, or two nodes have
            the same name.
    """
    if not graph.is_directed() or graph.is_multigraph():
        raise ValueError(f"graph must be a DiGraph, each edge in both directions, got a {type(graph).__name__}")
    at = {node: n for n, node in enumerate(graph)}
    marks = np.zeros((len(at), len(at)), np.int8)
    for a, b, mark in graph.edges(data="mark"):
        if mark not in MARKS:
            raise ValueError(f"mark must be circle, arrow or tail, got {mark!r} on the edge from {a} to {b}")
        marks[at[a], at[b]] = MARKS[mark]
    return PAG(marks, tuple(map(str, at)))

"""PAGs as those of pywhy-graphs, which dodiscover searches for, and back."""

import numpy as np

from ..discovery.pag import PAG, Mark


def to_pywhy(pag: PAG):
    """Make a `pywhy_graphs.PAG`, with the names for nodes, in order.

    Its four layers hold what stands at v of a pair u, v: an arrow is v in the directed layer, or in the bidirected one
    if u has an arrow too; a circle is (u, v) in the circle layer; a tail is in no layer, but --- is undirected.

    Raises:
        ImportError: pywhy-graphs is not installed.

    Source: pywhy-graphs 0.1.0, `pywhy_graphs.PAG`.

    Example:
        >>> graph = to_pywhy(PAG.from_edges([(0, 1, "o->")], ["storm", "sank"]))  # doctest: +SKIP
        >>> graph.directed_edges, graph.circle_edges  # doctest: +SKIP
        (OutEdgeView([('storm', 'sank')]), OutEdgeView([('sank', 'storm')]))
    """
    try:
        import pywhy_graphs
    except ImportError as error:
        raise ImportError("pywhy-graphs is not installed: pip install pywhy-graphs") from error
    graph = pywhy_graphs.PAG()
    graph.add_nodes_from(pag.names)
    for a, b, symbol in pag.edges():
        ends = [(pag.names[a], pag.names[b], pag.marks[a, b]), (pag.names[b], pag.names[a], pag.marks[b, a])]
        if symbol in ("<->", "---"):
            layer = graph.bidirected_edge_name if symbol == "<->" else graph.undirected_edge_name
            graph.add_edge(pag.names[a], pag.names[b], layer)
            continue
        for u, v, at_v in ends:
            if at_v != Mark.TAIL:
                graph.add_edge(u, v, graph.circle_edge_name if at_v == Mark.CIRCLE else graph.directed_edge_name)
    return graph


def from_pywhy(graph) -> PAG:
    """The PAG of a `pywhy_graphs.PAG`; nodes that are no strings are named by str.

    Raises:
        ValueError: two layers contradict each other, an edge has an end in none, or two nodes have the same name.
    """
    nodes = list(graph.nodes)
    at = {node: n for n, node in enumerate(nodes)}
    marks = np.zeros((len(at), len(at)), np.int8)

    def put(u, v, mark: Mark) -> None:
        if marks[at[u], at[v]]:
            raise ValueError(f"layers must give one mark an end, got two for {v} on its edge with {u}")
        marks[at[u], at[v]] = mark

    for edges, mark in ((graph.bidirected_edges, Mark.ARROW), (graph.undirected_edges, Mark.TAIL)):
        for u, v in edges:
            put(u, v, mark)
            put(v, u, mark)
    for edges, mark in ((graph.directed_edges, Mark.ARROW), (graph.circle_edges, Mark.CIRCLE)):
        for u, v in edges:
            put(u, v, mark)
    # an end in no layer is a tail
    marks[(marks == Mark.NONE) & (marks.T != Mark.NONE)] = Mark.TAIL
    return PAG(marks, tuple(map(str, nodes)))

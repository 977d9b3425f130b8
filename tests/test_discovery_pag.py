"""Graphs with a mark at each end, by hand and at random, to and from the libraries that hold them otherwise."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalattn.discovery import PAG, Mark, token_names

# symbol from a to b: pcalg's M[a, b] and M[b, a], causal-learn's, and the layers of pywhy-graphs
CODES = {
    "-->": ((2, 3), (-1, 1), {"directed": "ab"}),
    "<--": ((3, 2), (1, -1), {"directed": "ba"}),
    "<->": ((2, 2), (1, 1), {"bidirected": "ab"}),
    "---": ((3, 3), (-1, -1), {"undirected": "ab"}),
    "o-o": ((1, 1), (2, 2), {"circle": "ab ba"}),
    "o->": ((2, 1), (2, 1), {"directed": "ab", "circle": "ba"}),
    "<-o": ((1, 2), (1, 2), {"directed": "ba", "circle": "ab"}),
    "o--": ((3, 1), (2, -1), {"circle": "ba"}),
    "--o": ((1, 3), (-1, 2), {"circle": "ab"}),
}
WORDS = {1: "circle", 2: "arrow", 3: "tail"}
FORMATS = ["pcalg", "networkx", "causal_learn", "pywhy"]


class FakePywhy:
    """pywhy_graphs.PAG of 0.1.0: four networkx layers, and its refusals when an edge is added."""

    directed_edge_name, bidirected_edge_name = "directed", "bidirected"
    undirected_edge_name, circle_edge_name = "undirected", "circle"

    def __init__(self):
        self.layers = {"directed": nx.DiGraph(), "bidirected": nx.Graph(), "undirected": nx.Graph(),
                       "circle": nx.DiGraph()}  # fmt: skip

    def add_nodes_from(self, nodes):
        for layer in self.layers.values():
            layer.add_nodes_from(nodes)

    def has_edge(self, u, v, edge_type):
        return self.layers[edge_type].has_edge(u, v)

    def add_edge(self, u, v, edge_type="all"):
        refused = {
            "circle": [(u, v, "directed"), (u, v, "bidirected")],
            "directed": [(u, v, "circle"), (u, v, "bidirected"), (v, u, "directed")],
            "bidirected": [(u, v, "directed"), (u, v, "circle"), (v, u, "directed"), (v, u, "circle")],
            "undirected": [],
        }[edge_type]
        if any(self.has_edge(*edge) for edge in refused):
            raise RuntimeError(f"There is already an existing edge between {u} and {v}.")
        self.layers[edge_type].add_edge(u, v)

    nodes = property(lambda self: self.layers["directed"].nodes)
    directed_edges = property(lambda self: self.layers["directed"].edges)
    bidirected_edges = property(lambda self: self.layers["bidirected"].edges)
    undirected_edges = property(lambda self: self.layers["undirected"].edges)
    circle_edges = property(lambda self: self.layers["circle"].edges)


@pytest.fixture(params=["fake", *(["real"] if find_spec("pywhy_graphs") else [])])
def pywhy(request, monkeypatch):
    """What stands for pywhy-graphs, whose release wants an older NumPy, and itself where it is installed."""
    if request.param == "fake":
        monkeypatch.setitem(sys.modules, "pywhy_graphs", SimpleNamespace(PAG=FakePywhy))


@st.composite
def pags(draw, largest=9):
    T = draw(st.integers(0, largest))
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=T, max_size=T, unique=True))
    marks = np.zeros((T, T), np.int8)
    for a, b in zip(*np.triu_indices(T, 1), strict=True):
        marks[a, b], marks[b, a] = draw(st.sampled_from([(0, 0), *(codes for codes, *_ in CODES.values())]))
    return PAG(marks, names)


def pair(symbol):
    """The edge a–b in a graph where another token comes first, so that a transposed matrix is another graph."""
    return PAG.from_edges([(1, 2, symbol), (0, 1, "-->")], ["z", "a", "b"])


@pytest.mark.parametrize("symbol", CODES)
def test_every_edge_has_its_marks_at_the_right_ends(symbol):
    pag = pair(symbol)
    at_b, at_a = CODES[symbol][0]
    assert (pag.marks[1, 2], pag.marks[2, 1]) == (at_b, at_a)
    assert list(pag.edges()) == [(0, 1, "-->"), (1, 2, symbol)] and str(pag) == f"z --> a\na {symbol} b"
    assert np.array_equal(pag.to_pcalg(), pag.marks) and pag.to_pcalg().dtype == int


@pytest.mark.parametrize("symbol", CODES)
def test_networkx_has_the_mark_at_b_on_the_way_to_b(symbol):
    graph = pair(symbol).to_networkx()
    at_b, at_a = CODES[symbol][0]
    assert (graph["a"]["b"]["mark"], graph["b"]["a"]["mark"]) == (WORDS[at_b], WORDS[at_a])
    assert list(graph) == ["z", "a", "b"] and set(graph.to_undirected().edges) == {("z", "a"), ("a", "b")}


@pytest.mark.parametrize("symbol", CODES)
def test_causal_learn_has_the_mark_at_a_in_row_a(symbol):
    pytest.importorskip("causallearn")
    graph = pair(symbol).to_causal_learn()
    at_a, at_b = CODES[symbol][1]
    assert (graph.graph[1, 2], graph.graph[2, 1]) == (at_a, at_b)
    a, b = graph.get_node("a"), graph.get_node("b")
    ends = graph.get_endpoint(a, b).name, graph.get_endpoint(b, a).name
    assert ends == tuple(WORDS[mark].upper() for mark in CODES[symbol][0])
    assert graph.is_parent_of(a, b) == (symbol == "-->") and graph.is_parent_of(b, a) == (symbol == "<--")
    assert graph.is_ancestor_of(graph.get_node("z"), b) == (symbol == "-->")


@pytest.mark.parametrize("symbol", CODES)
def test_pywhy_has_each_mark_in_its_layer(symbol, pywhy):
    graph = pair(symbol).to_pywhy()
    found = {}
    for layer in ("directed", "bidirected", "undirected", "circle"):
        edges = sorted(f"{u}{v}" for u, v in getattr(graph, f"{layer}_edges") if u != "z")
        found |= {layer: " ".join(edges)} if edges else {}
    assert found == CODES[symbol][2] and ("z", "a") in graph.directed_edges


@pytest.mark.parametrize("name", FORMATS[1:])
@given(pag=pags())
def test_what_is_sent_out_comes_back(name, pag):
    if name == "causal_learn":
        pytest.importorskip("causallearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pywhy_graphs", SimpleNamespace(PAG=FakePywhy))
        back = getattr(PAG, f"from_{name}")(getattr(pag, f"to_{name}")())
    assert back == pag and back.names == pag.names and back.marks.dtype == np.int8


@given(pag=pags())
def test_edges_and_pcalg_say_it_all(pag):
    assert PAG.from_edges(pag.edges(), pag.names) == pag == PAG.from_pcalg(pag.to_pcalg().astype(float), pag.names)
    assert len(list(pag.edges())) == pag.skeleton.sum() / 2 and (pag.skeleton == pag.skeleton.T).all()


def test_a_real_pywhy_graph_comes_back(pywhy):
    for symbol in CODES:
        assert PAG.from_pywhy(pair(symbol).to_pywhy()) == pair(symbol)


def test_the_graph_of_causal_learns_search_keeps_its_marks():
    fci = pytest.importorskip("causallearn.search.ConstraintBased.FCI").fci
    rng = np.random.default_rng(0)
    x, y, noise, hidden = rng.normal(size=(4, 3000))
    z = x + y + 0.3 * noise
    data = np.stack([x, y, z, z + 0.5 * rng.normal(size=3000) + hidden, hidden + 0.5 * rng.normal(size=3000)], 1)
    graph, edges = fci(data, "fisherz", 0.001, show_progress=False, node_names=list("xyzuv"))
    pag = PAG.from_causal_learn(graph)
    assert str(pag) == "x o-> z\ny o-> z\nz --> u\nu <-o v" and pag.names == tuple("xyzuv")
    # theirs are drawn from left to right
    assert {str(edge) for edge in edges} == {"x o-> z", "y o-> z", "z --> u", "v o-> u"}
    assert np.array_equal(pag.to_causal_learn().graph, graph.graph)


@given(pag=pags(), data=st.data())
def test_a_permuted_graph_is_the_same_by_name(pag, data):
    T = len(pag.names)
    order = data.draw(st.permutations(range(T)))
    other = pag.permuted(order)
    for n in range(T):
        assert other.names[n] == pag.names[order[n]]
        assert all(other.marks[n, m] == pag.marks[order[n], order[m]] for m in range(T))
        for kind in ("parents", "children", "ancestors"):
            for possible in (False, True):
                ours, theirs = (getattr(each, kind) for each in (other, pag))
                assert {order[m] for m in ours(n, possible=possible)} == {*theirs(order[n], possible=possible)}
    assert other.permuted([order.index(n) for n in range(T)]) == pag
    some = order[: T // 2]
    assert pag.subgraph(some) == PAG(pag.marks[np.ix_(some, some)], [pag.names[n] for n in some])


@given(pag=pags())
def test_families_are_those_of_the_symbols(pag):
    known = {symbol: nx.DiGraph() for symbol in ("certain", "possible")}
    spouses = set()
    for graph in known.values():
        graph.add_nodes_from(range(len(pag.names)))
    for a, b, symbol in pag.edges():
        for u, v, one in ((a, b, symbol), (b, a, symbol[::-1].translate(str.maketrans("<>", "><")))):
            known["certain"].add_edges_from([(u, v)] if one == "-->" else [])
            known["possible"].add_edges_from([(u, v)] if one in ("-->", "o->", "o-o", "--o") else [])
        spouses |= {(a, b), (b, a)} if symbol == "<->" else set()
    for n in range(len(pag.names)):
        assert pag.adjacent(n) == tuple(np.flatnonzero(pag.marks[n]))
        assert {(n, m) for m in pag.spouses(n)} == {pair for pair in spouses if pair[0] == n}
        for possible, graph in zip((False, True), known.values(), strict=True):
            assert {*pag.parents(n, possible=possible)} == {*graph.predecessors(n)}
            assert {*pag.children(n, possible=possible)} == {*graph.successors(n)}
            assert {*pag.ancestors(n, possible=possible)} == nx.ancestors(graph, n)


def test_a_graph_is_a_value():
    marks = np.array([[0, 2], [3, 0]])
    pag = PAG(marks)
    marks[0, 1] = 1
    assert pag.marks[0, 1] == Mark.ARROW and pag.names == ("0", "1") and repr(pag) == "PAG(2 tokens, 1 edges)"
    assert pag == PAG(pag.marks) and hash(pag) == hash(PAG(pag.marks)) and pag != PAG(marks.clip(0, 1))
    assert pag != PAG(pag.marks, ["1", "0"]) and pag != "pag" and str(PAG(np.zeros((3, 3)))) == "no edges"
    with pytest.raises(ValueError, match="read-only"):
        pag.marks[0, 1] = 1


def test_tokens_that_repeat_are_told_apart():
    assert token_names(["a", "b", "a"]) == ("a@0", "b", "a@2") and token_names([]) == ()
    assert token_names(["a", "a@2", "a"]) == ("a@0", "a@2@1", "a@2")


REFUSED = {
    r"marks must be square, \[T, T\], got \[2, 3\]": lambda: PAG(np.zeros((2, 3))),
    "marks must be 0 none, 1 circle, 2 arrow or 3 tail, got 4": lambda: PAG([[0, 4], [1, 0]]),
    "marks must be 0 none, 1 circle, 2 arrow or 3 tail, got 258": lambda: PAG([[0, 258], [1, 0]]),
    "marks must be 0 none, 1 circle, 2 arrow or 3 tail, got nan": lambda: PAG([[0, np.nan], [1, 0]]),
    "got a loop at 1": lambda: PAG([[0, 0], [0, 1]]),
    "marks must have a mark at both ends of an edge, got one at 1 and none at 0": lambda: PAG([[0, 2], [0, 0]]),
    "names must be 2, one a token, got 1": lambda: PAG(np.zeros((2, 2)), ["a"]),
    "names must be distinct, got 'a' twice; see token_names": lambda: PAG(np.zeros((2, 2)), ["a", "a"]),
    "symbol must be one of .*, got '->'": lambda: PAG.from_edges([(0, 1, "->")], "ab"),
    "got another between 1 and 0": lambda: PAG.from_edges([(0, 1, "-->"), (1, 0, "-->")], "ab"),
    "got another between 1 and 1": lambda: PAG.from_edges([(1, 1, "-->")], "ab"),
    "tokens must lie in 0…1, got -1": lambda: PAG(np.zeros((2, 2))).parents(-1),
    "tokens must lie in 0…1, got 2": lambda: PAG(np.zeros((2, 2))).subgraph([0, 2]),
    r"tokens must be distinct, got \[1, 1\]": lambda: PAG(np.zeros((2, 2))).subgraph([1, 1]),
    r"order must be a permutation of 0…1, got \[1\]": lambda: PAG(np.zeros((2, 2))).permuted([1]),
    "graph must be a DiGraph, each edge in both directions, got a Graph": lambda: PAG.from_networkx(nx.Graph()),
    "mark must be circle, arrow or tail, got None on the edge from a to b": (
        lambda: PAG.from_networkx(nx.DiGraph([("a", "b")]))
    ),
    "got one at 1 and none at 0": lambda: PAG.from_networkx(nx.DiGraph([("a", "b", {"mark": "arrow"})])),
    "names must be distinct, got '1' twice": lambda: PAG.from_networkx(nx.empty_graph(["1", 1], nx.DiGraph)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_graph_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="names must be strings, got 1"):
        PAG(np.zeros((2, 2)), ["a", 1])


def test_two_edges_between_two_tokens_are_refused():
    fake = FakePywhy()
    fake.layers["directed"].add_edge("a", "b")
    fake.layers["bidirected"].add_edge("a", "b")
    with pytest.raises(ValueError, match="layers must give one mark an end, got two for b on its edge with a"):
        PAG.from_pywhy(fake)
    pytest.importorskip("causallearn")
    graph = pair("o-o").to_causal_learn()
    graph.graph[1, 2] = graph.graph[2, 1] = 4
    with pytest.raises(ValueError, match="graph must have single edges of tails, arrows and circles, got a mark 4"):
        PAG.from_causal_learn(graph)


@pytest.mark.parametrize(
    ("name", "module"), [("networkx", "networkx"), ("causal-learn", "causallearn"), ("pywhy-graphs", "pywhy_graphs")]
)
def test_an_absent_library_is_named(name, module, monkeypatch):
    for loaded in [each for each in sys.modules if each.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name} is not installed: pip install {name}"):
        getattr(pair("o->"), f"to_{name.replace('-graphs', '').replace('-', '_')}")()

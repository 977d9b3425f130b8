"""Random DAGs with latent and selected nodes, and marks written as text, for the tests of causal discovery."""

import itertools
import re
from itertools import combinations

import numpy as np

# shares of edges, latent and selected nodes
SHAPES = list(itertools.product((0.8, 1.2, 2.0), (0, 0.2, 0.4), (0, 0.3)))
MARKS = {"": 0, "o": 1, "<": 2, ">": 2, "-": 3}


def random_dag(seed, T, *, degree=2.5, latents=0.3, selected=0.0):
    """(dag, observed, selected): about `degree` edges a node, and shares of T more nodes that are latent or selected.

    A latent node has two or more children among the others and no parents, a selected one two parents and no children,
    and the observed nodes stand in random order.
    """
    rng = np.random.default_rng(seed)
    hidden, chosen = (int(rng.binomial(round(2 * share * T), 0.5)) for share in (latents, selected))
    N = T + hidden + chosen
    seen = rng.permutation(T)
    dag = np.zeros((N, N), bool)
    for a in range(T):
        for b in range(a):
            dag[seen[b], seen[a]] = rng.random() < degree / max(T - 1, 1)
    for node in range(T, T + hidden):
        dag[node, rng.choice(T, min(T, 2 + int(rng.random() < 0.3)), replace=False)] = True
    for node in range(T + hidden, N):
        dag[rng.choice(T + hidden, 2, replace=False), node] = True
    return dag, list(range(T)), list(range(T + hidden, N))


def causal_order(dag, observed):
    """The observed nodes, as positions in `observed`, causes first."""
    remaining, order = set(range(len(dag))), []
    while remaining:
        first = min(b for b in remaining if not any(dag[a, b] for a in remaining))
        remaining.remove(first)
        order.append(first)
    return [list(observed).index(node) for node in order if node in observed]


def graph(text, T=None):
    """marks from edges such as "0 o-> 1, 1 <-> 2, 2 --- 3, 0 o-o 3, 1 --> 3, 3 -o 4"."""
    edges = [re.fullmatch(r"(\d+) ([<o-])-([>o-]) (\d+)", edge.strip()) for edge in text.split(",") if edge.strip()]
    ends = [(int(e[1]), MARKS[e[2]], MARKS[e[3]], int(e[4])) for e in edges]
    T = T or 1 + max(max(a, b) for a, _, _, b in ends)
    marks = np.zeros((T, T), np.int8)
    for a, at_a, at_b, b in ends:
        marks[a, b], marks[b, a] = at_b, at_a
    return marks


def dag_of(text, N=None):
    """A DAG from edges such as "0>1 2>1"."""
    edges = [tuple(map(int, edge.split(">"))) for edge in text.split()]
    N = N or 1 + max(max(edge) for edge in edges)
    dag = np.zeros((N, N), bool)
    for a, b in edges:
        dag[a, b] = True
    return dag


def permuted(marks, order):
    """The graph whose node k is node order[k] of this one."""
    return marks[np.ix_(order, order)]


def draws(request):
    """draw(T, count): random (dag, observed, selected) of the shape that a fixture's request is for."""
    degree, latents, selected = request.param
    times = 10 if request.config.getoption("--full") else 1

    def draw(T, count):
        for seed in range(count * times):
            yield random_dag(seed, T, degree=degree, latents=latents, selected=selected)

    return draw


def subsets(items):
    return (S for size in range(len(items) + 1) for S in combinations(items, size))


def queries(T):
    """(x, y, given) of T nodes."""
    for x, y in combinations(range(T), 2):
        for given in subsets([z for z in range(T) if z not in (x, y)]):
            yield x, y, given

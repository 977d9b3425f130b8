"""Explanations of a prediction by the graph of its attention: the smallest sets of tokens that it hangs on."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .discover import Discovery
from .marks import Marks, tokens_of
from .trees import Tree

# sets of tokens, and a target → of each set whether the prediction at the target changes without it
Tester = Callable[[list[tuple[int, ...]], int], Sequence[bool]]


class Explanation(NamedTuple):
    """A set of tokens and the sum of its tokens' distances from the target, in the graph that has it nearest."""

    tokens: tuple[int, ...]
    distance: int


class Explanations(NamedTuple):
    """The explanations of least size, nearest first; tested: how many sets were put to the tester."""

    found: list[Explanation]
    tested: int


def explain(
    discoveries: Discovery | Iterable[Discovery],
    target: int,
    tester: Tester,
    *,
    max_size: int | None = None,
    max_range: int | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Explanations:
    """Find the smallest sets of tokens without which a prediction changes, among those its graph connects to it.

    Candidates of one size are the sets of the target's tree of possible d-separators each of whose tokens is reached
    within the set, of all the graphs together: a head's graph explains what that head does. All of one size are tested,
    in batches; the first size at which some change the prediction is the last.

    Args:
        discoveries: what `discover` found, one or one a head, over the same tokens.
        target: the token explained.
        tester: called with at most `batch` sets and target, returns whether each changes the prediction.
        max_size: of a set; as many as there are by default.
        max_range: the most steps from the target.
        batch: sets a call.
        progress: called with how many sets were tested, and how many there are up to the size at hand.

    Raises:
        ValueError: no graph, graphs over other tokens, a target outside them, a size or batch below 1, or a tester that
            does not answer every set.

    Source: CLEANN of Rohekar et al. 2023 (arXiv:2310.20307).

    Example:
        >>> import causalattn as ca
        >>> found = ca.discovery.discover(torch.tensor([[1, 0.5, 0.1], [0.5, 1, 0.4], [0.1, 0.4, 1.0]]), cut=0.3)
        >>> explain(found, 0, lambda sets, target: [1 in tokens for tokens in sets])
        Explanations(found=[Explanation(tokens=(1,), distance=1)], tested=1)
    """
    graphs = [discoveries] if isinstance(discoveries, Discovery) else list(discoveries)
    if not graphs:
        raise ValueError("discoveries must hold at least one graph, got none")
    names = graphs[0].pag.names
    if any(graph.pag.names != names for graph in graphs):
        raise ValueError("discoveries must be over the same tokens, got graphs with other names")
    T = len(names)
    if not 0 <= target < T:
        raise ValueError(f"target must lie in 0…{T - 1}, got {target}")
    for name, value in (("max_size", max_size), ("max_range", max_range), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    trees = [Tree(Marks(graph.pag.marks), target, (1 << T) - 1) for graph in graphs]
    depth = T if max_range is None else max_range
    far = [_distances(tree, T, depth) for tree in trees]
    tested = 0
    for size in range(1, min(T - 1, max_size or T) + 1):
        sets = _candidates(trees, far, size, depth)
        if not sets:
            break
        hits = []
        for n in range(0, len(sets), batch):
            some = sets[n : n + batch]
            answers = list(tester([each.tokens for each in some], target))
            if len(answers) != len(some):
                raise ValueError(f"tester must answer each of the {len(some)} sets, got {len(answers)} answers")
            hits += [each for each, changes in zip(some, answers, strict=True) if changes]
            if progress is not None:
                progress(tested + n + len(some), tested + len(sets))
        tested += len(sets)
        if hits:
            return Explanations(hits, tested)
    return Explanations([], tested)


def _candidates(trees: list[Tree], far: list[dict[int, int]], size: int, depth: int) -> list[Explanation]:
    """The sets of a size of all trees, by their least sum of distances and then in lexical order."""
    nearest: dict[tuple[int, ...], int] = {}
    for tree, distance in zip(trees, far, strict=True):
        for members in tree.sets(size, depth):
            tokens = tuple(tokens_of(members))
            total = sum(distance[t] for t in tokens)
            nearest[tokens] = min(total, nearest.get(tokens, total))
    return [Explanation(*each) for each in sorted(nearest.items(), key=lambda each: (each[1], each[0]))]


def _distances(tree: Tree, T: int, depth: int) -> dict[int, int]:
    """Of each token the steps of its shortest path."""
    distance: dict[int, int] = {}
    for steps, reached in enumerate(tree.levels((1 << T) - 1, depth), 1):
        for token in tokens_of(reached):
            distance.setdefault(token, steps)
    return distance

"""A search whose tests are any function of a pair and a set, such as d-separation in a known graph."""

import numpy as np
import torch

from causalattn.discovery.background import Background, start_of
from causalattn.discovery.icd import icd
from causalattn.partial_corr import LevelTests
from causalattn.reference import discovery as reference


def by_levels(independent):
    """A test of single pairs, (whether, size) of i, j and a set, as one of levels."""

    def test(adjacency, order, candidates):
        T = len(adjacency)
        least, given = {}, np.full((T, T, order), -1)
        r, separated = np.full((T, T), np.nan), np.zeros((T, T), bool)
        for i, j, S in asked(adjacency.numpy(), order, candidates):
            yes, size = independent(i, j, S)
            least[i, j] = min(least.get((i, j), (True, np.inf, ())), (not yes, size, S))
        for (i, j), (no, size, S) in least.items():
            r[i, j] = r[j, i] = size
            given[i, j] = given[j, i] = S
            separated[i, j] = separated[j, i] = not no
        arrays = (r, given, separated, np.array(len(least)), np.array(0))
        return LevelTests(*map(torch.from_numpy, arrays))

    return test


def asked(adjacency, order, candidates):
    if candidates is not None:
        for node, S in zip(candidates.node.tolist(), candidates.given.tolist(), strict=True):
            for j in np.flatnonzero(candidates.others[node].numpy()).tolist():
                ancestors = candidates.ancestors
                if j not in S and (ancestors is None or all(ancestors[z, node] or ancestors[z, j] for z in S)):
                    yield min(node, j), max(node, j), tuple(S)
        return
    for i, j in zip(*np.triu(adjacency).nonzero(), strict=True):
        near = (adjacency[i] | adjacency[j]).nonzero()[0].tolist()
        for S in [()] if order == 0 else [(k,) for k in near if k not in (i, j)]:
            yield int(i), int(j), S


def exact(dag, observed, selected):
    """The tests that d-separation answers, each once."""
    answers, ask = {}, reference.oracle(dag, observed, selected)

    def independent(i, j, S):
        if (i, j, S) not in answers:
            answers[i, j, S] = bool(ask(i, j, S))
        return answers[i, j, S], 0.0

    return independent


def found_by(independent, T, **options):
    """The last state of the search with these tests."""
    *_, last = icd(by_levels(independent), start_of(T, Background(), options.get("order"))[0], **options)
    return last

"""How often searches with exact tests give the true graph: ours, and causality-lab's ICD where it can be imported.

    PYTHONPATH=tests:CAUSALITY_LAB python bench/oracle_agreement.py [--graphs 200]

Random DAGs over 8 to 10 observed nodes with latent ones, then with selected ones too (tests/graphs.py).
"""

import argparse
import importlib.util
import time

import numpy as np
from exact_search import exact, found_by
from graphs import random_dag

from causalattn.reference.discovery.truth import true_pag


class Oracle:
    """What causality-lab asks for."""

    def __init__(self, independent):
        self.cond_indep = lambda x, y, given: independent(x, y, tuple(sorted(given)))[0]


def causality_lab(T, independent):
    from causal_discovery_algs.icd import LearnStructICD

    found = LearnStructICD(set(range(T)), Oracle(independent), is_selection_bias=True)
    found.learn_structure()
    return found.graph.get_adj_mat()


def ours(T, independent):
    return found_by(independent, T).marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=200)
    count = parser.parse_args().graphs
    peers = {"causalattn": ours}
    if importlib.util.find_spec("causal_discovery_algs"):
        peers["causality-lab ICD"] = causality_lab
    print("| | graphs | equal to the truth | edges wrong | marks wrong | failed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for selected in (0.0, 0.2):
        for name, search_by in peers.items():
            equal = edges = marks = failed = 0
            began = time.perf_counter()
            for seed in range(count):
                T = 8 + seed % 3
                dag, observed, chosen = random_dag(seed, T, selected=selected)
                truth = true_pag(dag, observed, chosen)
                try:
                    found = search_by(T, exact(dag, observed, chosen))
                except Exception:  # a peer that breaks is counted, whatever it raises
                    failed += 1
                    continue
                same = np.array_equal(found != 0, truth != 0)
                equal += np.array_equal(found, truth)
                edges, marks = edges + (not same), marks + (same and not np.array_equal(found, truth))
            took = time.perf_counter() - began
            row = f"{name}{', selection' if selected else ''} | {count} | {equal} | {edges} | {marks} | {failed}"
            print(f"| {row} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()

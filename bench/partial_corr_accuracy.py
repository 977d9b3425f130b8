"""How far partial correlations are from 50 digits, and how many decisions at n = 768, α = 0.01 they turn.

    python bench/partial_corr_accuracy.py [--tests 300]

64 tokens, random logits, A rounded to float32. inverse: −K_ij / √(K_ii K_jj), as in causal-learn and causality-lab. A
SINGULAR test decides nothing; an inverse that fails, or an r that is no number, counts as r = 1.
"""

import argparse

import mpmath
import numpy as np
import torch

import causalattn as ca

T = 64
CUT = ca.critical_correlation(768, 0.01, 0)
CASES = {
    "near uniform": {"spread": 0.1},
    "causal": {"causal": True},
    "causal, sink 4": {"causal": True, "sink": 4.0},
    "causal, sink 8": {"causal": True, "sink": 8.0},
}


def attention(rng: np.random.Generator, spread: float = 1.0, causal: bool = False, sink: float = 0.0) -> np.ndarray:
    logits = rng.normal(size=(T, T)) * spread
    logits[:, 0] += sink
    if causal:
        logits[~np.tri(T, dtype=bool)] = -np.inf
    A = np.exp(logits - logits.max(1, keepdims=True))
    return (A / A.sum(1, keepdims=True)).astype(np.float32).astype(np.float64)


def exact(A: np.ndarray, tokens: list[int]) -> float:
    """r of the last two rows given the others, by elimination with 50 digits."""
    with mpmath.workdps(50):
        rows = [[mpmath.mpf(float(x)) for x in A[t]] for t in tokens]
        gram = mpmath.matrix([[mpmath.fdot(x, y) for y in rows] for x in rows])
        n = len(tokens)
        for s in range(n - 2):
            for a in range(s + 1, n):
                for b in range(s + 1, n):
                    gram[a, b] -= gram[a, s] * gram[s, b] / gram[s, s]
        return float(gram[n - 2, n - 1] / mpmath.sqrt(gram[n - 2, n - 2] * gram[n - 1, n - 1]))


def inverse(R: np.ndarray, tokens: list[int]) -> float:
    try:
        K = np.linalg.inv(R[np.ix_(tokens, tokens)])
    except np.linalg.LinAlgError:
        return np.nan
    return -K[-1, -2] / np.sqrt(K[-1, -1] * K[-2, -2])


def cell(r: np.ndarray, truth: np.ndarray, decided: np.ndarray) -> str:
    """Largest error, decisions turned, tests that decide nothing."""
    turned = decided & ((np.abs(r) < CUT) != (np.abs(truth) < CUT))
    error = np.nanmax(np.abs(r - truth)[decided], initial=0.0)
    return f"{error:.0e} / {turned.sum()} / {(~decided).sum()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=300)
    count = parser.parse_args().tests
    print("| case, given tokens | float64 | float32 | float32 and rows | inverse, float64 | inverse, float32 |")
    print("|---|---|---|---|---|---|")
    for name, shape in CASES.items():
        for k in (1, 3, 6):
            rng = np.random.default_rng(k)
            A = attention(rng, **shape)
            R = ca.dense.correlation(torch.from_numpy(A))
            tokens = np.stack([rng.permutation(T)[: k + 2] for _ in range(count)])
            truth = np.array([exact(A, row.tolist()) for row in tokens])
            tests = [torch.from_numpy(x.copy()) for x in (tokens[:, k], tokens[:, k + 1], tokens[:, :k])]
            found = [
                ca.partial_correlation(R, *tests),
                ca.partial_correlation(R.float(), *tests),
                ca.partial_correlation(R.float(), *tests, rows=torch.from_numpy(A).float()),
            ]
            cells = [cell(r.double().numpy(), truth, (status != ca.Status.SINGULAR).numpy()) for r, status in found]
            for matrix in (R.numpy(), R.float().numpy()):
                r = np.array([inverse(matrix, row.tolist()) for row in tokens], np.float64)
                cells.append(cell(np.nan_to_num(r, nan=1.0, posinf=1.0, neginf=-1.0), truth, np.ones(count, bool)))
            print(f"| {name}, {k} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

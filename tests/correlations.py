"""Correlation matrices of attention rows for the tests: random ones, and those that break arithmetic."""

import numpy as np
import torch
from helpers import DEVICE

# what r of a test may be wrong by: so many roundings of R over its smallest pivot
ROUNDINGS = 16


def attention(T, *, spread=1.0, causal=False, sink=0.0, S=None, seed=0):
    """A [T, S] of random logits of that standard deviation, key 0 favoured by sink, in float32 as NumPy float64."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, S or T)) * spread
    logits[:, 0] += sink
    if causal:
        logits[~np.tri(*logits.shape, dtype=bool)] = -np.inf
    A = np.exp(logits - logits.max(1, keepdims=True))
    return (A / A.sum(1, keepdims=True)).astype(np.float32).astype(np.float64)


def correlation(A):
    """R of rows, in float64."""
    C = A @ A.T
    scale = np.sqrt(np.diag(C))
    R = C / np.outer(scale, scale)
    np.fill_diagonal(R, 1.0)
    return R


def smallest_pivot(R, tokens):
    """Of the factor of R[S, i, j], j's pivot being what S alone leaves."""
    *S, i, j = tokens
    last = [np.linalg.cholesky(R[np.ix_([*S, t], [*S, t])]).diagonal()[-1] for t in (i, j)]
    return min([*np.linalg.cholesky(R[np.ix_(S, S)]).diagonal(), *last]) ** 2


def tensor(x, dtype=torch.float64):
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE, dtype)


def some_tests(T, N, m, seed=0, padded=True):
    """i, j [N] and given [N, m], where every third set lacks a member and every seventh has none, padded with −1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(T, generator=generator)[: m + 2] for _ in range(N)])
    given = tokens[:, :m].clone()
    if m and padded:
        given[::3, torch.randint(m, (), generator=generator)] = -1
        given[::7] = -1
    return tokens[:, m].to(DEVICE), tokens[:, m + 1].to(DEVICE), given.to(DEVICE)

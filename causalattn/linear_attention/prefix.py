"""The torch path: decayed prefix products in groups of chunks, every product of one fixed shape."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
# rows whose pairs are decayed one by one, where every channel decays by itself
ROWS = 16
# tokens whose chunks are multiplied in one call
GROUP = 1024


def prefix_product(
    a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, state: Tensor, channels: Literal["contracted", "output"]
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_{s ≤ t} e^{G_t − G_s} (a_t·b_s) c_s + e^{G_t} a_t·S_0, and S = Σ_s e^{G_T − G_s} b_s c_sᵀ + e^{G_T} S_0.

    Of some heads: a, b [heads, T, D], c [heads, T, V], state S_0 [heads, D, V]; decay None, [heads, T, 1] or one of
    each channel, [heads, T, D] if a's and b's are contracted under it and [heads, T, V] if it is of the output's. G is
    decay cumulated, inclusive. T is a multiple of CHUNK.
    """
    y = torch.empty_like(c)
    for first in range(0, a.shape[1], GROUP):
        tokens = slice(first, first + GROUP)
        chunks = (None if x is None else _chunks(x[:, tokens]) for x in (a, b, c, decay))
        inside, state = _group(*chunks, state, channels == "contracted")
        y[:, tokens] = inside.unflatten(0, (len(y), -1)).flatten(1, 2)
    return y, state


def _chunks(x: Tensor) -> Tensor:
    """[heads, tokens, …] as [heads · chunks, CHUNK, …], in one piece."""
    return x.unflatten(1, (-1, CHUNK)).flatten(0, 1).contiguous()


def _group(
    a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, state: Tensor, contracted: bool
) -> tuple[Tensor, Tensor]:
    """y of each head's consecutive chunks [heads · chunks, CHUNK, …], and the states behind them."""
    if decay is None:
        inside, over = (a @ b.mT).tril_() @ c, None
    else:
        # in float64 a small difference of large sums stays right
        G = decay.double().cumsum(1)
        into, onto, over = (x.to(a.dtype).exp() for x in (G, G[:, -1:] - G, G[:, -1:]))
        if decay.shape[2] == 1:
            inside, contracted = (a @ b.mT).mul_(_pairs(G, a.dtype)) @ c, False
        elif contracted:
            inside = _decayed_products(a, b, G) @ c
        else:
            inside = _decayed_sums(a @ b.mT, c, G)
        if contracted:
            a, b, over = a * into, b * onto, over.mT
        else:
            c = c * onto
    states, state = _states(b.mT @ c, over, state)
    if decay is None or contracted:
        return torch.baddbmm(inside, a, states), state
    return inside.add_((a @ states).mul_(into)), state


def _states(added: Tensor, over: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before every chunk, of what each adds and of what is left of one over it, and those behind the last."""
    heads = len(state), -1
    states, added = torch.empty_like(added), added.unflatten(0, heads)
    before, over = states.unflatten(0, heads), None if over is None else over.unflatten(0, heads)
    for i in range(added.shape[1]):
        before[:, i] = state
        state = added[:, i] + (state if over is None else over[:, i] * state)
    return states, state


def _pairs(G: Tensor, dtype: torch.dtype) -> Tensor:
    """e^{G_t − G_s} for s ≤ t and 0 elsewhere, G [n, CHUNK, 1]: [n, CHUNK, CHUNK]."""
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=G.device).triu_(1)
    return (G - G.mT).to(dtype).masked_fill_(future, -torch.inf).exp_()


def _kept(G: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Of each row s of runs G [n, ROWS, channels]: s and e^{G_t − G_s} of the rows t ≥ s."""
    for s in range(ROWS):
        yield s, (G[:, s:] - G[:, s : s + 1]).to(dtype).exp_()


def _halves(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of every run of 2·rows rows, [runs, rows, …]."""
    return x.reshape(-1, 2, rows, *x.shape[2:]).unbind(1)


def _factors(G: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """e^{G_m − G_s} of the earlier rows s, the last of them m, and e^{G_t − G_m} of the later rows t: none above 1."""
    early, late = _halves(G, rows)
    middle = early[:, -1:]
    return (middle - early).to(dtype).exp_(), (late - middle).to(dtype).exp_()


def _runs(x: Tensor, rows: int) -> Tensor:
    """Runs of rows against themselves in [n, CHUNK, CHUNK]: a view [n, runs, rows, rows]."""
    runs = CHUNK // rows
    return x.unflatten(2, (runs, rows)).unflatten(1, (runs, rows)).diagonal(dim1=1, dim2=3).movedim(3, 1)


def _decayed_products(a: Tensor, b: Tensor, G: Tensor) -> Tensor:
    """Σ_d a_td b_sd e^{G_td − G_sd} for s ≤ t in a chunk, 0 elsewhere: [n, CHUNK, CHUNK]."""
    n, D = a.shape[0], a.shape[2]
    product = a.new_zeros(n, CHUNK, CHUNK)
    rows = CHUNK // 2
    while rows >= ROWS:
        before, after = _factors(G, rows, a.dtype)
        tile = (_halves(a, rows)[1] * after) @ (_halves(b, rows)[0] * before).mT
        _runs(product, 2 * rows)[:, :, rows:, :rows] = tile.unflatten(0, (n, -1))
        rows //= 2
    tile = product.new_zeros(n * CHUNK // ROWS, ROWS, ROWS)
    left, right, G = (x.reshape(-1, ROWS, D) for x in (a, b, G))
    for i, kept in _kept(G, a.dtype):
        tile[:, i:, i] = kept.mul_(left[:, i:]).mul_(right[:, i : i + 1]).sum(-1)
    _runs(product, ROWS).copy_(tile.unflatten(0, (n, -1)))
    return product


def _decayed_sums(product: Tensor, c: Tensor, G: Tensor) -> Tensor:
    """Σ_{s ≤ t} product_ts e^{G_tv − G_sv} c_sv in a chunk: [n, CHUNK, V]."""
    V = c.shape[2]
    y = torch.zeros_like(c)
    sums, values = y.view(-1, ROWS, V), c.reshape(-1, ROWS, V)
    tile = _runs(product, ROWS).reshape(-1, ROWS, ROWS, 1)
    for i, kept in _kept(G.reshape(-1, ROWS, V), c.dtype):
        sums[:, i:] += kept.mul_(tile[:, i:, i]).mul_(values[:, i : i + 1])
    rows = ROWS
    while rows < CHUNK:
        before, after = _factors(G, rows, c.dtype)
        tile = _runs(product, 2 * rows)[:, :, rows:, :rows].reshape(-1, rows, rows)
        _halves(y, rows)[1].add_((tile @ (_halves(c, rows)[0] * before)).mul_(after))
        rows *= 2
    return y


def padded(x: Tensor) -> Tensor:
    """x with zero rows appended up to whole chunks, x itself where there are."""
    missing = -x.shape[-2] % CHUNK
    return F.pad(x, (0, 0, 0, missing)) if missing else x

"""The specification of attention, in NumPy float64."""

from collections.abc import Sequence

import numpy as np


def scores(
    q: np.ndarray,
    k: np.ndarray,
    seen: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    offset: int | None = None,
) -> np.ndarray:
    """S_ij = scale·q_i·k_j, softcap·tanh(S / softcap), + bias_ij − slope_h·|i + offset − j|, −∞ where seen forbids.

    seen bool [B or 1, T, S], alibi_slopes [H] or [B, H]; offset is S − T by default.
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    x = np.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        x = softcap * np.tanh(x / softcap)
    if bias is not None:
        x = x + bias.astype(np.float64)
    if alibi_slopes is not None:
        T, S = x.shape[2:]
        p = np.arange(T)[:, None] + (S - T if offset is None else offset)
        x = x - alibi_slopes.astype(np.float64)[..., None, None] * np.abs(p - np.arange(S))
    return np.where(seen[:, None], x, -np.inf)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seen: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: np.ndarray | None = None,
    offset: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out_i = Σ_j A_ij v_j with A_ij = exp(S_ij − lse_i), lse_i = log(Σ_j exp(S_ij) + exp(sink)).

    q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V], seen bool [B or 1, T, S], sink [H];
    returns out [B, H, T, V], lse [B, H, T] and A [B, H, T, S]; a row that sees nothing gives 0, −∞ and 0.
    """
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "offset": offset}
    x = scores(q, k, seen, **options)
    lse = log_sum_exp(x, sink)
    probs = np.exp(x - np.where(np.isneginf(lse), 0.0, lse)[..., None])
    v = np.repeat(v.astype(np.float64), q.shape[1] // v.shape[1], axis=1)
    return np.einsum("bhts,bhsv->bhtv", probs, v), lse, probs


def log_sum_exp(x: np.ndarray, sink: np.ndarray | None = None) -> np.ndarray:
    """log(Σ_j exp(x_ij) + exp(sink)), [B, H, T]; −∞ where every x_ij is, whatever the sink."""
    lse = np.logaddexp.reduce(x, axis=-1)
    if sink is not None:
        lse = np.where(np.isneginf(lse), lse, np.logaddexp(lse, sink.astype(np.float64)[:, None]))
    return lse


def attention_rows(
    q: np.ndarray, k: np.ndarray, rows: Sequence[int], seen: np.ndarray, **options: np.ndarray | float | None
) -> np.ndarray:
    """The chosen rows of A, [B, H, R, S]; options as in `attention`."""
    return attention(q, k, k, seen, **options)[2][:, :, np.asarray(rows, dtype=int)]


def attention_topk(A: np.ndarray, seen: np.ndarray, n: int, order: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """The n largest of each row of A [B, H, T, S], ties to the smaller key, and their keys; 0 and −1 for none.

    order: what decides, [B, H, T, S], such as the scores, where A underflows; A by default.
    """
    order = np.where(seen[:, None], A if order is None else order, -np.inf)
    indices = np.argsort(-order, axis=-1, kind="stable")[..., :n]
    left = np.take_along_axis(order, indices, -1) > -np.inf
    values = np.where(left, np.take_along_axis(A, indices, -1), 0.0)
    pad = [(0, 0)] * 3 + [(0, n - indices.shape[-1])]
    return np.pad(values, pad), np.pad(np.where(left, indices, -1), pad, constant_values=-1)


def attention_map(A: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum of A [B, H, T, S] over cells cut at ⌊c·T/R⌋ and ⌊c·S/C⌋; R = min(cells, T), C alike."""
    T, S = A.shape[2:]
    mean, largest = np.zeros((2, *A.shape[:2], min(cells, T), min(cells, S)))
    for r in range(mean.shape[2]):
        for c in range(mean.shape[3]):
            rows = slice(r * T // mean.shape[2], (r + 1) * T // mean.shape[2])
            tile = A[:, :, rows, c * S // mean.shape[3] : (c + 1) * S // mean.shape[3]]
            mean[:, :, r, c], largest[:, :, r, c] = tile.mean((2, 3)), tile.max((2, 3))
    return mean, largest

"""The specification of attention, in NumPy float64."""

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

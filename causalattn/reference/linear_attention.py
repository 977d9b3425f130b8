"""The specification of linear attention, in NumPy float64, token by token."""

from collections.abc import Callable, Sequence

import numpy as np


def taylor2(x: np.ndarray) -> np.ndarray:
    """1, x, x⊗x of x/D^¼, weighted so that φ(q)·φ(k) = 1 + s + s²/2, s = q·k/√D."""
    x = x / x.shape[-1] ** 0.25
    pairs = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return np.concatenate([np.ones_like(x[..., :1]), x, pairs / np.sqrt(2)], -1)


FEATURE_MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "identity": lambda x: x,
    "taylor2": taylor2,
}


def linear_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    feature_map: str | Callable[[np.ndarray], np.ndarray] = "elu",
    decay: np.ndarray | None = None,
    causal: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: tuple[np.ndarray, np.ndarray] | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ, z_t = e^{g_t} z_{t−1} + φ(k_t), out_t = scale·φ(q_t)·S_t (/ φ(q_t)·z_t).

    q [B, H, T, D], k [B, H_kv, T, D], v [B, H_kv, T, V], decay g None, [H], [B, H, T] or [B, H, T, F]; a zero
    denominator gives 0. Returns out [B, H, T, V] and the state (S [B, H, F, V], z [B, H, F]), [segments, H, …] with
    cu_seqlens; rows beyond its end give 0. Without causal every query reads the last state.
    """
    B, H, T, _ = q.shape
    phi = FEATURE_MAPS.get(feature_map, feature_map)
    group = H // k.shape[1]
    a, b = (phi(x.astype(np.float64)) for x in (q, np.repeat(k, group, axis=1)))
    c = np.repeat(v.astype(np.float64), group, axis=1)
    g = np.zeros((B, H, T, 1)) if decay is None else decay.astype(np.float64)
    g = np.broadcast_to(g[:, None], (B, H, T))[..., None] if g.ndim == 1 else g if g.ndim == 4 else g[..., None]
    edges = [(n, 0, T) for n in range(B)] if cu_seqlens is None else [(0, *e) for e in zip(cu_seqlens, cu_seqlens[1:])]  # noqa: B905, RUF007
    out = np.zeros((B, H, T, v.shape[3]))
    s, z = np.zeros((len(edges), H, a.shape[-1], v.shape[3])), np.zeros((len(edges), H, a.shape[-1]))
    if initial_state is not None:
        s[:], z[:] = initial_state

    def read(n: int, row: int, t: int) -> np.ndarray:
        num, den = np.einsum("hf,hfv->hv", a[row, :, t], s[n]), np.einsum("hf,hf->h", a[row, :, t], z[n])[:, None]
        if not normalize:
            return scale * num
        return np.where(den == 0, 0.0, num / np.where(den == 0, 1.0, den))

    for n, (row, start, stop) in enumerate(edges):
        for t in range(start, stop):
            kept = np.exp(g[row, :, t])
            s[n] = kept[..., None] * s[n] + b[row, :, t, :, None] * c[row, :, t, None]
            z[n] = kept * z[n] + b[row, :, t]
            if causal:
                out[row, :, t] = read(n, row, t)
        if not causal:
            for t in range(start, stop):
                out[row, :, t] = read(n, row, t)
    return out, (s, z)

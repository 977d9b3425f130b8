"""The specification of the selective scan, in NumPy float64, token by token."""

import numpy as np


def selective_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    z: np.ndarray | None = None,
    *,
    initial_state: np.ndarray | None = None,
    discretization: str = "zoh",
) -> tuple[np.ndarray, np.ndarray]:
    """h_t = e^{Δ_t A} h_{t−1} + B̄_t u_t, out_t = (Σ_n C_tn h_tn + D u_t)·silu(z_t).

    u, delta, z [B, T, E], A [E, N], B and C [B, T, N], D [E], initial_state [B, E, N]; B̄ = (e^{ΔA} − 1)/A·B ("zoh",
    Δ·B where A = 0) or Δ·B ("euler"); returns out [B, T, E] and the last state [B, E, N].
    """
    u, delta, A, B, C = (x.astype(np.float64) for x in (u, delta, A, B, C))
    h = np.zeros((u.shape[0], *A.shape)) if initial_state is None else initial_state.astype(np.float64)
    out = np.zeros(u.shape)
    for t in range(u.shape[1]):
        x = delta[:, t, :, None] * A
        held = np.broadcast_to(delta[:, t, :, None], x.shape)
        if discretization == "zoh":
            held = np.divide(np.expm1(x), A, out=held.copy(), where=A != 0)
        h = np.exp(x) * h + held * B[:, t, None] * u[:, t, :, None]
        out[:, t] = np.einsum("ben,bn->be", h, C[:, t])
    if D is not None:
        out += D.astype(np.float64) * u
    if z is not None:
        z = z.astype(np.float64)
        # the half of silu that does not overflow
        out *= z * np.where(z < 0, np.exp(np.minimum(z, 0)), 1.0) / (1 + np.exp(-np.abs(z)))
    return out, h

"""The specification of edge effects, in NumPy float64: each edge changed in turn, its row's softmax formed again."""

import numpy as np

from .attention import attention_map, attention_topk, scores


def edge_effects(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seen: np.ndarray,
    *,
    kind: str = "cut",
    strength: float | None = None,
    measure: str = "norm",
    readout: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    **logits: np.ndarray | float | None,
) -> np.ndarray:
    """The effect of each edge, [B, H, T, S], 0 where it is forbidden; logits as in `scores`."""
    x = scores(q, k, seen, **logits)
    B, H, T, S = x.shape
    allowed = np.isfinite(x)
    v = np.repeat(v.astype(np.float64), H // v.shape[1], axis=1)
    # a learned sink is one more key, whose value is 0
    extra = np.full(H, -np.inf) if sink is None else sink.astype(np.float64)
    x = np.concatenate([x, np.broadcast_to(extra[:, None, None], (B, H, T, 1))], -1)
    v = np.concatenate([v, np.zeros((B, H, 1, v.shape[-1]))], 2)
    before = log_softmax(x)
    effects = np.zeros((B, H, T, S))
    for j in range(S):
        changed = x.copy()
        if kind == "hard":
            changed[...] = -np.inf
            changed[..., j] = 0.0
        else:
            changed[..., j] += -np.inf if kind == "cut" else strength
        after = log_softmax(changed)
        if measure == "kl":
            effect = divergence(after, before)
        else:
            # the difference of the probabilities, not of the outputs: they may be large and alike
            moved = (np.exp(after) - np.exp(before)) @ v
            effect = np.linalg.norm(moved, axis=-1) if measure == "norm" else (readout * moved).sum(-1)
        effects[..., j] = np.where(allowed[..., j], effect, 0.0)
    return effects


def log_softmax(x: np.ndarray) -> np.ndarray:
    """log of the softmax over the last axis, −∞ throughout where every score is."""
    largest = x.max(-1, keepdims=True)
    shifted = x - np.where(np.isneginf(largest), 0.0, largest)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return shifted - np.log(np.where(total > 0, total, 1.0))


def divergence(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Σ p' (log p' − log p) over the last axis, ∞ where nothing is left of the row.

    Summed as Σ p'·log(p'/p) − p' + p, whose terms are ≥ 0: a change far below the rounding of 1 is not lost.
    """
    new, old = np.exp(after), np.exp(before)
    both = np.isfinite(after) & np.isfinite(before)
    change = np.where(both, after, 0.0) - np.where(both, before, 0.0)
    gained = np.where(change > 1, new - old, old * np.expm1(np.minimum(change, 1.0)))
    terms = np.where(both, new * change - gained, old)
    return np.where(new.sum(-1) > 0, terms.sum(-1), np.inf)


def reduced(effects: np.ndarray, allowed: np.ndarray, n: int, cells: int) -> dict[str, np.ndarray]:
    """row, column, values, indices and map of effects [B, H, T, S]; allowed bool, broadcastable to them."""
    size = np.abs(effects)
    everywhere = np.ones((1, *effects.shape[2:]), bool)
    _, indices = attention_topk(size, everywhere, n, np.where(allowed, size, -np.inf))
    # one more key, for what a row does not have
    padded = np.concatenate([effects, np.zeros((*effects.shape[:3], 1))], -1)
    return {
        "row": size.sum(-1),
        "column": size.sum(-2),
        "values": np.take_along_axis(padded, indices, -1),
        "indices": indices,
        "map": attention_map(size, cells)[0],
    }

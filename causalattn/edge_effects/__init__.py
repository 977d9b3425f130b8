"""What an intervention on each single edge of the attention map does: every edge's effect, reduced without the map."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._backend import Backend, accumulator
from .._checks import Logits, check_qk, check_v, resolve_logits, resolve_mask, same
from ..attention.forward import attend
from ..attention.topk import TopK
from ..masks import Intervals, Mask
from .rest import attend_rest, ceiling_of, dominant_effects
from .sweep import sweep

__all__ = ["EdgeEffects", "edge_effects"]

KINDS = ("cut", "soft", "hard")
MEASURES = ("norm", "kl", "readout")
MOST = 64


class EdgeEffects(NamedTuple):
    """row [B, H, T], column [B, H, S], topk (values and indices [B, H, T, n]) and map [B, H, cells of rows, of keys].

    float32 (float64 for float64 q); None where not wanted.
    """

    row: Tensor | None = None
    column: Tensor | None = None
    topk: TopK | None = None
    map: Tensor | None = None


def edge_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Literal["cut", "soft", "hard"] = "cut",
    strength: float | None = None,
    measure: Literal["norm", "kl", "readout"] = "norm",
    readout: Tensor | None = None,
    want: str | Iterable[str] = ("row", "column", "topk"),
    n: int = 16,
    cells: int = 512,
    causal: bool = False,
    mask: Mask | Intervals | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    backend: Backend = "auto",
) -> EdgeEffects:
    """Intervene on every edge (query i, key j) in turn and reduce the effects, in O(T) memory: never T×S of them.

    An edge of probability p = A_ij, its row's sum being 1 + w of what it was after the intervention, moves the output
    from o_i to o' = o_i + w / (1 + w)·(v_j − o_i); the rest of the row is renormalised:

        kind        "cut" forbids the edge, w = −p; "soft" adds strength λ to its score, w = p·(e^λ − 1);
                    "hard" makes the row attend j alone, w = ∞
        measure     "norm" ‖o' − o_i‖; "kl" the divergence of the new row from the old, λp' − log(1 + w), p' the edge's
                    new probability (cut −log(1 − p), hard −log p); "readout" g_i·(o' − o_i), signed, g_i = readout[i]

        row_i = Σ_j |e_ij|;  column_j = Σ_i |e_ij|, the influence of token j;  topk, of each row the largest by |e_ij|;
        map, the mean of |e_ij| over the cells of `attention_map`

    An edge that mask or bias forbids has effect 0. A cut of the only edge of a row empties it: o' = 0, so the norm is
    ‖o_i‖, the readout −g_i·o_i, the divergence ∞. With a learned sink the rest holds at least the sink's share.

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, S, D]; H_kv divides H.
        v: values, [B, H_kv, S, V].
        strength: λ, in nats, finite; with kind="soft" and only there.
        readout: g_i = ∂M/∂o_i of some readout M, [B, H, T, V], of q's dtype; with measure="readout" and only there.
        want: "all", or names among "row", "column", "topk" and "map".
        n: how many edges of a row topk has, 1 … 64.
        cells: how many cells a side of map at most.
        causal, mask, bias, alibi_slopes, scale, softcap, sink, backend: as in `attention`.

    Returns:
        EdgeEffects, without gradient. topk: signed values, equal sizes by key; value 0 and index −1 where a row may
        attend fewer than n keys. A NaN reaches what `attention` lets it reach.

    Raises:
        ValueError: an unknown kind, measure or want, a strength or readout too few or too many, n or cells out of
            range, or a shape, device, mask or softcap that does not fit.
        TypeError: a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: an input that requires grad where gradients are recorded, or backend="triton" without
            the triton package.

    Source: closed forms of the softmax; for λ → 0 the readout is λ times dS of Dao et al. 2022 (arXiv:2205.14135).

    Example:
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> edge_effects(q, k, v, kind="hard", measure="kl", causal=True).row
        tensor([[[0.0000, 1.5088]]])
    """
    check_qk(q, k)
    check_v(v, k)
    strength = resolve_strength(kind, strength)
    check_measure(measure, readout, q, v)
    want = edges_wanted(want)
    check_count("n", n, MOST)
    check_count("cells", cells, None)
    intervals = resolve_mask(q, k, mask, causal)
    options = {"bias": bias, "alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sink": sink}
    logits = resolve_logits(q, k, intervals, **options)
    inputs = (q, k, v, readout, bias, sink)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise NotImplementedError("edge_effects has no gradient: pass q.detach(), k.detach() and v.detach()")
    return _effects(q, k, v, logits, readout, strength, measure, want, n, cells, backend)


def _effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    readout: Tensor | None,
    strength: float,
    measure: str,
    want: list[str],
    n: int,
    cells: int,
    backend: Backend,
) -> EdgeEffects:
    # o less v cancels, so it is kept in float32
    wide = None if measure == "kl" else v.to(accumulator(v))
    out, _, pivot, largest, _ = attend(q, k, wide, *logits, None, backend)
    ceiling = ceiling_of(pivot, largest)
    rest = attend_rest(q, k, wide, *logits._replace(sink=None), ceiling, backend)
    dominant = dominant_effects(out, pivot, rest, logits.sink, readout, strength, measure)
    left, level = compared(out, readout, measure)
    row, column, values, indices, pooled = sweep(
        q, k, None if measure == "kl" else v, *logits, pivot, largest, ceiling, dominant, left, level,
        strength, " ".join(want), n, cells, backend,
    )  # fmt: skip
    return EdgeEffects(
        row if "row" in want else None,
        column if "column" in want else None,
        TopK(values, indices) if "topk" in want else None,
        pooled if "map" in want else None,
    )


def compared(out: Tensor, readout: Tensor | None, measure: str) -> tuple[Tensor | None, Tensor | None]:
    """What values are measured against, o or the readout g, and g·o; None where no use is made of it."""
    level = None if readout is None else (readout.double() * out.double()).sum(-1).to(out.dtype)
    return {"norm": out, "kl": None, "readout": readout}[measure], level


def resolve_strength(kind: str, strength: float | None) -> float:
    """λ, −∞ of a cut and ∞ of a hard do."""
    if kind not in KINDS:
        raise ValueError(f"kind must be 'cut', 'soft' or 'hard', got {kind!r}")
    if kind != "soft":
        if strength is not None:
            raise ValueError(f"strength must be None with kind={kind!r}, got {strength}")
        return -math.inf if kind == "cut" else math.inf
    if strength is None:
        raise ValueError("strength must be a finite number with kind='soft', got None")
    if not isinstance(strength, int | float):
        raise TypeError(f"strength must be a number, got {type(strength).__name__}")
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite (kind='cut' is −∞, kind='hard' is ∞), got {strength}")
    return float(strength)


def check_measure(measure: str, readout: Tensor | None, q: Tensor, v: Tensor) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure must be 'norm', 'kl' or 'readout', got {measure!r}")
    if measure != "readout":
        if readout is not None:
            raise ValueError(f"readout must be None with measure={measure!r}, got a {type(readout).__name__}")
        return
    if not isinstance(readout, Tensor):
        raise TypeError(f"readout must be a torch.Tensor with measure='readout', got {type(readout).__name__}")
    shape = [*q.shape[:3], v.shape[3]]
    if list(readout.shape) != shape:
        raise ValueError(f"readout must have shape {shape}, got {list(readout.shape)}")
    same("readout", readout, "q", q)


def edges_wanted(want: str | Iterable[str]) -> list[str]:
    """In the order of the fields."""
    names = EdgeEffects._fields if want == "all" else {want} if isinstance(want, str) else set(want)
    if unknown := sorted(set(names) - set(EdgeEffects._fields)):
        raise ValueError(f"want must be 'all' or names among {', '.join(EdgeEffects._fields)}, got {unknown[0]!r}")
    return [name for name in EdgeEffects._fields if name in names]


def check_count(name: str, count: int, most: int | None) -> None:
    if not isinstance(count, int | torch.SymInt) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count < 1 or (most is not None and count > most):
        bounds = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be {bounds}, got {count}")

"""Linear attention and selective scans of a sequence that several ranks share: only states are exchanged."""

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._backend import Backend, accumulator
from ..feature_maps import FeatureMap
from ..linear_attention import LinearAttentionOutput, LinearState
from ..linear_attention import linear_attention as linear_attention_alone
from ..linear_attention.arguments import check_tokens, mapped, resolve_decay
from ..selective_scan import ScanOutput, check_scan
from ..selective_scan import selective_scan as selective_scan_alone
from .blocks import check_no_gradient, tokens_of
from .ring import Ring

# tokens whose products are there in float64 at once
SUMMED = 4096


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    feature_map: FeatureMap = "elu",
    decay: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
    backend: Backend = "auto",
) -> LinearAttentionOutput:
    """Linear attention over the tokens of all ranks, in the order of the ranks, as `causalattn.linear_attention`.

    Each rank sums its own state, one product of φ(K)ᵀ and V; all ranks gather these states, D·(V + 1) numbers a head,
    and each reads its tokens on from the state before them.

    Args:
        q, k, v: this rank's tokens, [B, H, T_r, D], [B, H_kv, T_r, D] and [B, H_kv, T_r, V]; T_r may differ.
        mesh: one axis, the ranks that share the sequence.
        decay: [H], or of this rank's tokens [B, H, T_r] or [B, H, T_r, F].
        feature_map, causal, normalize, scale, initial_state, backend: as in `causalattn.linear_attention`, the same on
            every rank; initial_state is the one before the first token of the first rank.

    Returns:
        LinearAttentionOutput: out of this rank's tokens; the state behind the last token of the last rank, on every
        rank.

    Raises:
        As `causalattn.linear_attention`. NotImplementedError: an input that requires grad where gradients are recorded.
        RuntimeError: another rank is gone or late.

    Source: Sun et al. 2024 (arXiv:2404.02882), with one gathering for their ring.
    """
    ring = Ring(mesh)
    alone = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "backend": backend}
    own: list[tuple[Tensor, Tensor]] = []

    def check() -> dict[str, object]:
        check_tokens(q, k, v, "linear_attention")
        # the operator itself, of no tokens, says what is wrong with the rest
        few = [x[:, :, :0] for x in (q, k, v)]
        within = isinstance(decay, Tensor) and decay.ndim > 1
        given = {"decay": decay[:, :, :0] if within else decay, "initial_state": initial_state, "causal": causal}
        linear_attention_alone(*few, **given, **alone)
        check_no_gradient(q, k, v, decay, *(initial_state or ()))
        with torch.autocast(q.device.type, enabled=False):
            own.append(_own_state(q, k, v, feature_map, decay, normalize))
        same = {"the batch": q.shape[0], "heads": q.shape[1], "the state": own[0][1].shape, "dtype": q.dtype}
        same |= {"decay": own[0][0].shape, "causal": causal, "normalize": normalize, "scale": scale}
        return same | {"backend": backend, "initial_state": initial_state is not None}

    ring.agree("linear_attention", tokens_of(q), check)
    # what is left of a state over a rank's tokens, and what they add
    kept, added = (torch.stack(ring.gather(x)) for x in own[0])
    last = _state(kept, added, initial_state, q)
    if causal:
        before = _state(kept[: ring.rank], added[: ring.rank], initial_state, q)
    else:
        # what every other rank adds
        before = _state(kept, added.index_fill(0, torch.tensor(ring.rank, device=q.device), 0), initial_state, q)
    out = linear_attention_alone(q, k, v, decay=decay, causal=causal, initial_state=before, **alone).out
    return LinearAttentionOutput(out, last)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    initial_state: Tensor | None = None,
    discretization: Literal["zoh", "euler"] = "zoh",
    backend: Backend = "auto",
) -> ScanOutput:
    """Scan along all tokens of all ranks, as `causalattn.selective_scan`; the ranks' tokens in their order.

    Each rank scans its own tokens from nothing; all ranks gather the states, E·N numbers, and each but the first scans
    once more from the state before its tokens.

    Args:
        u, delta, B, C, z: this rank's tokens; A, D and what time does not change, the same on every rank.
        mesh: one axis, the ranks that share the sequence.
        initial_state, discretization, backend: as in `causalattn.selective_scan`; initial_state is the one before the
            first token of the first rank.

    Returns:
        ScanOutput: out of this rank's tokens; the state behind the last token of the last rank, on every rank.

    Raises:
        As `causalattn.selective_scan`. NotImplementedError: an input that requires grad where gradients are recorded.
        RuntimeError: another rank is gone or late.
    """
    ring = Ring(mesh)
    options = {"discretization": discretization, "backend": backend}

    def check() -> dict[str, object]:
        check_scan(u, delta, A, B, C, D, z, initial_state)
        # the operator itself, of no tokens, says what is wrong with the rest
        few = [x if x is None or x.ndim < 3 else x[:, :0] for x in (u, delta, B, C, z)]
        selective_scan_alone(*few[:2], A, *few[2:4], D, few[4], initial_state=initial_state, **options)
        check_no_gradient(u, delta, A, B, C, D, z, initial_state)
        return {"the batch": u.shape[0], "the shape of A": A.shape, "dtype": u.dtype, **options}

    ring.agree("selective_scan", tokens_of(u, 1), check)
    first = initial_state if ring.rank == 0 else None
    out, own = selective_scan_alone(u, delta, A, B, C, D, z, initial_state=first, **options)
    steps = delta.double().expand(*u.shape[:2], -1).sum(1) if delta.ndim == 3 else delta.double() * u.shape[1]
    kept = torch.exp(steps.expand(u.shape[0], -1)[..., None] * A.double())
    kept, added = (torch.stack(ring.gather(x)) for x in (kept, own.double()))
    states = [_folded(kept[:n], added[:n], torch.zeros_like(added[0])) for n in (ring.rank, ring.size)]
    if ring.rank:
        before = states[0].to(own.dtype)
        out = selective_scan_alone(u, delta, A, B, C, D, z, initial_state=before, **options).out
    return ScanOutput(out, states[1].to(own.dtype))


def _own_state(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, decay: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """What is left of a state over these tokens, [B, H, F or 1, 1], and [Σ φ(k) vᵀ, Σ φ(k)], decayed: float64."""
    group = q.shape[1] // k.shape[1]
    phi_q, phi_k = mapped(feature_map, q, k, normalize)
    keys, values = phi_k.repeat_interleave(group, 1), v.to(phi_k.dtype).repeat_interleave(group, 1)
    decay = resolve_decay(decay, phi_q)
    if decay is None:
        kept = torch.ones(*q.shape[:2], 1, 1, dtype=torch.float64, device=q.device)
    else:
        G = (decay[..., None] if decay.ndim == 3 else decay).double()
        # what is decayed after a token, itself not among it
        onto = G.flip(2).cumsum(2).flip(2) - G
        keys = keys * onto.exp().to(keys.dtype)
        kept = G.sum(2).exp()[..., None]
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    parts = zip(keys.split(SUMMED, 2), values.split(SUMMED, 2), strict=True)
    return kept, sum(a.double().mT @ b.double() for a, b in parts)


def _state(kept: Tensor, added: Tensor, initial: LinearState | None, q: Tensor) -> LinearState:
    """The state behind the tokens of some ranks."""
    state = added.new_zeros(added.shape[1:])
    if initial is not None:
        state = torch.cat([initial[0], initial[1][..., None]], -1).double()
    state = _folded(kept, added, state).to(accumulator(q))
    return LinearState(state[..., :-1].contiguous(), state[..., -1].contiguous())


def _folded(kept: Tensor, added: Tensor, state: Tensor) -> Tensor:
    for left, more in zip(kept, added, strict=True):
        state = state * left + more
    return state

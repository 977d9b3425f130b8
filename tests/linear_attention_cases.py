"""Inputs of linear attention, hostile in layout and lengths, and plain torch's O(T²) form as the rival."""

from typing import NamedTuple

import torch
from helpers import DEVICE, SEEDS, make_qkv, to_numpy
from hypothesis import strategies as st

from causalattn import LinearState

DECAYS = ["none", "head", "step", "channel"]
FEATURES = ["elu", "relu", "exp"]


class Case(NamedTuple):
    """What linear_attention takes: tensors, and the options that a path does not change."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict


def make_decay(kind, B, H, T, F, seed=0, low=-0.3):
    """Logarithms in [low, 0], or None; step and channel decays in a layout of their own."""
    generator = torch.Generator().manual_seed(seed + 1000)
    if kind == "none":
        return None
    shape = {"head": (H,), "step": (B, T, H), "channel": (B, T, H, F)}[kind]
    g = (torch.rand(*shape, generator=generator) * low).to(DEVICE)
    return g if kind == "head" else g.transpose(1, 2)


def make_state(N, H, F, V, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 2000)
    s, z = torch.randn(N, H, F, V, generator=generator), torch.rand(N, H, F, generator=generator)
    return LinearState(*(x.to(DEVICE, dtype) for x in (s, z)))


@st.composite
def cases(draw, dtype=torch.float32, packed=False):
    H, H_kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    B, T = 1 if packed else draw(st.integers(1, 2)), draw(st.sampled_from([1, 15, 33, 65, 130]))
    D, V, seed = draw(st.sampled_from([16, 24, 59])), draw(st.sampled_from([8, 33])), draw(SEEDS)
    normalize = draw(st.booleans())
    wide = torch.promote_types(dtype, torch.float32)
    options = {
        "decay": make_decay(draw(st.sampled_from(DECAYS)), B, H, T, D, seed),
        "normalize": normalize,
        "feature_map": draw(st.sampled_from(FEATURES if normalize else [*FEATURES, "identity"])),
        "scale": 1.0 if normalize else 0.3,
        "cu_seqlens": [0, 0, T // 3, T // 3 + 1, T - T // 4] if packed else None,
    }
    if packed and T < 2:
        options["cu_seqlens"] = [0, 0, T]
    N = B if not packed else len(options["cu_seqlens"]) - 1
    options["initial_state"] = make_state(N, H, D, V, seed, wide) if draw(st.booleans()) else None
    return Case(*make_qkv(B, H, H_kv, T, T, D, V, dtype, seed, scale=0.5), options)


def numpy_options(options):
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    state = arrays.get("initial_state")
    return arrays | {"initial_state": None if state is None else tuple(map(to_numpy, state))}


def roundings(backend, q, own):
    """own roundings of the accumulation dtype, and where tensor cores multiply φ(q), φ(k) and W, one of each in q's.

    Eager torch makes them too, but one of a few tokens may be lucky, and the next product no better than its factors.
    """
    narrow = 3 * torch.finfo(q.dtype).eps / torch.finfo(torch.float32).eps
    return own + (narrow if backend == "triton" and q.dtype.itemsize == 2 else 0)


FEATURE_MAPS = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "relu": torch.relu,
    "exp": torch.exp,
    "identity": lambda x: x,
}


def plain(q, k, v, *, feature_map="elu", decay=None, normalize=True, scale=1.0, initial_state=None, cu_seqlens=None):
    """out, s and z of eager torch: W in q's dtype from T×T products, the state in the accumulation dtype."""
    B, H, T, _ = q.shape
    phi, wide = FEATURE_MAPS[feature_map], torch.promote_types(q.dtype, torch.float32)
    q, k = phi(q), phi(k).repeat_interleave(H // k.shape[1], 1)
    v = v.repeat_interleave(H // v.shape[1], 1)
    g = torch.zeros(B, H, T, 1, dtype=wide, device=q.device) if decay is None else decay.to(wide)
    g = g[None, :, None, None].expand(B, H, T, 1) if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
    edges = [0, T] if cu_seqlens is None else cu_seqlens
    outs, states = [], []
    for n in range(len(edges) - 1):
        rows = slice(edges[n], edges[n + 1])
        state = None
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else [x[n : n + 1] for x in initial_state]
        out, *last = _plain_segment(q[:, :, rows], k[:, :, rows], v[:, :, rows], g[:, :, rows], normalize, scale, state)
        outs.append(out)
        states.append(last)
    outs.append(torch.zeros_like(v[:, :, edges[-1] :]))
    return torch.cat(outs, 2), *(torch.cat(x) for x in zip(*states, strict=True))


def _plain_segment(q, k, v, g, normalize, scale, state):
    wide, T = g.dtype, q.shape[2]
    G = g.cumsum(2)
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[..., None]
    kept = (G[:, :, :, None] - G[:, :, None]).masked_fill(~seen, -torch.inf).exp().to(q.dtype)
    W = (q @ k.mT) * kept[..., 0] if g.shape[3] == 1 else torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, kept)
    num, den = W @ v, W.sum(-1, keepdim=True)
    total = g.sum(2)[:, :, None]
    late = k.to(wide) * (total - G).exp()
    s, z = late.mT @ v.to(wide), late.sum(2)
    if state is not None:
        early = q.to(wide) * G.exp()
        num = num + (early @ state[0]).to(num.dtype)
        den = den + (early @ state[1][..., None]).to(den.dtype)
        s, z = s + total.mT.exp() * state[0], z + total[:, :, 0].exp() * state[1]
    out = torch.where(den == 0, 0, num / torch.where(den == 0, 1, den)) if normalize else num * scale
    return out, s, z

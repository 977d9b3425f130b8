"""What the tests share: hostile inputs, masks by name, plain torch as the rival and the 2 × rule against float64."""

import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from causalattn import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LENGTHS = st.sampled_from([1, 15, 33, 63, 130])
HEAD_DIMS = st.sampled_from([16, 59, 80, 96])
SEEDS = st.integers(0, 99)


class Shape(NamedTuple):
    B: int
    H: int
    H_kv: int
    T: int
    S: int
    D: int


@st.composite
def shapes(draw, square=False):
    H, H_kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]))
    T = draw(LENGTHS)
    return Shape(draw(st.integers(1, 3)), H, H_kv, T, T if square else draw(LENGTHS), draw(HEAD_DIMS))


class Extras(NamedTuple):
    """What may be added to scores; of bias, which of its axes are not 1, and of slopes, whether there are B rows."""

    bias: tuple[int, int, int, int] | None
    softcap: float | None
    sink: float | None
    slopes: bool | None


EXTRAS = st.builds(
    Extras,
    st.sampled_from([None, (0, 0, 1, 1), (1, 0, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0)]),
    st.sampled_from([None, 0.7, 30.0]),
    st.sampled_from([None, -3.0, 40.0]),
    st.sampled_from([None, False, True]),
)


def make_options(extras, shape, seed):
    """Options by name, with a whole row and every third key forbidden by the bias."""
    generator = torch.Generator().manual_seed(seed)
    options = {"scale": 0.3}
    if extras.bias is not None:
        axes = [n if keep else 1 for n, keep in zip((shape.B, shape.H, shape.T, shape.S), extras.bias, strict=True)]
        options["bias"] = torch.randn(axes, generator=generator).to(DEVICE)
        if extras.bias[2]:
            options["bias"][..., 0, :] = -torch.inf
        options["bias"][..., 1::3] = -torch.inf
    if extras.softcap is not None:
        options["softcap"] = extras.softcap
    if extras.sink is not None:
        options["sink"] = torch.full((shape.H,), extras.sink, device=DEVICE)
    if extras.slopes is not None:
        rows = (shape.B,) if extras.slopes else ()
        options["alibi_slopes"] = torch.rand(*rows, shape.H, generator=generator).to(DEVICE)
    return options


def make_qkv(B, H, H_kv, T, S, D, V=None, dtype=torch.float32, seed=0, *, scale=1.0, strided=True):
    """q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V] on DEVICE; strided ones share no layout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).mul(scale).to(DEVICE, dtype)

    V = D if V is None else V
    if not strided:
        return normal(B, H, T, D), normal(B, H_kv, S, D), normal(B, H_kv, S, V)
    # tokens before heads, every other channel; then channels before tokens
    q, k = normal(B, T, H, 2 * D).transpose(1, 2)[..., ::2], normal(B, S, H_kv, D + 3).transpose(1, 2)[..., 1 : D + 1]
    return q, k, normal(B, H_kv, V, S).mT


def ramp(B, high):
    """B lengths from high down: the whole of it, about half, none."""
    return [high, (high + 1) // 2, 0][:B] + [high] * (B - 3)


def segments(S):
    """cu_seqlens of a packed batch with empty segments at the start, inside and at the end."""
    return [0, 0, S // 3, S // 3, S - S // 4, S, S]


MASKS = {
    "full": lambda B, S: masks.full(),
    "causal": lambda B, S: masks.causal(),
    "window": lambda B, S: masks.sliding_window(5),
    "window_right": lambda B, S: masks.sliding_window(3, right=2),
    "window_open": lambda B, S: masks.sliding_window(4, right=None),
    "chunked": lambda B, S: masks.chunked(7) & masks.causal(),
    "prefix": lambda B, S: masks.prefix(4),
    "padded_right": lambda B, S: masks.causal() & masks.padding(ramp(B, S)),
    "padded_left": lambda B, S: masks.causal() & masks.padding(ramp(B, S), side="left"),
    "padded_window": lambda B, S: masks.sliding_window(9) & masks.padding(ramp(B, S), side="left"),
    "padded_only": lambda B, S: masks.padding(ramp(B, S)),
}
# these need as many queries as keys
SQUARE_MASKS = MASKS | {
    "packed": lambda B, S: masks.packed(segments(S)),
    "packed_causal": lambda B, S: masks.causal() & masks.packed(segments(S)),
    "packed_padded": lambda B, S: masks.packed(segments(S)) & masks.padding(ramp(B, S), side="left"),
}


def make_mask(name, B, S):
    return SQUARE_MASKS[name](B, S)


def to_numpy(x):
    """A tensor as float64 NumPy, integers and bools as they are."""
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


def plain_scores(q, k, seen, *, bias=None, alibi_slopes=None, scale=None, softcap=None, offset=None):
    """Masked scores [B, H, T, S] in q's dtype, one step after another as eager code takes them."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    x = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    if bias is not None:
        x = x + bias.to(x.dtype)
    if alibi_slopes is not None:
        T, S = x.shape[2:]
        p = torch.arange(T, device=x.device)[:, None] + (S - T if offset is None else offset)
        x = x - alibi_slopes.to(x.dtype)[..., None, None] * (p - torch.arange(S, device=x.device)).abs()
    return x.masked_fill(~seen[:, None], -torch.inf)


def plain_attention(q, k, v, seen, *, sink=None, **logits):
    """out, lse and A of eager torch in q's dtype: scores in q's dtype, softmax in float32, A back in q's dtype."""
    x = plain_scores(q, k, seen, **logits).to(torch.promote_types(q.dtype, torch.float32))
    logits = x if sink is None else torch.cat([x, sink.to(x)[:, None, None].expand(*x.shape[:3], 1)], -1)
    empty = x.isneginf().all(-1)
    lse = logits.logsumexp(-1).masked_fill(empty, -torch.inf)
    probs = logits.softmax(-1)[..., : x.shape[-1]].masked_fill(empty[..., None], 0).to(q.dtype)
    return probs @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse, probs


def plain_stats(q, k, intervals, *, columns=("sink",), **logits):
    """The statistics by name from A in float32 (float64 for float64 q), which plain torch forms from upcast q and k."""
    T, S = q.shape[2], k.shape[2]
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    seen = intervals.to_dense(S)
    _, lse, A = plain_attention(q, k, k, seen, **logits, offset=intervals.offset)
    keys = torch.arange(S, device=A.device)
    p = torch.arange(T, device=A.device)[:, None] + intervals.offset
    chosen = [intervals.first if c == "sink" else torch.full_like(intervals.first, c % S) for c in columns]
    stats = {
        "lse": lse,
        "max": A.amax(-1) if S else A.sum(-1),
        "mass": A.sum(-1),
        "entropy": torch.special.entr(A).sum(-1),
        "sum_sq": A.square().sum(-1),
        "below": (A * (keys < p)).sum(-1),
        "diag": (A * (keys == p)).sum(-1),
        "distance": (A * (p - keys).abs()).sum(-1),
        "columns": torch.stack([(A * (keys == j[:, None, :, None])).sum(-1) for j in chosen], -1),
        "received": A.sum(-2),
        "received_mean": A.sum(-2) / seen.sum(-2).clamp(min=1)[:, None],
    }
    stats["dag_score"] = (stats["below"].sum(-1) / A.sum((-2, -1))).nan_to_num(0)
    if T == S:
        difference, total = A - A.mT, A + A.mT
        stats["net_flow"] = stats["mass"] - stats["received"]
        stats["asymmetry"] = {
            "frobenius": difference.square().sum((-2, -1)).sqrt(),
            "ratio": (difference.square().sum((-2, -1)) / total.square().sum((-2, -1))).sqrt().nan_to_num(0),
            "l1": difference.abs().sum((-2, -1)),
            "max": difference.abs().amax((-2, -1)),
            "net_flow": stats["net_flow"],
        }
    return stats


def score_roundings(q, k, scale=None):
    """How many roundings of A one rounding of a dot product q·k is: another order of summation moves A by that."""
    norms = q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()
    return 2 + norms.item() * (q.shape[-1] ** -0.5 if scale is None else abs(scale))


def assert_within_reference_error(result, plain, expected, *, axis=-1, roundings=1.0, terms=1.0):
    """error ≤ 2 × the error of plain torch + one rounding of the largest value, both relative to it along axis.

    result and plain are tensors or arrays of one shape, expected is float64 of that shape; infinities must be where
    expected has them. axis=None measures against the largest value of all; roundings widens the band, as
    score_roundings says: those beyond the first are of the accumulation dtype. terms: of what is a sum of rounded
    products, how many times the largest value the largest sum of their absolute values is.
    """
    dtype = result.dtype if isinstance(result, torch.Tensor) else torch.float64
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    eps = (torch.finfo(dtype).eps + (roundings - 1) * accumulated) * max(1.0, terms)
    result, plain = (to_numpy(x) if isinstance(x, torch.Tensor) else np.asarray(x, float) for x in (result, plain))
    expected = np.asarray(expected, dtype=np.float64)
    assert result.shape == plain.shape == expected.shape, (result.shape, plain.shape, expected.shape)
    finite = np.isfinite(expected)
    assert np.array_equal(result[~finite], expected[~finite], equal_nan=True)

    target = np.where(finite, expected, 0.0)
    everywhere = np.abs(target).max(initial=0.0)
    largest = everywhere if axis is None else np.abs(target).max(axis, initial=0.0, keepdims=True)
    # a row of zeros has no scale of its own
    largest = np.where(largest > 0, largest, everywhere if everywhere > 0 else 1.0)
    error, plain_error = (np.abs(np.where(finite, x, 0.0) - target) for x in (result, plain))
    relative, plain_relative = ((x / largest).max(initial=0.0) for x in (error, plain_error))
    band = np.max(eps * np.exp2(np.floor(np.log2(largest))) / largest, initial=0.0)
    assert relative <= 2 * plain_relative + band, f"error {relative:.3g}, torch's {plain_relative:.3g}, band {band:.3g}"


GROWTH = """
from pathlib import Path
import torch
import causalattn as ca
DEFINITION
def status(field):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
run(600)
for T in LENGTHS:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = run(T)
    print(status("VmHWM") - before)
    del kept
"""


def grown_memory(definition, *lengths):
    """KiB of resident memory that run(T), of which these lines are the definition, adds at its peak, on Linux."""
    program = GROWTH.replace("DEFINITION", definition).replace("LENGTHS", repr(lengths))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]

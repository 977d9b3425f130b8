"""What the tests of statistics' gradients share: the formula in eager torch, one loss over statistics, the check."""

import torch
from helpers import DEVICE, assert_within_reference_error, plain_scores, score_roundings
from hypothesis import strategies as st

import causalattn as ca

ROWS = ("lse", "mass", "entropy", "sum_sq", "below", "distance")
RECTANGULAR = (*ROWS, "diag", "columns", "received", "received_mean", "dag_score")
SQUARE = (*RECTANGULAR, "net_flow", "frobenius", "ratio", "l1")
COLUMNS = ("sink", 0, -1, -1)
# by the passes that yield them
GROUPS = st.sampled_from([ROWS, ("diag", "columns", "received_mean"), ("dag_score", "net_flow"), SQUARE[-3:]])


def root(x):
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt())


def share(part, whole):
    return torch.where(whole == 0, 0, part / torch.where(whole == 0, 1, whole))


def formula(q, k, intervals, *, sink=None, tilt=None, **logits):
    """The statistics as eager torch forms them, A in q's dtype; lse 0 in rows that may attend nothing.

    tilt is added to log A: its gradient is A ∘ ∂L/∂A.
    """
    T, S = q.shape[2], k.shape[2]
    seen = intervals.to_dense(S)
    x = plain_scores(q, k, seen, offset=intervals.offset, **logits).to(torch.promote_types(q.dtype, torch.float32))
    empty = ~seen.any(-1)[:, None, :, None].expand(*x.shape[:3], 1)
    x = x.masked_fill(empty, 0)
    extended = x if sink is None else torch.cat([x, sink.to(x)[:, None, None].expand(*x.shape[:3], 1)], -1)
    lse = extended.logsumexp(-1)
    A = extended.softmax(-1)[..., :S].masked_fill(empty, 0).to(q.dtype).to(x.dtype)
    A = A if tilt is None else A * tilt.exp()
    surprise = (lse[..., None] - x).masked_fill(~seen[:, None], 0)
    keys, p = torch.arange(S, device=A.device), torch.arange(T, device=A.device)[:, None] + intervals.offset
    picked = [intervals.first if c == "sink" else torch.full_like(intervals.first, c % S) for c in COLUMNS]
    stats = {
        "lse": lse.masked_fill(empty[..., 0], 0),
        "mass": A.sum(-1),
        "entropy": (A * surprise).sum(-1),
        "sum_sq": A.square().sum(-1),
        "below": (A * (keys < p)).sum(-1),
        "distance": (A * (p - keys).abs()).sum(-1),
        "diag": (A * (keys == p)).sum(-1),
        "columns": torch.stack([(A * (keys == j[:, None, :, None])).sum(-1) for j in picked], -1),
        "received": A.sum(-2),
        "received_mean": A.sum(-2) / seen.sum(-2).clamp(min=1)[:, None],
        "dag_score": share((A * (keys < p)).sum((-2, -1)), A.sum((-2, -1))),
    }
    if T == S:
        squares, total = (A - A.mT).square().sum((-2, -1)), (A + A.mT).square().sum((-2, -1))
        stats |= {"net_flow": A.sum(-1) - A.sum(-2), "frobenius": root(squares), "ratio": root(share(squares, total))}
        stats["l1"] = (A - A.mT).abs().sum((-2, -1))
    return stats


def measured(q, k, mask, want, backend, **logits):
    """The same from attention_stats."""
    parts = {"frobenius", "ratio", "l1"}
    names = set(want) - parts | ({"asymmetry"} if parts & set(want) else set())
    stats = ca.attention_stats(q, k, mask=mask, want=names, columns=COLUMNS, backend=backend, **logits)
    stats = stats._asdict() | (stats.asymmetry._asdict() if parts & set(want) else {})
    if "lse" in want:
        stats["lse"] = torch.where(stats["lse"].isneginf(), 0, stats["lse"])
    return {name: stats[name] for name in want}


def loss(stats, seed=0):
    """One random linear function of all statistics; distances and sums over a head weigh less, so that none drowns."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name, x in stats.items():
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if name in ("distance", "l1", "frobenius"):
            weights /= max(1, stats[name].shape[-1])
        total = total + (x * weights.to(x)).sum()
    return total


def leaves(q, k, dtype=None, **logits):
    """q and k as leaves, and logits with its tensors but alibi_slopes as leaves; all leaves in a row."""
    q, k = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k))
    logits = {
        name: x.detach().to(dtype or x.dtype).requires_grad_() if name in ("bias", "sink") else x
        for name, x in logits.items()
    }
    return q, k, logits, [q, k, *(logits[name] for name in ("bias", "sink") if name in logits)]


def make_extras(shape, seed, bias=(1, 0, 1, 1), sink=0.5, softcap=2.0, slopes=True):
    """Options by name; bias says which of its axes are not 1."""
    B, H, T, S = shape[0], shape[1], shape[3], shape[4]
    generator = torch.Generator().manual_seed(seed)
    extras = {"softcap": softcap}
    if bias is not None:
        axes = [n if keep else 1 for n, keep in zip((B, H, T, S), bias, strict=True)]
        extras["bias"] = torch.randn(axes, generator=generator).to(DEVICE)
    if sink is not None:
        extras["sink"] = torch.full((H,), sink, device=DEVICE)
    if slopes:
        extras["alibi_slopes"] = torch.rand(H, generator=generator).to(DEVICE)
    return {name: x for name, x in extras.items() if x is not None}


def check(backend, q, k, mask, want, seed=0, **logits):
    """Every gradient within twice eager torch's error of float64's."""
    intervals = mask.resolve(q.shape[2], k.shape[2], device=DEVICE)
    a, b, options, got = leaves(q, k, **logits)
    got = torch.autograd.grad(loss(measured(a, b, mask, want, backend, **options), seed), got)
    results = []
    for dtype in (q.dtype, torch.float64):
        a, b, options, inputs = leaves(q, k, dtype, **logits)
        stats = formula(a, b, intervals, **options)
        results.append(torch.autograd.grad(loss({name: stats[name] for name in want}, seed), inputs))
    roundings = score_roundings(q, k)
    sums = absolute_terms(q, k, intervals, want, seed, logits) + [0.0 for _ in got[2:]]
    for x, plain, exact, terms in zip(got, *results, sums, strict=True):
        largest = exact.abs().max().item()
        terms = terms / largest if largest else 1.0
        assert_within_reference_error(x, plain.to(x.dtype), exact.cpu(), axis=None, roundings=roundings, terms=terms)


def absolute_terms(q, k, intervals, want, seed, logits):
    """The largest Σ_j |dS_ij k_j| and Σ_i |dS_ij q_i| of the gradients of q and k, in float64.

    |dS| stands for what it is summed from: itself, A ∘ G and A ∘ rowsum(A ∘ G), which may cancel.
    """
    a, b, options, _ = leaves(q, k, torch.float64, **logits)
    added, tilt = (
        torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64, device=q.device, requires_grad=True) for _ in "ab"
    )
    options["bias"] = added + options.get("bias", 0)
    stats = formula(a, b, intervals, tilt=tilt, **options)
    (A,) = torch.autograd.grad(stats["lse"].sum(), added, retain_graph=True)
    total = loss({name: stats[name] for name in want}, seed)
    dS, AG = torch.autograd.grad(total, (added, tilt), allow_unused=True, materialize_grads=True)
    dS = (dS.abs() + AG.abs() + A * AG.sum(-1, keepdim=True).abs()) * options.get("scale", q.shape[3] ** -0.5)
    share = q.shape[1] // k.shape[1]
    dq, dk = dS @ b.abs().repeat_interleave(share, 1), (dS.mT @ a.abs()).unflatten(1, (-1, share)).sum(2)
    return [x.detach().max().item() for x in (dq, dk)]


@st.composite
def shapes(draw, square=True):
    H, H_kv = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]))
    T = draw(st.sampled_from([1, 15, 33, 66]))
    S = T if square else draw(st.sampled_from([1, 17, 40, 66]))
    return draw(st.integers(1, 2)), H, H_kv, T, S, draw(st.sampled_from([16, 59]))

"""Interventions on attention, its rows and its statistics: every path against softmax taken again in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    EXTRAS,
    MASKS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    Extras,
    Shape,
    assert_within_reference_error,
    grown_memory,
    make_mask,
    make_options,
    make_qkv,
    plain_scores,
    score_roundings,
    shapes,
    to_numpy,
)
from hypothesis import example, given
from hypothesis import strategies as st

import causalattn as ca
from causalattn import Do, Plan
from causalattn.reference import attention as reference_attention
from causalattn.reference import interventions as reference

KINDS = st.sampled_from(["soft", "cut", "cut_span", "column", "edges", "hard", "causal", "patch"])
STRENGTHS = st.sampled_from([-30.0, -1.5, 0.0, 0.3, 4.0, 200.0])


@st.composite
def choices(draw):
    """Items as (kind, two positions as fractions of the length, strength, heads, batch)."""
    share = st.floats(0, 1, exclude_max=True)
    one = st.tuples(KINDS, share, share, STRENGTHS, st.sampled_from([None, 0]), st.sampled_from([None, 0]))
    return draw(st.lists(one, min_size=1, max_size=5))


def surgery(chosen, seen, H):
    """A plan, and what it means: what every score gains, [B, H, T, S], the forced key, −1 for none, [B, H, T], and the
    probabilities that edges are given, NaN for none, [B, H, T, S].
    """
    B, T, S = seen.shape
    gain, forced, shares = np.zeros((B, H, T, S)), np.full((B, H, T), -1), np.full((B, H, T, S), np.nan)
    plan = Plan()
    for kind, at, to, strength, head, batch in chosen:
        heads, batches = (slice(None) if x is None else slice(x, x + 1) for x in (head, batch))
        scope = {"heads": head, "batch": batch}
        i, j = int(at * T), int(to * S)
        row = i + S - T
        allowed = seen[batches].any(0)
        here = (batches, heads, i, j)
        if kind == "causal":
            later = np.arange(S) > np.arange(T)[:, None] + S - T
            if (allowed & later).any():
                plan += Do.causal(**scope)
                gain[batches, heads] += np.where(later, -np.inf, 0)
        elif kind in ("cut_span", "column"):
            keys = slice(j, min(S, j + 70 if kind == "cut_span" else j + 1))
            rows = i if kind == "cut_span" else slice(None)
            if allowed[rows, keys].any() and (kind == "column" or row >= 0):
                plan += Do.cut(row if kind == "cut_span" else None, keys, **scope)
                gain[batches, heads, rows, keys] = -np.inf
        # a query before the first key has no position to be named by
        elif allowed[i, j] and row >= 0:
            if kind == "hard" and (forced[here[:3]] >= 0).any():
                continue
            if kind == "patch":
                if (~np.isnan(shares[here])).any() or np.nansum(shares[here[:3]], -1).max(initial=0) > 0.5:
                    continue
                c = np.linspace(0, 0.5, B * H).reshape(B, H)
                plan += Do.patch_edges(torch.from_numpy(c)[..., None, None], row, j, **scope)
                shares[here] = c[batches, heads]
            elif kind == "soft":
                plan, gain[here] = plan + Do.soft(row, j, strength, **scope), gain[here] + strength
            elif kind == "hard":
                plan, forced[here[:3]] = plan + Do.hard(row - S, j - S, **scope), j
            else:
                plan = plan + (Do.cut(edges=[(row, j)], **scope) if kind == "edges" else Do.cut(row, j, **scope))
                gain[here] = -np.inf
    onto = np.take_along_axis(gain, np.maximum(forced, 0)[..., None], -1)[..., 0]
    hard = (forced >= 0) & np.isneginf(onto)
    refused = hard.any() or np.isneginf(gain[~np.isnan(shares)]).any()
    return (None if refused or not plan.items else plan), gain, forced, shares


def check(backend, q, k, v, mask, chosen, **options):
    """out, lse and A within twice the error of torch, which takes the softmax of the changed scores."""
    H, S = q.shape[1], k.shape[2]
    seen = mask.resolve(q.shape[2], S, device=DEVICE).to_dense(S).expand(q.shape[0], -1, -1)
    plan, gain, forced, shares = surgery(chosen, to_numpy(seen), H)
    if plan is None:
        return
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    sink = arrays.pop("sink", None)
    scores = reference_attention.scores(*map(to_numpy, (q, k)), to_numpy(seen), **arrays)
    expected = reference.attention(scores, to_numpy(v), gain, forced, sink, shares)
    result = ca.attention(q, k, v, mask=mask, do=plan, return_probs=True, backend=backend, **options)

    wide = torch.promote_types(q.dtype, torch.float32)
    plain = plain_scores(q, k, seen, **{n: x for n, x in options.items() if n != "sink"}).to(wide)
    rival = reference.attention(to_numpy(plain), to_numpy(v), gain, forced, sink, shares)
    rival = [torch.from_numpy(x) for x in rival]
    # an exponent is rounded by its size, to which strengths and the sink add
    exponent = np.abs(gain[np.isfinite(gain)]).max(initial=0.0) + (0 if sink is None else np.abs(sink).max())
    roundings = score_roundings(q, k, options.get("scale")) + exponent
    # a row that is not formed again has lost 0.9 at most, half in 16 bits: what was rounded grew that much
    grown = (10 if q.itemsize > 2 else 2) * (roundings + 1)
    assert_within_reference_error(result.out, rival[0].to(q.dtype), expected[0], axis=None, roundings=grown)
    assert_within_reference_error(result.lse, rival[1].to(wide), expected[1], axis=None, roundings=grown)
    assert_within_reference_error(result.probs, rival[2].to(q.dtype), expected[2], axis=None, roundings=roundings)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), chosen=choices(), seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, chosen, seed):
    q, k, v = make_qkv(*shape, V=24, dtype=dtype, seed=seed)
    check(backend, q, k, v, make_mask(name, shape.B, shape.S), chosen)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(square=True), name=st.sampled_from(sorted(SQUARE_MASKS)), chosen=choices(), seed=SEEDS)
def test_matches_float64_where_packed(backend, shape, name, chosen, seed):
    q, k, v = make_qkv(*shape, seed=seed)
    check(backend, q, k, v, make_mask(name, shape.B, shape.S), chosen)


@pytest.mark.parametrize("backend", PATHS)
@given(shape=shapes(), chosen=choices(), extras=EXTRAS.filter(lambda x: x.bias is None), seed=SEEDS)
# beside a patched key that is the only one the sink is the rest
@example(Shape(2, 1, 1, 1, 1, 59), [("patch", 0.0, 0.0, 0.0, None, None)], Extras(None, None, -3.0, None), 2)
def test_slopes_softcap_and_sink(backend, shape, chosen, extras, seed):
    q, k, v = make_qkv(*shape, seed=seed, scale=2.0)
    check(backend, q, k, v, ca.full(), chosen, **make_options(extras, shape, seed))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("share", [0.5, 0.95, 1 - 1e-5, 1 - 1e-9])
def test_a_cut_keeps_its_digits_where_one_key_has_nearly_all(backend, share):
    q, k, v = make_qkv(1, 2, 1, 33, 33, 16, seed=3, scale=0.3)
    bias = torch.zeros(33, 33, device=DEVICE)
    bias[20, 4] = math.log(share / (1 - share) * 20)
    result = ca.attention(q, k, v, causal=True, bias=bias, do=Do.cut(20, 4), backend=backend)
    bias[20, 4] = -torch.inf
    again = ca.attention(q.double(), k.double(), v.double(), causal=True, bias=bias)
    for x, y in zip(result[:2], again[:2], strict=True):
        torch.testing.assert_close(x[:, :, 20].double(), y[:, :, 20], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", PATHS)
def test_rows_that_lose_every_key_are_empty(backend):
    q, k, v = make_qkv(2, 2, 1, 9, 9, 16)
    result = ca.attention(q, k, v, causal=True, do=Do.cut(5) + Do.cut(2, [0, 1, 2]), return_probs=True, backend=backend)
    for x in (result.out, result.probs):
        assert not x[:, :, [2, 5]].any() and x[:, :, [0, 1, 3, 4]].any(-1).all()
    assert (result.lse[:, :, [2, 5]] == -torch.inf).all()
    # a learned sink alone is no row either
    sink = torch.zeros(2, device=DEVICE)
    result = ca.attention(q, k, v, causal=True, sink=sink, do=Do.cut(2, [0, 1, 2]), return_probs=True, backend=backend)
    assert (
        (result.lse[:, :, 2] == -torch.inf).all() and not result.out[:, :, 2].any() and not result.probs[:, :, 2].any()
    )


@pytest.mark.parametrize("backend", PATHS)
def test_key_and_value_edits_are_those_of_the_tensors(backend):
    q, k, v = make_qkv(2, 4, 2, 33, 33, 16, V=24, seed=1)
    delta, shift = torch.linspace(-1, 1, 16), torch.linspace(0, 2, 24)
    edited_k, edited_v = k.clone(), v.clone()
    edited_k[:, :, 4] += delta.to(DEVICE)
    edited_v[:, :, -2] += shift.to(DEVICE)
    plan = Do.key_edit(4, delta) + Do.value_edit(-2, shift)
    result = ca.attention(q, k, v, causal=True, do=plan, return_probs=True, backend=backend)
    expected = ca.attention(q, edited_k, edited_v, causal=True, return_probs=True, backend=backend)
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    # with other interventions on the same keys, and for one head of a group
    more = Do.cut(20, 4) + Do.soft(21, 31 - 33, 2.0) + Do.hard(22, 4) + Do.hard(32, -2)
    result = ca.attention(q, k, v, do=(plan + more).within(heads=1), backend=backend).out
    expected = ca.attention(q, edited_k, edited_v, do=more, backend=backend).out
    torch.testing.assert_close(result[:, 1], expected[:, 1], rtol=2e-6, atol=2e-6)
    assert torch.equal(result[:, 0], ca.attention(q, k, v, backend=backend).out[:, 0])


@pytest.mark.parametrize("backend", PATHS)
def test_heads_go_off_and_outputs_are_patched(backend):
    q, k, v = make_qkv(2, 3, 1, 9, 9, 16)
    mask = ca.causal() & ca.padding([9, 5])
    plain = ca.attention(q, k, v, mask=mask, backend=backend).out
    source = torch.randn(1, 3, 9, 16, device=DEVICE)
    plan = Do.head_off(0) + Do.head_off(1, value="mean") + Do.patch(source, [1, -5], heads=2, batch=1)
    out = ca.attention(q, k, v, mask=mask, do=plan, backend=backend).out
    assert not out[:, 0].any()
    for b, length in enumerate((9, 5)):
        mean = plain[b, 1, :length].mean(0)
        torch.testing.assert_close(out[b, 1, :length], mean.expand(length, -1))
    assert not out[1, 1, 5:].any()
    assert torch.equal(out[1, 2, [1, 4]], source[0, 2, [1, 4]]) and torch.equal(out[0, 2], plain[0, 2])


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 1, 5, 5, 3, V=2, dtype=torch.float64))
    delta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    sink = torch.tensor([0.1, -0.5], dtype=torch.float64, requires_grad=True)
    # the last row loses 0.9 and is formed again
    bias = torch.zeros(5, 5, dtype=torch.float64).index_put_(
        (torch.tensor(4), torch.tensor(1)), torch.tensor(9.0).double()
    )

    def under(q, k, v, delta, sink):
        plan = Do.cut(4, 1) + Do.soft(3, 0, 1.5) + Do.soft(2, 1, -2.0) + Do.hard(1, 0, heads=0)
        plan += Do.key_edit(2, delta) + Do.value_edit(0, delta[:2])
        options = {"causal": True, "bias": bias, "sink": sink, "do": plan}
        out, lse, probs = ca.attention(q, k, v, return_probs=True, **options)
        stats = ca.attention_stats(q, k, want=("entropy", "received", "dag_score"), **options)
        return out, lse, probs, stats.entropy, stats.received, stats.dag_score

    assert torch.autograd.gradcheck(under, (q, k, v, delta, sink))


@pytest.mark.parametrize("backend", PATHS)
def test_gradients_of_the_kernels_are_those_of_float64(backend):
    tensors = make_qkv(2, 4, 2, 33, 33, 16, seed=2)
    plan = Do.cut(None, 3) + Do.soft(30, 7, 3.0) + Do.cut(31, slice(0, 20), heads=1)

    def gradients(dtype, backend):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
        out, lse, _ = ca.attention(q, k, v, causal=True, do=plan, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        loss = (out * weights).sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        return torch.autograd.grad(loss, (q, k, v))

    runs = ((torch.float32, backend), (torch.float32, "torch"), (torch.float64, "torch"))
    for x, rival, exact in zip(*(gradients(*run) for run in runs), strict=True):
        bound = 10 * score_roundings(*tensors[:2])
        assert_within_reference_error(x, rival, to_numpy(exact), axis=None, roundings=bound)


@pytest.mark.parametrize("backend", PATHS)
@given(name=st.sampled_from(["full", "causal", "padded_left", "window"]), chosen=choices(), seed=SEEDS)
def test_statistics_are_those_of_the_changed_map(backend, name, chosen, seed):
    q, k, v = make_qkv(2, 2, 1, 33, 33, 16, seed=seed)
    mask = make_mask(name, 2, 33)
    plan, *_ = surgery(chosen, to_numpy(mask.to_dense(33, 33).expand(2, -1, -1)), 2)
    if plan is None:
        return
    want = [x for x in ca.AttentionStats._fields if x != "asymmetry"]
    options = {"mask": mask, "do": plan, "backend": backend}
    stats = ca.attention_stats(q, k, want=want, columns=("sink", 5), **options)
    A = ca.attention(q, k, v, return_probs=True, **options).probs
    dense = ca.dense.attention_stats(A, want=want, columns=("sink", 5), mask=mask)
    torch.testing.assert_close(stats.lse, ca.attention(q, k, v, **options).lse, rtol=1e-5, atol=1e-5)
    for name in want[1:]:
        torch.testing.assert_close(getattr(stats, name), getattr(dense, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_the_run(backend):
    q, k, v = make_qkv(3, 2, 1, 70, 70, 16)
    plan = Do.cut(None, 3) + Do.soft(60, 7, 3.0) + Do.hard(20, 4) + Do.cut(61, slice(0, 60))
    whole = ca.attention(q, k, v, causal=True, do=plan, backend=backend)
    for _ in range(3):
        assert all(map(torch.equal, whole[:2], ca.attention(q, k, v, causal=True, do=plan, backend=backend)[:2]))
    alone = ca.attention(q[1:2], k[1:2], v[1:2], causal=True, do=plan, backend=backend)
    assert torch.equal(whole.out[1:2], alone.out) and torch.equal(whole.lse[1:2], alone.lse)


@pytest.mark.parametrize("backend", PATHS)
def test_nan_in_padding_does_not_leak(backend):
    q, k, v = make_qkv(1, 2, 1, 9, 9, 16, strided=False)
    for x in (q, k, v):
        x[:, :, 6:] = torch.nan
        x.requires_grad_()
    plan = Do.cut(None, [2, 7]) + Do.soft(None, [1, 8], 2.0, heads=0) + Do.soft(5, 1, 2.0)
    result = ca.attention(q, k, v, mask=ca.padding([6]), do=plan + Do.key_edit(3, torch.ones(16)), backend=backend)
    assert not result.out.isnan().any()
    for gradient in torch.autograd.grad(result.out.square().sum(), (q, k, v)):
        assert not gradient[:, :, :6].isnan().any()


def test_memory_grows_with_the_tokens_not_with_their_square():
    definition = """
def run(T):
    q, k, v = torch.randn(3, 1, 2, T, 16)
    plan = ca.Do.cut(None, 5) + ca.Do.soft(-1, 3, 2.0) + ca.Do.cut(-2, slice(0, T // 2))
    return ca.attention(q, k, v, causal=True, do=plan)
"""
    small, large = grown_memory(definition, 4096, 16384)
    assert large < 6 * max(small, 16 * 1024), (small, large)


@pytest.mark.parametrize("backend", PATHS)
def test_an_improbable_key_is_raised_and_low_scores_have_gradients(backend):
    q, k = torch.zeros(1, 1, 2, 16, device=DEVICE), torch.zeros(1, 1, 2, 16, device=DEVICE)
    q[..., 0], k[0, 0, 1, 0] = 104 * 4, -1
    v = torch.tensor([[[[0.0], [1.0]]]], device=DEVICE)
    for strength, share in ((104.0, 0.5), (110.0, 1 / (1 + math.exp(-6))), (1e30, 1.0)):
        out, lse, _ = ca.attention(q, k, v, do=Do.soft(1, 1, strength), backend=backend)
        torch.testing.assert_close(out[0, 0, 1, 0].item(), share)
        assert math.isclose(lse[0, 0, 1].item(), max(strength - 104, 0) - math.log(max(share, 1 - share)), rel_tol=1e-6)
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 1, 1, 6, 6, 16))
    low = [x * 0 + offset for x, offset in ((q, 5.0), (k, -5.0))]
    out = ca.attention(*low, v, causal=True, do=Do.cut(None, [0, 2]), backend=backend).out
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_the_same_edge_twice_is_one_edge():
    q, k, v = make_qkv(1, 1, 1, 9, 9, 16)
    once = ca.attention(q, k, v, do=Do.soft(3, 0, 1.0)).out
    for plan in (Do.soft(edges=[(3, 0), (3, 0), (-6, 0)], strength=1), Do.soft([3, -6], [0, -9], 1.0)):
        assert torch.equal(ca.attention(q, k, v, do=plan).out, once)
    # two items are two interventions, also where they are one object
    half = Do.soft(3, 0, 0.5)
    torch.testing.assert_close(ca.attention(q, k, v, do=half + half).out, once)
    assert ca.attention(q[:0], k[:0], v[:0], do=half).out.shape == (0, 1, 9, 16)
    every = ca.attention(q, k, v, do=Do.value_edit(None, torch.ones(16))).out
    torch.testing.assert_close(every, ca.attention(q, k, v + 1).out)

"""Gradients of linear attention: gradcheck on the torch path, both paths against float64, segments, padding, bits."""

import sys

import pytest
import torch
from helpers import DEVICE, DTYPES, PATHS, assert_within_reference_error, grown_memory, make_qkv, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from linear_attention_cases import DECAYS, FEATURE_MAPS, cases, make_decay, make_state, plain, roundings

from causalattn import LinearState, linear_attention, linear_attention_matrix, linear_attention_step


def leaves_of(q, k, v, options, dtype=None):
    """The differentiable inputs by name, as new leaves; dtype replaces every one of theirs."""
    state = options.get("initial_state")
    named = {"q": q, "k": k, "v": v, "decay": options.get("decay")}
    named |= {} if state is None else {"s": state[0], "z": state[1]}
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in named.items() if x is not None}


def results(run, leaves, options):
    """out, s and z of run on leaves."""
    state = LinearState(leaves["s"], leaves["z"]) if "s" in leaves else None
    options = options | {"decay": leaves.get("decay"), "initial_state": state}
    return run(leaves["q"], leaves["k"], leaves["v"], **options)


def upstream_of(outputs, seed):
    """One normal gradient a result, of numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(x.shape, generator=generator).bfloat16() for x in outputs]
    return [g.to(x.device, x.dtype) for g, x in zip(normal, outputs, strict=True)]


def gradients(run, leaves, options, seed, through=(True, True, True)):
    """Of Σ result·upstream, by the inputs' names."""
    outputs = results(run, leaves, options)
    loss = sum((x * g).sum() for x, g, w in zip(outputs, upstream_of(outputs, seed), through, strict=True) if w)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def ours(backend):
    def run(q, k, v, **options):
        out, state = linear_attention(q, k, v, backend=backend, **options)
        return out, *state

    return run


def check(backend, q, k, v, options, seed=0, through=(True, True, True)):
    """Every gradient within twice that of eager torch's autograd, both against float64."""
    got = gradients(ours(backend), leaves_of(q, k, v, options), options, seed, through)
    rival = gradients(plain, leaves_of(q, k, v, options), options, seed, through)
    exact = gradients(plain, leaves_of(q, k, v, options, torch.float64), options, seed, through)
    for name, x in got.items():
        allowed, largest = roundings(backend, q, 8.0), exact[name].abs().max().item()
        if name == "decay":
            walk, together = what_a_decay_cancels(q, k, v, options, seed, through)
            # a rounding of W moves all channels of a token at once
            walk = 8 * walk + (allowed - 8) * together
            if largest <= torch.finfo(torch.float64).eps * walk:
                # all of it cancels: there is no scale but what did
                assert x.abs().max() <= 2 * rival[name].abs().max() + torch.finfo(torch.float32).eps * walk
                continue
            allowed += walk / largest
        terms = 1.0
        if name in "qk" and options.get("normalize", True):
            # as much as of one token, whose output is its value: there is no scale but what cancels
            cancelled = what_a_normaliser_cancels(q, k, v, options, seed)[name]
            terms = cancelled / largest if 0 < largest < 1e-6 * cancelled else 1.0
        assert_within_reference_error(x, rival[name], to_numpy(exact[name]), axis=None, roundings=allowed, terms=terms)
    return got


def what_a_normaliser_cancels(q, k, v, options, seed):
    """The largest gradients of q and k with the normaliser held fixed, v and those of out made positive."""
    fixed = options | {"normalize": False}
    ones = torch.ones_like(v[..., :1], dtype=torch.float64)
    state = options.get("initial_state")
    sums = None if state is None else LinearState(state[1][..., None].double(), state[1].double())
    den = plain(q.double(), k.double(), ones, **fixed | {"initial_state": sums})[0]
    leaves = leaves_of(q, k, v.abs(), fixed, torch.float64)
    out = results(plain, leaves, fixed)[0]
    upstream = upstream_of((out,), seed)[0].abs() / den.masked_fill(den == 0, 1)
    grads = torch.autograd.grad((out * upstream).sum(), (leaves["q"], leaves["k"]))
    return {name: x.abs().max().item() for name, x in zip("qk", grads, strict=True)}


def what_a_decay_cancels(q, k, v, options, seed, through):
    """How far one rounding of each φ(q)·dφ(q) and φ(k)·dφ(k) walks in the sums over the tokens behind a decay.

    The gradient is what is left of such sums, for a head's decay once for every token before. The second number is for
    roundings that all channels of a token share.
    """
    phi, H, T = FEATURE_MAPS[options.get("feature_map", "elu")], q.shape[1], q.shape[2]
    k, v = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    options = options | {"feature_map": "identity"}
    leaves = leaves_of(phi(q.double()), phi(k), v, options, torch.float64)
    grads = gradients(plain, leaves, options, seed, through)
    terms = [leaves[name] * grads[name] for name in "qk"]
    of_a_head = leaves["decay"].ndim == 1
    times = torch.arange(1, T + 1, device=q.device)[:, None] if of_a_head else 1
    a_channel = leaves["decay"].ndim == 4
    apart = [(x * times).square() if a_channel else (x * times).square().sum(3, keepdim=True) for x in terms]
    shared = apart if a_channel else [(x * times).abs().sum(3, keepdim=True).square() for x in terms]
    return tuple(max(x.sum(2).sqrt().max().item() for x in parts) for parts in (apart, shared))


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "relu"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 3, 4, 8]], ids=["whole", "packed"])
def test_gradcheck(kind, normalize, feature_map, cu_seqlens):
    q, k, v = make_qkv(1, 2, 1, 9, 9, 3, 4, torch.float64, strided=False)
    decay = make_decay(kind, 1, 2, 9, 3, low=-1.0)
    options = {
        "decay": None if decay is None else decay.double() - 0.01,
        "initial_state": make_state(1 if cu_seqlens is None else 4, 2, 3, 4, dtype=torch.float64),
        "normalize": normalize,
        "scale": 1.0 if normalize else -0.7,
        "feature_map": feature_map,
        "cu_seqlens": cu_seqlens,
    }
    leaves = leaves_of(q, k, v, options)

    def run(*values):
        return results(ours("torch"), dict(zip(leaves, values, strict=True)), options)

    torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_matches_float64(backend, dtype, data):
    *qkv, options = data.draw(cases(dtype))
    check(backend, *qkv, options, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(packed=True), seed=st.integers(0, 99))
def test_matches_float64_where_packed(backend, case, seed):
    *qkv, options = case
    check(backend, *qkv, options, seed)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("through", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_through_one_result_alone(backend, kind, through):
    q, k, v = make_qkv(1, 2, 1, 70, 70, 16, 8)
    options = {"decay": make_decay(kind, 1, 2, 70, 16), "initial_state": make_state(1, 2, 16, 8)}
    check(backend, q, k, v, options, through=through)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("T", [1024, 1025])
@pytest.mark.parametrize("kind", DECAYS[:3])
def test_around_the_length_of_a_group(backend, T, kind):
    q, k, v = make_qkv(1, 1, 1, T, T, 16, 8)
    check(backend, q, k, v, {"decay": make_decay(kind, 1, 1, T, 16, low=-0.01)})


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_a_split_call_passes_gradients_on(backend, kind):
    T, cut = 90, 40
    q, k, v = make_qkv(1, 2, 1, T, T, 16, 8)
    if backend == "torch":
        q, k, v = (x.double() for x in (q, k, v))
    decay = make_decay(kind, 1, 2, T, 16)

    def split(q, k, v, *, decay=None, **options):
        parts, state = [], None
        for rows in (slice(0, cut), slice(cut, T)):
            g = decay if decay is None or kind == "head" else decay[:, :, rows]
            inputs = (x[:, :, rows] for x in (q, k, v))
            out, state = linear_attention(*inputs, decay=g, initial_state=state, backend=backend)
            parts.append(out)
        return torch.cat(parts, 2), *state

    options = {"decay": decay}
    whole, parts = (gradients(run, leaves_of(q, k, v, options), options, 0) for run in (ours(backend), split))
    for name, x in whole.items():
        # a decay is float32 on every path
        tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
        assert (x - parts[name]).abs().max() <= tolerance * x.abs().max(), name


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS[1:])
def test_logarithms_of_minus_eighty_a_step(backend, kind):
    T = 100
    q, k, v = make_qkv(1, 2, 1, T, T, 16, 8)
    decay = make_decay(kind, 1, 2, T, 16, low=-1e-3)
    if kind == "head":
        decay[0] = -80.0
    else:
        decay = torch.where(torch.arange(T, device=DEVICE).view(T, *(1,) * (decay.ndim - 3)) % 3 == 1, -80.0, decay)
    got = check(backend, q, k, v, {"decay": decay})
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_segments_are_calls_of_their_own_and_nothing_else_is_read(backend, kind):
    edges = [0, 0, 1, 2, 40, 40, 75]
    q, k, v = make_qkv(1, 2, 1, 90, 90, 16, 8)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, 75:] = torch.nan
    decay, state = make_decay(kind, 1, 2, 90, 16), make_state(6, 2, 16, 8)
    options = {"decay": decay, "initial_state": state, "cu_seqlens": torch.tensor(edges, device=DEVICE)}

    def run(leaves, options, rows, n):
        out, s, z = results(ours(backend), leaves, options)
        return torch.autograd.grad(out[:, :, rows].sum() + s[n].sum() + z[n].cos().sum(), list(leaves.values()))

    for n in range(6):
        rows = slice(edges[n], edges[n + 1])
        packed = dict(zip(*(lambda x: (x, run(x, options, rows, n)))(leaves_of(q, k, v, options)), strict=True))
        own = {"initial_state": LinearState(*(x[n : n + 1] for x in state))}
        own["decay"] = decay if decay is None or kind == "head" else decay[:, :, rows]
        leaves = leaves_of(*(x[:, :, rows] for x in (q, k, v)), own)
        alone = dict(zip(leaves, run(leaves, own, slice(None), 0), strict=True))
        for name in "qkv":
            assert torch.equal(packed[name][:, :, rows], alone[name]), name
            assert not packed[name][:, :, : edges[n]].any() and not packed[name][:, :, edges[n + 1] :].any()
        assert all(torch.equal(packed[name][n : n + 1], alone[name]) for name in "sz")
        if kind in ("step", "channel"):
            assert torch.equal(packed["decay"][:, :, rows], alone["decay"])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_bits_depend_on_neither_batch_nor_right_padding_nor_the_run(backend, kind):
    q, k, v = make_qkv(3, 2, 1, 100, 100, 16, 8)
    upstream = torch.randn(3, 2, 100, 8, device=DEVICE)
    lengths = [51, 64, 100]
    for b, T in enumerate(lengths):
        upstream[b, :, T:] = 0
    options = {"decay": make_decay(kind, 3, 2, 100, 16)}

    def run(b, T):
        own = options
        if kind in ("step", "channel"):
            own = {"decay": options["decay"][b, :, :T]}
        leaves = leaves_of(*(x[b, :, :T] for x in (q, k, v)), own)
        return torch.autograd.grad(results(ours(backend), leaves, own)[0], list(leaves.values()), upstream[b, :, :T])

    together, again = run(slice(0, 3), 100), run(slice(0, 3), 100)
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
    for b, T in enumerate(lengths):
        alone = run(slice(b, b + 1), T)
        for i, (x, y) in enumerate(zip(together, alone, strict=True)):
            # a decay of a head is summed over tokens and sequences
            if i < 3 or kind in ("step", "channel"):
                assert torch.equal(x[b : b + 1, :, :T], y)


@pytest.mark.parametrize("backend", PATHS)
def test_a_zero_denominator_has_no_gradient(backend):
    q, k, v = make_qkv(1, 1, 1, 40, 40, 16, 8)
    k = k.clone()
    k[:, :, :10] = -1.0
    leaves = leaves_of(q, k, v, {})
    got = gradients(ours(backend), leaves, {"feature_map": "relu"}, 0)
    assert all(x.isfinite().all() for x in got.values())
    assert not got["q"][:, :, :10].any()
    leaves = leaves_of(q, k, v, {})
    A = linear_attention_matrix(leaves["q"], leaves["k"], feature_map="relu")
    assert all(x.isfinite().all() for x in torch.autograd.grad(A.square().sum(), [leaves["q"], leaves["k"]]))


def test_decays_in_their_own_dtype_get_gradients_in_it():
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16, 8, torch.bfloat16)
    for kind in DECAYS[1:]:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            decay = make_decay(kind, 1, 2, 40, 16).to(dtype).requires_grad_()
            (grad,) = torch.autograd.grad(linear_attention(q, k, v, decay=decay).out.float().square().sum(), decay)
            assert grad.dtype == dtype and grad.shape == decay.shape and grad.any()


def test_a_step_passes_the_gradients_of_the_call():
    q, k, v = make_qkv(1, 2, 1, 1, 1, 4, 3, torch.float64)
    options = {"decay": make_decay("channel", 1, 2, 1, 4).double(), "initial_state": make_state(1, 2, 4, 3, 0, q.dtype)}

    def step(q, k, v, *, initial_state, **options):
        out, state = linear_attention_step(q, k, v, initial_state, **options)
        return out, *state

    one, call = (gradients(run, leaves_of(q, k, v, options), options, 0) for run in (step, ours("torch")))
    for name, x in one.items():
        torch.testing.assert_close(x, call[name])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0)])
def test_empty(backend, B, T):
    q = k = v = torch.zeros(B, 2, T, 16, device=DEVICE)
    options = {"initial_state": make_state(B, 2, 16, 16), "decay": torch.zeros(B, 2, T, device=DEVICE)}
    got = gradients(ours(backend), leaves_of(q, k, v, options), options, 0, through=(False, True, True))
    assert all(x.isfinite().all() for x in got.values())


MEMORY = """
def run(T):
    q, k, v = torch.randn(3, 1, 1, T, 32, requires_grad=True).unbind()
    decay = (-torch.rand(SHAPE)).requires_grad_()
    out, (s, z) = ca.linear_attention(q, k, v, decay=decay)
    (out.sum() + s.sum() + z.sum()).backward()
"""


# peak memory is read from /proc
if sys.platform == "linux":

    @pytest.mark.parametrize("shape", ["1, 1, T", "1, 1, T, 32"])
    def test_memory_is_linear(shape):
        short, long = grown_memory(MEMORY.replace("SHAPE", shape), 8192, 32768)
        # 16 if it grew with the square; a row of each input is 128 bytes
        assert long < 6 * short
        assert 1024 * long < 48 * 128 * 32768

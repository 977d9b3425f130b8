"""linear_attention on every path against the float64 specification, and what the mathematics promises of it."""

import sys

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, PATHS, SEEDS, assert_within_reference_error, make_qkv, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from linear_attention_cases import DECAYS, cases, make_decay, make_state, numpy_options, plain, roundings

from causalattn import LinearState, linear_attention, linear_attention_matrix
from causalattn.reference.linear_attention import linear_attention as reference

# the package's own name linear_attention is the function
forward = sys.modules["causalattn.linear_attention.forward"]


def flat(result):
    return result.out, *result.state


def check(backend, q, k, v, options):
    """out, s and z within twice torch's error of float64."""
    result = linear_attention(q, k, v, backend=backend, **options)
    out, (s, z) = reference(*map(to_numpy, (q, k, v)), **numpy_options(options))
    for got, rival, exact in zip(flat(result), plain(q, k, v, **options), (out, s, z), strict=True):
        assert_within_reference_error(got, rival, exact, axis=None, roundings=roundings(backend, q, 4.0))
    return result


def assert_close(backend, x, y):
    """To roundings: of float64 on the torch path, which the caller is to use, else of float32."""
    tolerance = 1e-12 if backend == "torch" else 1e-5
    assert (x - y).abs().max() <= tolerance * y.abs().max()


def exact(backend, *tensors):
    """float64 where the path takes it."""
    return [None if x is None else x.double() if backend == "torch" else x for x in tensors]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_matches_float64(backend, dtype, data):
    q, k, v, options = data.draw(cases(dtype))
    check(backend, q, k, v, options)


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(packed=True))
def test_matches_float64_where_packed(backend, case):
    q, k, v, options = case
    check(backend, q, k, v, options)


@given(case=cases(torch.float64))
def test_float64_goes_through_the_torch_path(case):
    q, k, v, options = case
    result = linear_attention(q, k, v, **options)
    out, (s, z) = reference(*map(to_numpy, (q, k, v)), **numpy_options(options))
    for x, y in zip(flat(result), (out, s, z), strict=True):
        assert x.dtype == torch.float64
        np.testing.assert_allclose(to_numpy(x), y, rtol=1e-10, atol=1e-12)


# about a group of the torch path and of the kernels, and about a part of the torch path
LENGTHS = [("torch", T) for T in (1023, 1024, 1025, 4095, 4097)]
LENGTHS += [pytest.param("triton", T, marks=pytest.mark.full) for T in (1023, 1025, 2100)] * ("triton" in PATHS)


@pytest.mark.parametrize(("backend", "T"), LENGTHS)
@pytest.mark.parametrize("kind", DECAYS[:3])
def test_around_the_length_of_a_group(backend, T, kind):
    check_length(backend, T, kind)


# the rival's weights take T² · D
@pytest.mark.parametrize(("backend", "T"), [*LENGTHS[:3], *LENGTHS[5:]])
def test_around_the_length_of_a_group_with_a_decay_a_channel(backend, T):
    check_length(backend, T, "channel")


def check_length(backend, T, kind):
    q, k, v = make_qkv(1, 2, 1, T, T, 16, 8)
    options = {"decay": make_decay(kind, 1, 2, T, 16, low=-0.01), "initial_state": make_state(1, 2, 16, 8)}
    check(backend, q, k, v, options)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
@given(normalize=st.booleans(), T=st.sampled_from([1, 17, 64, 65, 130]), seed=SEEDS)
def test_linear_time_and_quadratic_time_agree(backend, kind, normalize, T, seed):
    q, k, v = exact(backend, *make_qkv(1, 2, 1, T, T, 16, 8, seed=seed))
    options = {"decay": make_decay(kind, 1, 2, T, 16, seed), "normalize": normalize}
    A = linear_attention_matrix(q, k, **options)
    assert_close(backend, linear_attention(q, k, v, backend=backend, **options).out, A @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_call_split_anywhere_goes_on(backend, kind, normalize):
    T = 70
    q, k, v = exact(backend, *make_qkv(1, 2, 1, T, T, 16, 8))
    decay = make_decay(kind, 1, 2, T, 16)
    options = {"normalize": normalize, "backend": backend}
    whole = linear_attention(q, k, v, decay=decay, **options)
    for cut in range(0, T + 1, 1 if backend == "torch" else 13):
        parts, state = [], None
        for rows in (slice(0, cut), slice(cut, T)):
            g = decay if decay is None or kind == "head" else decay[:, :, rows]
            inputs = (x[:, :, rows] for x in (q, k, v))
            out, state = linear_attention(*inputs, decay=g, initial_state=state, **options)
            parts.append(out)
        for x, y in zip((torch.cat(parts, 2), *state), flat(whole), strict=True):
            assert_close(backend, x, y)


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(), cut=st.integers(0, 129))
def test_future_tokens_change_nothing(backend, case, cut):
    q, k, v, options = case
    cut %= q.shape[2]
    before = linear_attention(q, k, v, backend=backend, **options).out
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, cut + 1 :] = 3.0
    after = linear_attention(q, k, v, backend=backend, **options).out
    assert torch.equal(before[:, :, : cut + 1], after[:, :, : cut + 1])


@pytest.mark.parametrize("backend", PATHS)
@given(case=cases(), alpha=st.sampled_from([-2.0, 0.5]))
def test_linear_in_values_and_initial_sums(backend, case, alpha):
    q, k, v, options = case
    q, k, v = exact(backend, q, k, v)
    state = options.pop("initial_state")
    state = None if state is None else LinearState(*exact(backend, *state))
    other, other_state = v.flip(2).contiguous(), None if state is None else LinearState(state.s.flip(2), state.z)
    options["backend"] = backend
    x, y = (flat(linear_attention(q, k, u, initial_state=s, **options)) for u, s in ((v, state), (other, other_state)))
    mixed_state = None if state is None else LinearState(state.s + alpha * other_state.s, state.z)
    mixed = flat(linear_attention(q, k, v + alpha * other, initial_state=mixed_state, **options))
    largest = max(u.abs().max() for u in (*x[:2], *y[:2]))
    for i in range(2):
        assert (mixed[i] - x[i] - alpha * y[i]).abs().max() <= (1e-12 if backend == "torch" else 1e-5) * largest
    assert torch.equal(mixed[2], x[2])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
@given(seed=SEEDS, T=st.sampled_from([1, 63, 130]))
def test_normalised_rows_return_a_constant_value(backend, kind, seed, T):
    q, k, _ = make_qkv(1, 2, 1, T, T, 16, seed=seed)
    value = torch.randn(8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    decay = make_decay(kind, 1, 2, T, 16, seed)
    out = linear_attention(q, k, value.expand(1, 1, T, 8), decay=decay, backend=backend).out
    assert (out - value).abs().max() < 1e-5


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS[1:])
def test_a_decay_that_vanishes_is_no_decay(backend, kind):
    q, k, v = exact(backend, *make_qkv(1, 2, 1, 100, 100, 16))
    without = linear_attention(q, k, v, backend=backend).out
    errors = []
    for low in (-1e-2, -1e-4, 0.0):
        decay = make_decay(kind, 1, 2, 100, 16, low=low)
        errors.append((linear_attention(q, k, v, decay=decay, backend=backend).out - without).abs().max().item())
    assert errors[1] < errors[0] / 50
    assert errors[2] <= (1e-14 if backend == "torch" else 1e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS[1:])
@pytest.mark.parametrize("normalize", [True, False])
def test_logarithms_of_minus_eighty_a_step(backend, kind, normalize):
    T = 150
    q, k, v = make_qkv(1, 2, 1, T, T, 16, 8)
    decay = make_decay(kind, 1, 2, T, 16, low=-1e-3)
    if kind == "head":
        decay[0] = -80.0
    else:
        # among steps that lose next to nothing, whose differences must not drown in the sums
        decay = torch.where(torch.arange(T, device=DEVICE).view(T, *(1,) * (decay.ndim - 3)) % 3 == 1, -80.0, decay)
    options = {"decay": decay, "normalize": normalize}
    result = check(backend, q, k, v, options)
    assert all(x.isfinite().all() for x in flat(result))
    out, (s, z) = reference(*map(to_numpy, (q, k, v)), **numpy_options(options))
    for x, y in zip(flat(result), (out, s, z), strict=True):
        assert np.abs(to_numpy(x) - y).max() <= 2e-6 * np.abs(y).max()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_segments_are_calls_of_their_own(backend, kind):
    edges = [0, 0, 1, 1, 2, 40, 40, 105]
    q, k, v = make_qkv(1, 2, 1, 120, 120, 16, 8)
    decay, state = make_decay(kind, 1, 2, 120, 16), make_state(7, 2, 16, 8)
    packed = linear_attention(q, k, v, decay=decay, initial_state=state, cu_seqlens=edges, backend=backend)
    for n in range(7):
        rows = slice(edges[n], edges[n + 1])
        g = decay if decay is None or kind == "head" else decay[:, :, rows]
        own = LinearState(*(x[n : n + 1] for x in state))
        alone = linear_attention(*(x[:, :, rows] for x in (q, k, v)), decay=g, initial_state=own, backend=backend)
        assert torch.equal(packed.out[:, :, rows], alone.out)
        assert all(torch.equal(x[n : n + 1], y) for x, y in zip(packed.state, alone.state, strict=True))
    assert (packed.out[:, :, 105:] == 0).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_nothing_is_read_outside_a_segment(backend, kind):
    edges = torch.tensor([0, 20, 20, 70, 75], device=DEVICE)
    q, k, v = make_qkv(1, 2, 1, 90, 90, 16, 8)
    decay = make_decay(kind, 1, 2, 90, 16)
    clean = linear_attention(q, k, v, decay=decay, cu_seqlens=edges, backend=backend)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, 20:70] = x[:, :, 75:] = torch.nan
    dirty = linear_attention(q, k, v, decay=decay, cu_seqlens=edges, backend=backend)
    for rows in (slice(0, 20), slice(70, 90)):
        assert torch.equal(clean.out[:, :, rows], dirty.out[:, :, rows])
    for x, y in zip(clean.state, dirty.state, strict=True):
        assert torch.equal(x[[0, 1, 3]], y[[0, 1, 3]])
    assert dirty.out[:, :, 20:70].isnan().any()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("kind", DECAYS)
def test_bits_depend_on_neither_batch_nor_right_padding_nor_the_run(backend, kind):
    q, k, v = make_qkv(3, 2, 1, 100, 100, 16, 8)
    decay = make_decay(kind, 3, 2, 100, 16)
    together = linear_attention(q, k, v, decay=decay, backend=backend)
    again = linear_attention(q, k, v, decay=decay, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(flat(together), flat(again), strict=True))
    for b, T in ((0, 51), (1, 64), (2, 100)):
        g = decay if decay is None or kind == "head" else decay[b : b + 1, :, :T]
        alone = linear_attention(*(x[b : b + 1, :, :T] for x in (q, k, v)), decay=g, backend=backend)
        assert torch.equal(together.out[b : b + 1, :, :T], alone.out)
    assert all(torch.equal(x[2:], y) for x, y in zip(together.state, alone.state, strict=True))
    if kind != "channel":
        # heads that share a key head, and their own numbers without one
        g = decay if decay is None else decay[1:2] if kind == "head" else decay[:, 1:2]
        head = linear_attention(q[:, 1:2], k[:, :1], v[:, :1], decay=g, backend=backend)
        assert torch.equal(together.out[:, 1:2], head.out)


@pytest.mark.parametrize("backend", PATHS)
def test_a_zero_denominator_gives_zero(backend):
    q, k, v = make_qkv(1, 1, 1, 40, 40, 16, 8)
    k = k.clone()
    k[:, :, :10] = -1.0
    out = linear_attention(q, k, v, feature_map="relu", backend=backend).out
    assert (out[:, :, :10] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", PATHS)
def test_offsets_past_two_to_the_31(backend):
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    k = storage.as_strided((1, 1, 3, 16), (0, 0, stride, 1))
    q, small, v = make_qkv(1, 1, 1, 3, 3, 16, dtype=torch.float16)
    k.copy_(small)
    result, expected = (linear_attention(q, keys, v, backend=backend) for keys in (k, small))
    assert torch.equal(result.out, expected.out)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("started", [False, True])
def test_empty(backend, B, T, started):
    q = k = v = torch.zeros(B, 2, T, 16, device=DEVICE)
    state = make_state(B, 2, 16, 16) if started else None
    result = linear_attention(q, k, v, initial_state=state, backend=backend)
    assert result.out.shape == (B, 2, T, 16)
    expected = state if started and T == 0 else [torch.zeros_like(x) for x in make_state(B, 2, 16, 16)]
    if T == 0:
        assert all(torch.equal(x, y) for x, y in zip(result.state, expected, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("mutation", ["shifted mask", "last chunk skipped", "decay of the step before"])
def test_mutations_are_caught(backend, mutation):
    q, k, v = make_qkv(1, 2, 2, 130, 130, 16, 8)
    decay = make_decay("step", 1, 2, 130, 16)
    q, k, v, g = {
        "shifted mask": (q.roll(-1, 2), k, v, decay),
        "last chunk skipped": (q, k, torch.cat([v[:, :, :128], torch.zeros_like(v[:, :, 128:])], 2), decay),
        "decay of the step before": (q, k, v, decay.roll(1, 2)),
    }[mutation]
    wrong = linear_attention(q, k, v, decay=g, backend=backend).out
    q, k, v = make_qkv(1, 2, 2, 130, 130, 16, 8)
    right = reference(*map(to_numpy, (q, k, v)), decay=to_numpy(decay))[0]
    with pytest.raises(AssertionError, match="error"):
        assert_within_reference_error(wrong, plain(q, k, v, decay=decay)[0], right, axis=None, roundings=4.0)

"""One token at a time, the matrix, the form that is not causal, what compiles, and every bad input."""

import re
import sys

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, SEEDS, assert_within_reference_error, make_qkv, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from linear_attention_cases import DECAYS, cases, make_decay, make_state, numpy_options

import causalattn as ca
from causalattn import LinearState, linear_attention, linear_attention_matrix, linear_attention_step
from causalattn.reference.linear_attention import linear_attention as reference

forward = sys.modules["causalattn.linear_attention.forward"]
backward = sys.modules["causalattn.linear_attention.backward"]


def flat(result):
    return result.out, *result.state


@given(case=cases(torch.float64))
def test_steps_are_the_call(case):
    q, k, v, options = case
    options.pop("cu_seqlens")
    whole = linear_attention(q, k, v, **options)
    state, decay = options.pop("initial_state"), options.pop("decay")
    outs = []
    for t in range(q.shape[2]):
        g = decay if decay is None or decay.ndim == 1 else decay[:, :, t : t + 1]
        inputs = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = linear_attention_step(*inputs, state, decay=g, **options)
        outs.append(out)
    for x, y in zip((torch.cat(outs, 2), *state), flat(whole), strict=True):
        assert (x - y).abs().max() <= 1e-12 * y.abs().max()


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("T", [1024, pytest.param(16384, marks=pytest.mark.full)])
def test_a_long_chain_of_bfloat16_steps_drifts_by_no_more_than_float32_roundings(kind, T):
    q, k, v = make_qkv(1, 1, 1, T, T, 16, 8, dtype=torch.bfloat16)
    decay = make_decay(kind, 1, 1, T, 16, low=-0.01)
    g = None if decay is None else decay[..., None].expand(1, 1, T) if kind == "head" else decay
    state, outs = None, []
    for t in range(T):
        rows = slice(t, t + 1)
        step = None if g is None else g[:, :, rows]
        out, state = linear_attention_step(q[:, :, rows], k[:, :, rows], v[:, :, rows], state, decay=step)
        outs.append(out)
    arrays = None if decay is None else to_numpy(decay)
    out, (s, z) = reference(*map(to_numpy, (q, k, v)), decay=arrays)
    # T roundings of sums that grow like T walk √T of them, of half a unit each
    drift = 4 * T**0.5 * torch.finfo(torch.float32).eps / 2
    assert np.abs(to_numpy(state.z) / z - 1).max() < drift
    # the terms of s cancel: z bounds what was rounded
    assert (np.abs(to_numpy(state.s) - s).max(-1) < drift * z * to_numpy(v.abs()).max()).all()
    assert np.abs(to_numpy(torch.cat(outs, 2)) - out).max() < torch.finfo(torch.bfloat16).eps * np.abs(out).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_the_matrix_is_what_the_specification_reads(dtype, data):
    q, k, _, options = data.draw(cases(dtype, packed=data.draw(st.booleans())))
    options.pop("initial_state")
    A = linear_attention_matrix(q, k, **options)
    assert A.dtype == dtype
    T = q.shape[2]
    # the values that read a row out are unit vectors
    v = np.broadcast_to(np.eye(T), (q.shape[0], k.shape[1], T, T))
    exact = reference(to_numpy(q), to_numpy(k), v, **numpy_options(options))[0]
    rival = linear_attention_matrix(q.float(), k.float(), **options).to(dtype)
    assert_within_reference_error(A, rival, exact, axis=None, roundings=4.0)
    np.testing.assert_allclose(
        to_numpy(linear_attention_matrix(q.double(), k.double(), **options)), exact, rtol=1e-9, atol=1e-12
    )


def test_the_matrix_in_blocks_of_rows(monkeypatch):
    q, k, _ = make_qkv(1, 2, 1, 50, 50, 16)
    decay = make_decay("channel", 1, 2, 50, 16)
    whole = linear_attention_matrix(q, k, decay=decay)
    monkeypatch.setattr(sys.modules["causalattn.linear_attention.matrix"], "BLOCK_ENTRIES", 7 * 2 * 50 * 16)
    torch.testing.assert_close(linear_attention_matrix(q, k, decay=decay), whole)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(shape=st.sampled_from([(2, 4, 2, 70), (1, 1, 1, 1), (1, 2, 1, 65)]), normalize=st.booleans(), seed=SEEDS)
def test_without_causality_every_query_reads_the_last_state(dtype, shape, normalize, seed):
    B, H, H_kv, T = shape
    q, k, v = make_qkv(B, H, H_kv, T, T, 16, 8, dtype, seed)
    wide = torch.promote_types(dtype, torch.float32)
    options = {"normalize": normalize, "initial_state": make_state(B, H, 16, 8, seed, wide), "causal": False}
    result = linear_attention(q, k, v, **options)
    expected, states = reference(*map(to_numpy, (q, k, v)), **numpy_options(options))
    wider = [x.to(wide) for x in (q, k, v)]
    W = linear_attention_matrix(*wider[:2], causal=False, normalize=False)
    phi, state = ca.feature_maps.elu(wider[0]), options["initial_state"]
    rival = W @ wider[2].repeat_interleave(H // H_kv, 1) + phi @ state.s
    if normalize:
        rival = rival / (W.sum(-1, keepdim=True) + phi @ state.z[..., None])
    assert_within_reference_error(result.out, rival.to(dtype), expected, axis=None, roundings=4.0)
    for x, y in zip(result.state, states, strict=True):
        np.testing.assert_allclose(to_numpy(x), y, rtol=1e-5, atol=1e-5)
    A = linear_attention_matrix(q.double(), k.double(), causal=False, normalize=normalize)
    plain = linear_attention(q.double(), k.double(), v.double(), causal=False, normalize=normalize).out
    torch.testing.assert_close(plain, A @ v.double().repeat_interleave(H // H_kv, 1))


def test_without_causality_gradients_and_bits():
    q, k, v = make_qkv(2, 2, 1, 9, 9, 3, 4, torch.float64, strided=False)
    state = make_state(2, 2, 3, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, *state)]
    torch.autograd.gradcheck(
        lambda q, k, v, s, z: flat(linear_attention(q, k, v, causal=False, initial_state=LinearState(s, z))), leaves
    )
    q, k, v = make_qkv(3, 2, 1, 70, 70, 16)
    together = linear_attention(q, k, v, causal=False)
    for b in range(3):
        alone = linear_attention(*(x[b : b + 1] for x in (q, k, v)), causal=False)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(flat(together), flat(alone), strict=True))


def test_a_map_that_is_not_elementwise_goes_through_both_ways():
    q, k, v = make_qkv(1, 2, 1, 40, 40, 4, dtype=torch.float64, strided=False)
    for name in ("taylor2", "favor", lambda x: torch.cat([x, -x], -1).relu()):
        A = linear_attention_matrix(q, k, feature_map=name)
        result = linear_attention(q, k, v, feature_map=name)
        torch.testing.assert_close(result.out, A @ v.repeat_interleave(2, 1))
        assert result.state.z.shape[-1] == {"taylor2": 15, "favor": 256}.get(name, 8)
    q.requires_grad_()
    torch.autograd.gradcheck(lambda q: linear_attention(q, k, v, feature_map="taylor2").out, q, fast_mode=True)


def test_autocast_changes_nothing():
    q, k, v = make_qkv(1, 2, 1, 40, 40, 16)
    for run in (
        lambda: linear_attention(q, k, v),
        lambda: linear_attention(q, k, v, feature_map="favor"),
        lambda: linear_attention(q, k, v, causal=False),
        lambda: linear_attention_step(q[:, :, :1], k[:, :, :1], v[:, :, :1], None),
        lambda: [linear_attention_matrix(q, k)],
    ):
        expected = run()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            result = run()
        assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("options", [{}, {"decay": "step"}, {"decay": "channel"}, {"packed": True}], ids=str)
def test_operator_contract(options):
    q, k, v = make_qkv(1, 4, 2, 20, 20, 16, 8)
    decay = make_decay(options.get("decay", "none"), 1, 4, 20, 16)
    cu_seqlens = torch.tensor([0, 0, 9, 18], dtype=torch.int32) if options.get("packed") else None
    state = make_state(3 if options.get("packed") else 1, 4, 16, 8) if options else (None, None)
    inputs = (q, k, v, decay, *state, cu_seqlens, "elu", True, 1.0)
    torch.library.opcheck(forward.linear_attend, (*inputs, "torch"))
    results = forward.linear_attend(*inputs, "torch")
    upstream = [torch.randn_like(results[i]) for i in (0, 2, 3)]
    torch.library.opcheck(backward.linear_attend_backward, (*inputs, *results, *upstream, decay is not None, "torch"))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(forward.linear_attend, (*leaves, *inputs[3:], "torch"))


@pytest.mark.parametrize("name", ["elu", "taylor2", "favor"])
@pytest.mark.parametrize("causal", [True, False])
def test_one_graph_serves_every_length(name, causal):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(q, k, v, g):
        return flat(linear_attention(q, k, v, decay=g if causal else None, feature_map=name, causal=causal))

    compiled = torch.compile(run, backend=count, fullgraph=True)
    for T in range(10, 90, 4):
        q, k, v = make_qkv(1, 2, 1, T, T, 16, strided=False)
        g = make_decay("step", 1, 2, T, 16).contiguous()
        assert all(torch.equal(x, y) for x, y in zip(compiled(q, k, v, g), run(q, k, v, g), strict=True))
    assert len(graphs) <= 2


GOOD = torch.zeros(2, 4, 5, 16)
STATE = LinearState(torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16))
ONE = GOOD[:1]


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "q must have 4 axes [B, H, T, D], got [4, 5, 16]", (GOOD[0], GOOD, GOOD), {}),
        (TypeError, "k must have q's dtype float32, got float16", (GOOD, GOOD.half(), GOOD), {}),
        (ValueError, "linear_attention needs as many queries as keys", (GOOD, GOOD[:, :, :3], GOOD[:, :, :3]), {}),
        (ValueError, "v must have shape [2, 4, 5, V]", (GOOD, GOOD, GOOD[:, :, :3]), {}),
        (ValueError, "v must have shape [2, 4, 5, V], V ≥ 1", (GOOD, GOOD, GOOD[..., :0]), {}),
        (ValueError, "head dim of at least 1", (GOOD[..., :0], GOOD[..., :0], GOOD), {}),
        (ValueError, "head count that divides q's 4, got 3", (GOOD, GOOD[:, :3], GOOD[:, :3]), {}),
        (ValueError, "feature_map must be one of elu, relu", (GOOD, GOOD, GOOD), {"feature_map": "silu"}),
        (TypeError, "feature_map must be a name or a callable, got int", (GOOD, GOOD, GOOD), {"feature_map": 3}),
        (ValueError, "feature_map must be at least 0 with normalize=True, got 'identity'", (GOOD,) * 3,
         {"feature_map": "identity"}),
        (ValueError, "feature_map must be at least 0 with normalize=True, got -1", (GOOD,) * 3,
         {"feature_map": lambda x: x - 1}),
        (ValueError, "feature_map must return shape [2, 4, 5, F], got [2, 4, 5]", (GOOD,) * 3,
         {"feature_map": lambda x: x.sum(-1)}),
        (ValueError, "scale must be 1 with normalize=True, which divides it out, got 0.5", (GOOD,) * 3, {"scale": 0.5}),
        (TypeError, "decay must be a torch.Tensor, got float", (GOOD,) * 3, {"decay": -0.1}),
        (TypeError, "decay must be floating point, got int64", (GOOD,) * 3, {"decay": torch.zeros(4).long()}),
        (ValueError, "decay must be on q's device cpu, got meta", (GOOD,) * 3, {"decay": torch.zeros(4).to("meta")}),
        (ValueError, "decay must have shape [4], [2, 4, 5] or [2, 4, 5, 16], got [5]", (GOOD,) * 3,
         {"decay": torch.zeros(5)}),
        (ValueError, "decay must be a finite logarithm of at most 0, got 0.5", (GOOD,) * 3,
         {"decay": torch.full((4,), 0.5)}),
        (ValueError, "at most 0, got nan", (GOOD,) * 3, {"decay": torch.full((4,), torch.nan)}),
        (ValueError, "at most 0, got -inf", (GOOD,) * 3, {"decay": torch.full((4,), -torch.inf)}),
        (ValueError, "cu_seqlens needs a batch of 1, got 2", (GOOD,) * 3, {"cu_seqlens": [0, 5]}),
        (ValueError, "cu_seqlens must have shape [segments + 1], got [1, 2]", (ONE,) * 3, {"cu_seqlens": [[0, 5]]}),
        (ValueError, "cu_seqlens must start at 0", (ONE,) * 3, {"cu_seqlens": [1, 5]}),
        (ValueError, "never decrease and end at 5 or before, got [0, 3, 2]", (ONE,) * 3, {"cu_seqlens": [0, 3, 2]}),
        (ValueError, "end at 5 or before, got [0, 6]", (ONE,) * 3, {"cu_seqlens": torch.tensor([0, 6])}),
        (TypeError, "cu_seqlens must hold integers, got float32", (ONE,) * 3, {"cu_seqlens": torch.tensor([0.0, 5.0])}),
        (TypeError, "initial_state must be a LinearState, got Tensor", (GOOD,) * 3, {"initial_state": STATE.s}),
        (TypeError, "initial_state.z must be a torch.Tensor, got NoneType", (GOOD,) * 3,
         {"initial_state": STATE._replace(z=None)}),
        (ValueError, "initial_state.s must have shape [2, 4, 16, 16], got [1, 4, 16, 16]", (GOOD,) * 3,
         {"initial_state": STATE._replace(s=STATE.s[:1])}),
        (ValueError, "initial_state.s must have shape [3, 4, 16, 16]", (ONE,) * 3,
         {"initial_state": STATE, "cu_seqlens": [0, 1, 2, 5]}),
        (TypeError, "initial_state.z must be float32, got bfloat16", (GOOD,) * 3,
         {"initial_state": STATE._replace(z=STATE.z.bfloat16())}),
        (TypeError, "initial_state.s must be float64, got float32", (GOOD.double(),) * 3, {"initial_state": STATE}),
        (ValueError, "initial_state.s must be on q's device cpu, got meta", (GOOD,) * 3,
         {"initial_state": STATE._replace(s=STATE.s.to("meta"))}),
        (ValueError, "causal=False takes no decay", (GOOD,) * 3, {"causal": False, "decay": torch.zeros(4)}),
        (ValueError, "causal=False takes no decay and no cu_seqlens", (ONE,) * 3,
         {"causal": False, "cu_seqlens": [0, 5]}),
        (ValueError, "backend must be", (GOOD,) * 3, {"backend": "cuda"}),
        (ValueError, "backend must be", (GOOD,) * 3, {"backend": "cuda", "causal": False}),
        (TypeError, "got float64", (GOOD.double(),) * 3, {"backend": "triton"}),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=re.escape(match)):
        linear_attention(*arguments, **options)


def test_bad_input_of_the_other_forms_is_named():
    with pytest.raises(ValueError, match=re.escape("q must hold one token, [B, H, 1, D], got [2, 4, 5, 16]")):
        linear_attention_step(GOOD, GOOD, GOOD, None)
    one = GOOD[:, :, :1]
    with pytest.raises(ValueError, match="decay must have shape"):
        linear_attention_step(one, one, one, None, decay=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=re.escape("state.s must have shape [2, 4, 16, 16]")):
        linear_attention_step(one, one, one, STATE._replace(s=STATE.s[:1]))
    with pytest.raises(ValueError, match="scale must be 1"):
        linear_attention_matrix(GOOD, GOOD, scale=2.0)
    with pytest.raises(ValueError, match="linear_attention_matrix needs as many queries"):
        linear_attention_matrix(GOOD, GOOD[:, :, :2])
    with pytest.raises(ValueError, match="causal=False takes no decay"):
        linear_attention_matrix(GOOD, GOOD, causal=False, decay=torch.zeros(4))

"""selective_scan on every path against the float64 specification."""

import sys

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, PATHS, SEEDS, assert_within_reference_error, to_numpy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scans import SHORT, cancellation, expected_of, make_case, plain_scan, short_groups, tokens  # noqa: F401

import causalattn
from causalattn.selective_scan import forward, groups, selective_scan

RULES = st.sampled_from(["zoh", "euler"])
SIZES = st.sampled_from([(1, 1), (3, 2), (17, 5), (33, 16)])
OPTIONS = st.sampled_from(["", "D", "z initial_state", "D z initial_state"])
# an interpreted token takes milliseconds: no shrinking
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.explicit, Phase.generate])


def check(backend, case, discretization="zoh", **limits):
    result = selective_scan(**case, discretization=discretization, backend=backend)
    plain = plain_scan(**case, discretization=discretization)
    expected = expected_of(case, discretization)
    for x, y, exact, roundings in zip(result, plain, expected, cancellation(case, discretization), strict=True):
        assert_within_reference_error(x, y, exact, axis=None, roundings=roundings)
    return result


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(B=st.integers(1, 2), T=st.sampled_from([1, 8, 11, 17]), size=SIZES, rule=RULES, options=OPTIONS, seed=SEEDS)
@settings(shared, max_examples=max(6, settings.default.max_examples // 2))
def test_matches_float64(backend, dtype, B, T, size, rule, options, seed):
    check(backend, make_case(B, T, *size, dtype, seed, options=options), rule)


@pytest.mark.parametrize("backend", PATHS)
def test_groups_of_their_own_length(backend):
    assert groups.GROUP == 64
    check(backend, make_case(1, 70, 3, 2))


@pytest.mark.parametrize("T", [1, 63, 64, 130, 1000])
@pytest.mark.parametrize("rule", ["zoh", "euler"])
def test_many_groups_of_the_torch_path(T, rule):
    check("torch", make_case(2, T, 5, 4), rule)


@pytest.mark.full
def test_many_groups_of_the_kernels():
    check(PATHS[-1], make_case(2, 300, 5, 4))


@given(T=st.sampled_from([1, 63, 130]), size=SIZES, rule=RULES, options=OPTIONS, seed=SEEDS)
def test_float64_goes_through_the_torch_path(T, size, rule, options, seed):
    case = make_case(2, T, *size, torch.float64, seed, options=options)
    result = selective_scan(**case, discretization=rule)
    for x, exact, roundings in zip(result, expected_of(case, rule), cancellation(case, rule), strict=True):
        assert x.dtype == torch.float64
        np.testing.assert_allclose(to_numpy(x), exact, rtol=0, atol=1e-14 * roundings * np.abs(exact).max())


def test_states_as_wide_as_a_program_may_hold():
    for backend in PATHS:
        check(backend, make_case(1, 3, 2, 130))


def test_inputs_may_have_their_own_dtypes():
    case = make_case(2, 9, 3, 4, torch.bfloat16)
    case["delta"], case["B"] = case["delta"].float(), case["B"].half()
    for backend in PATHS:
        check(backend, case)


@given(rule=RULES, seed=SEEDS, options=OPTIONS)
@settings(shared)
@pytest.mark.usefixtures("short_groups")
def test_resuming_at_every_token_gives_the_whole(rule, seed, options):
    case = make_case(1, 19, 3, 2, torch.float64, seed, options=options)
    whole = selective_scan(**case, discretization=rule)
    for t in range(20):
        first = selective_scan(**tokens(case, 0, t), discretization=rule)
        second = selective_scan(**tokens(case, t, 19) | {"initial_state": first.state}, discretization=rule)
        torch.testing.assert_close(torch.cat([first.out, second.out], 1), whole.out, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(second.state, whole.state, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_resuming_on_every_path(backend):
    case = make_case(1, 18, 3, 2)
    whole = selective_scan(**case, backend=backend)
    first = selective_scan(**tokens(case, 0, SHORT), backend=backend)
    assert torch.equal(first.out, whole.out[:, :SHORT])
    for t in (5, SHORT):
        first = selective_scan(**tokens(case, 0, t), backend=backend)
        second = selective_scan(**tokens(case, t, 18) | {"initial_state": first.state}, backend=backend)
        resumed = torch.cat([first.out, second.out], 1)
        exact = expected_of(case)
        roundings = cancellation(case)[0]
        assert_within_reference_error(resumed, plain_scan(**case)[0], exact[0], axis=None, roundings=roundings)


@pytest.mark.parametrize("step", [0.01, 0.1, 0.5])
def test_halving_every_step_changes_nothing_under_zoh_alone(step):
    case = make_case(1, 90, 4, 16, torch.float64, step=step, options="D initial_state")
    case["delta"] = torch.full_like(case["delta"], step)
    fine = {name: x.repeat_interleave(2, 1) if name in ("u", "B", "C") else x for name, x in case.items()}
    fine["delta"] = case["delta"].repeat_interleave(2, 1) / 2
    for rule in ("zoh", "euler"):
        coarse, finer = (selective_scan(**x, discretization=rule) for x in (case, fine))
        change = (finer.out[:, 1::2] - coarse.out).abs().max() / coarse.out.abs().max()
        assert change < 1e-13 if rule == "zoh" else change > step / 100


@pytest.mark.parametrize("backend", PATHS)
def test_a_rate_of_zero_only_sums(backend):
    case = make_case(1, 9, 5, 1, options="")
    case["A"] = torch.tensor([0.0, -0.0, -1e-42, -1e-20, -1e-9], device=DEVICE)[:, None]
    result = check_limit(case, backend)
    euler = selective_scan(**case, discretization="euler", backend=backend)
    torch.testing.assert_close(result.out, euler.out, rtol=1e-6, atol=1e-6)


def check_limit(case, backend):
    result = selective_scan(**case, backend=backend)
    sums = (case["delta"] * case["B"] * case["u"]).double().cumsum(1)
    torch.testing.assert_close(result.out.double(), sums * case["C"].double(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(result.state[..., 0].double(), sums[:, -1], rtol=1e-5, atol=1e-6)
    return result


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("exponent", [1e-4, 0.3, 0.49, 0.51, 0.6, 3.0])
def test_both_forms_of_the_input_weight_meet(backend, exponent):
    case = make_case(1, 5, 2, 3)
    case["A"] = torch.full_like(case["A"], -exponent)
    case["delta"] = torch.ones_like(case["delta"])
    check(backend, case)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.usefixtures("short_groups")
def test_decays_of_e_to_the_minus_eighty_a_step(backend):
    case = make_case(1, 20, 3, 2)
    case["A"] = case["A"] * 0 - 80.0
    case["A"][0] = -1e30
    case["delta"] = torch.ones_like(case["delta"])
    result = check(backend, case)
    assert all(x.isfinite().all() for x in result)


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_no_token_reaches_an_earlier_one(backend):
    case = make_case(1, 12, 3, 2)
    before = selective_scan(**case, backend=backend).out
    for t in (1, 8, 10):
        changed = {
            name: torch.cat([x[:, :t], torch.full_like(x[:, t:], torch.nan if name != "delta" else 2.0)], 1)
            if name in ("u", "delta", "B", "C", "z")
            else x
            for name, x in case.items()
        }
        assert torch.equal(selective_scan(**changed, backend=backend).out[:, :t], before[:, :t])


@given(seed=SEEDS, rule=RULES)
def test_linear_in_the_inputs(seed, rule):
    case = make_case(1, 70, 3, 4, torch.float64, seed, options="D z")
    other = make_case(1, 70, 3, 4, torch.float64, seed + 1)["u"]
    one, two, both = (
        selective_scan(**case | {"u": u}, discretization=rule) for u in (case["u"], other, 2 * case["u"] - 3 * other)
    )
    for x, y, z in zip(one, two, both, strict=True):
        torch.testing.assert_close(2 * x - 3 * y, z, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", ["zoh", "euler"])
def test_constant_steps_and_projections_are_a_convolution(rule):
    case = make_case(2, 150, 3, 4, torch.float64, options="D")
    delta, b, c = case["delta"][0, 0], case["B"][0, 0], case["C"][0, 0]
    x = to_numpy(delta[:, None] * case["A"])
    held = np.expm1(x) / to_numpy(case["A"]) if rule == "zoh" else to_numpy(delta)[:, None]
    lags = np.arange(150)
    kernel = np.einsum("n,en,n,ent->et", to_numpy(c), held, to_numpy(b), np.exp(x[..., None] * lags))
    u = to_numpy(case["u"])
    expected = np.stack([[np.convolve(u[i, :, e], kernel[e])[:150] for e in range(3)] for i in range(2)])
    expected = expected.transpose(0, 2, 1) + to_numpy(case["D"]) * u
    constant = selective_scan(case["u"], delta, case["A"], b, c, case["D"], discretization=rule)
    np.testing.assert_allclose(to_numpy(constant.out), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for backend in PATHS:
        small = [x[:, :5].float() if x.ndim == 3 else x.float() for x in (case["u"], delta, case["A"], b, c)]
        expanded = [small[0], small[1].expand(2, 5, 3), small[2], *(x.expand(2, 5, 4) for x in small[3:])]
        whole = [x.contiguous() for x in expanded]
        results = [selective_scan(*x, discretization=rule, backend=backend).out for x in (small, expanded, whole)]
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def test_constants_reach_the_operator_without_a_copy(monkeypatch):
    case = make_case(2, 5, 3, 4, options="")
    seen = []
    scan = forward.scan
    package = sys.modules["causalattn.selective_scan"]
    monkeypatch.setattr(package, "scan", lambda *args: seen.extend(args[1:5]) or scan(*args))
    selective_scan(case["u"], case["delta"][0, 0], case["A"], case["B"][0, 0], case["C"][0, 0])
    assert [x.stride()[:2] for x in (seen[0], *seen[2:])] == [(0, 0)] * 3


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_right_padding_nor_strides(backend):
    case = make_case(3, 12, 5, 4)
    together = selective_scan(**case, backend=backend)
    for b, T in enumerate((12, 1, 10)):
        alone = {name: x[b : b + 1] if name not in ("A", "D") else x for name, x in tokens(case, 0, T).items()}
        result = selective_scan(**{name: x.contiguous() for name, x in alone.items()}, backend=backend)
        assert torch.equal(result.out, together.out[b : b + 1, :T])
    again = selective_scan(**case, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(again, together, strict=True))


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_steps_of_length_zero_keep_the_state(backend):
    case = make_case(1, 9, 3, 2)
    case["delta"][:, 5:] = 0
    first = selective_scan(**tokens(case, 0, 5), backend=backend).state
    assert torch.equal(selective_scan(**tokens(case, 0, SHORT), backend=backend).state, first)
    # beyond the group the carry rounds in its own way
    torch.testing.assert_close(selective_scan(**case, backend=backend).state, first)


@pytest.mark.parametrize("together", [1, 300, 5000])
def test_what_advances_together_changes_no_bit(monkeypatch, together):
    case = make_case(3, 700, 5, 4)
    results = selective_scan(**case)
    monkeypatch.setattr(groups, "TOGETHER", together)
    assert all(torch.equal(x, y) for x, y in zip(selective_scan(**case), results, strict=True))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
def test_empty(backend, B, T):
    case = make_case(B, T, 3, 2)
    out, state = selective_scan(**case, backend=backend)
    assert out.shape == (B, T, 3) and torch.equal(state, case["initial_state"])
    assert state.data_ptr() != case["initial_state"].data_ptr() or not state.numel()
    del case["initial_state"]
    assert torch.equal(selective_scan(**case, backend=backend).state, torch.zeros(B, 3, 2, device=DEVICE))


def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda **case: tuple(selective_scan(**case)), backend=count, fullgraph=True)
    for T in range(10, 210, 10):
        case = make_case(2, T, 3, 4, strided=False)
        assert all(torch.equal(x, y) for x, y in zip(compiled(**case), selective_scan(**case), strict=True))
    assert len(graphs) <= 2


WRONG = {
    "u must be a torch.Tensor, got list": (TypeError, {"u": [1.0]}),
    r"u must have 3 axes \[B, T, E\], got \[5, 3\]": (ValueError, {"u": torch.zeros(5, 3)}),
    "u must be float16, bfloat16, float32 or float64, got int64": (TypeError, {"u": torch.zeros(2, 5, 3).long()}),
    r"A must have shape \[3, N\], neither of them 0, got \[2, 4\]": (ValueError, {"A": torch.zeros(2, 4)}),
    r"A must have shape \[3, N\], neither of them 0, got \[3, 0\]": (ValueError, {"A": torch.zeros(3, 0)}),
    "A must be float16, bfloat16, float32 or float64, got complex64": (TypeError, {"A": torch.zeros(3, 4) + 0j}),
    r"delta must have shape \[2, 5, 3\] or \[3\], got \[2, 4, 3\]": (ValueError, {"delta": torch.zeros(2, 4, 3)}),
    r"B must have shape \[2, 5, 4\] or \[4\], got \[5, 4\]": (ValueError, {"B": torch.zeros(5, 4)}),
    "C must be a torch.Tensor, got NoneType": (TypeError, {"C": None}),
    r"D must have shape \[3\], got \[4\]": (ValueError, {"D": torch.zeros(4)}),
    r"z must have shape \[2, 5, 3\], got \[3\]": (ValueError, {"z": torch.zeros(3)}),
    r"initial_state must have shape \[2, 3, 4\], got \[4, 3\]": (ValueError, {"initial_state": torch.zeros(4, 3)}),
    "initial_state must be float32 where u is float32, got float16": (
        TypeError, {"initial_state": torch.zeros(2, 3, 4).half()}
    ),
    "delta may be float64 only where u is, got u float32": (TypeError, {"delta": torch.zeros(3).double()}),
    "A must be at most 0, for delta · A is a log-decay, got 0.5": (ValueError, {"A": torch.full((3, 4), 0.5)}),
    "delta must be at least 0, for delta · A is a log-decay, got -1": (ValueError, {"delta": -torch.ones(3)}),
    "D must be on u's device cpu, got meta": (ValueError, {"D": torch.zeros(3, device="meta")}),
    "discretization must be 'zoh' or 'euler', got 'bilinear'": (ValueError, {"discretization": "bilinear"}),
    "backend must be 'auto', 'triton' or 'torch', got 'cuda'": (ValueError, {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    error, wrong = WRONG[message]
    case = {name: x.cpu() for name, x in make_case(2, 5, 3, 4).items()}
    with pytest.raises(error, match=message):
        selective_scan(**case | wrong)


def test_float64_is_not_for_kernels():
    with pytest.raises(TypeError, match="backend='triton' takes float16, bfloat16 or float32, got float64"):
        selective_scan(**make_case(1, 2, 3, 4, torch.float64), backend="triton")


def test_public_name():
    assert causalattn.selective_scan is selective_scan

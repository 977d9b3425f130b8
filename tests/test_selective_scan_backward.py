"""Gradients of selective_scan: gradcheck on the torch path, both paths against float64, bits, contract."""

import sys

import numpy as np
import pytest
import torch
from helpers import DEVICE, PATHS, SEEDS, assert_within_reference_error, grown_memory, to_numpy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scans import SHORT, make_case, plain_scan, short_groups, tokens  # noqa: F401

from causalattn.selective_scan import backward, forward, selective_scan

RULES = st.sampled_from(["zoh", "euler"])
SIZES = st.sampled_from([(1, 1), (3, 2), (17, 5)])
OPTIONS = st.sampled_from(["", "D", "z initial_state", "D z initial_state"])
# an interpreted token takes milliseconds: no shrinking
few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.explicit, Phase.generate])


def upstream_of(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, A = case["u"], case["A"]
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in (u.shape, (u.shape[0], *A.shape))]


def gradients(run, case, upstream, dtype=None):
    """Of Σ out·upstream + Σ state·upstream by every argument."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in case.items()}
    loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(run(**leaves), upstream, strict=True))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check(backend, case, rule):
    """Every gradient within twice the error of eager torch's autograd, both against float64."""
    upstream = upstream_of(case)
    ours = gradients(lambda **x: selective_scan(**x, discretization=rule, backend=backend), case, upstream)
    plain = gradients(lambda **x: plain_scan(**x, discretization=rule), case, upstream)
    exact = gradients(lambda **x: plain_scan(**x, discretization=rule), case, upstream, torch.float64)
    # the same sums without cancellation: what a rounding of their terms may be
    sizes = {name: x if name in ("A", "z") else x.abs() for name, x in case.items()}
    largest = gradients(
        lambda **x: plain_scan(**x, discretization=rule), sizes, [g.abs() for g in upstream], torch.float64
    )
    for name, x in ours.items():
        assert x.dtype == case[name].dtype and x.shape == case[name].shape
        expected = to_numpy(exact[name])
        roundings = 2 + np.abs(to_numpy(largest[name])).max() / max(np.abs(expected).max(), 1e-30)
        assert_within_reference_error(x, plain[name], expected, axis=None, roundings=roundings)


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(T=st.sampled_from([1, 7, 11]), size=SIZES, rule=RULES, options=OPTIONS, seed=SEEDS)
@settings(few, max_examples=max(4, settings.default.max_examples // 3))
def test_within_twice_the_error_of_eager_torch(backend, dtype, T, size, rule, options, seed):
    check(backend, make_case(1, T, *size, dtype, seed, options=options), rule)


@pytest.mark.parametrize("rule", ["zoh", "euler"])
def test_several_sequences_of_many_groups(rule):
    check("torch", make_case(3, 300, 4, 3), rule)


@pytest.mark.usefixtures("short_groups")
def test_several_sequences_of_the_kernels():
    check(PATHS[-1], make_case(2, 9, 3, 4), "zoh")


@pytest.mark.parametrize("rule", ["zoh", "euler"])
@pytest.mark.parametrize("options", ["", "D z initial_state"])
@pytest.mark.usefixtures("short_groups")
def test_gradcheck_in_float64(rule, options):
    case = make_case(2, 10, 2, 3, torch.float64, options=options)
    names = [*case]
    leaves = [x.detach().clone().requires_grad_() for x in case.values()]

    def run(*values):
        return tuple(selective_scan(**dict(zip(names, values, strict=True)), discretization=rule))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("rule", ["zoh", "euler"])
def test_gradcheck_where_a_rate_is_zero(rule):
    case = make_case(1, 5, 2, 3, torch.float64, options="", step=2.0)
    case["A"] = torch.tensor([[0.0, -1e-9, -0.2], [-1e-3, -0.6, 0.0]], dtype=torch.float64, device=DEVICE)
    leaves = [x.detach().clone().requires_grad_() for x in case.values()]
    # the operator itself: a rate is moved past 0
    assert torch.autograd.gradcheck(
        lambda *values: forward.scan(*values, None, None, None, rule == "zoh", "torch")[:2], leaves
    )


@pytest.mark.parametrize("backend", PATHS)
def test_near_a_rate_of_zero(backend):
    case = make_case(1, 6, 7, 1, options="")
    case["A"] = -torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.1, 0.49, 0.52], device=DEVICE)[:, None]
    case["delta"] = torch.ones_like(case["delta"])
    upstream = upstream_of(case)
    ours = gradients(lambda **x: selective_scan(**x, backend=backend), case, upstream)
    exact = gradients(lambda **x: selective_scan(**x), case, upstream, torch.float64)
    for name, x in ours.items():
        torch.testing.assert_close(x.double(), exact[name], rtol=1e-5, atol=3e-6)


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_bits_depend_on_neither_batch_nor_right_padding(backend):
    case = make_case(2, 12, 3, 4)
    upstream = upstream_of(case)[0]
    lengths = (12, 9)
    for b, T in enumerate(lengths):
        upstream[b, T:] = 0

    def run(case, upstream):
        return gradients(lambda **x: selective_scan(**x, backend=backend)[:1], case, [upstream])

    together = run(case, upstream)
    for b, T in enumerate(lengths):
        one = {name: x[b : b + 1] if name not in ("A", "D") else x for name, x in tokens(case, 0, T).items()}
        alone = run(one, upstream[b : b + 1, :T])
        for name in ("u", "delta", "B", "C", "z", "initial_state"):
            x = together[name][b : b + 1]
            assert torch.equal(x[:, :T] if name != "initial_state" else x, alone[name]), name


@pytest.mark.usefixtures("short_groups")
@pytest.mark.parametrize("backend", PATHS)
def test_one_result_alone(backend):
    case = make_case(1, 10, 3, 2)
    upstream = upstream_of(case)
    whole = gradients(lambda **x: selective_scan(**x, backend=backend), case, upstream)
    parts = [
        gradients(lambda n=n, **x: selective_scan(**x, backend=backend)[n : n + 1], case, upstream[n : n + 1])
        if n == 0
        else _of_the_state(case, upstream[1], backend)
        for n in (0, 1)
    ]
    for name, x in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


def _of_the_state(case, upstream, backend):
    leaves = {name: x.detach().requires_grad_() for name, x in case.items()}
    state = selective_scan(**leaves, backend=backend).state
    grads = torch.autograd.grad(state, list(leaves.values()), upstream, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def test_constants_take_the_sum_of_their_tokens():
    case = make_case(2, 9, 3, 4, torch.float64, options="")
    constant = case | {name: case[name][0, 0] for name in ("delta", "B", "C")}
    expanded = case | {name: case[name][:1, :1].expand(2, 9, -1) for name in ("delta", "B", "C")}
    upstream = upstream_of(case)
    ours = gradients(selective_scan, constant, upstream)
    whole = gradients(selective_scan, expanded, upstream)
    for name, x in ours.items():
        y = whole[name].sum((0, 1)) if name in ("delta", "B", "C") else whole[name]
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


if "triton" in PATHS:

    @pytest.mark.usefixtures("short_groups")
    def test_slices_of_the_workspace_change_no_bit(monkeypatch):
        case = make_case(1, 11, 3, 2)
        upstream = upstream_of(case)

        def run():
            return gradients(lambda **x: selective_scan(**x, backend="triton"), case, upstream)

        whole = run()
        monkeypatch.setattr(sys.modules["causalattn.kernels.selective_scan.backward"], "WORKSPACE", 1)
        assert all(torch.equal(x, whole[name]) for name, x in run().items())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)])
def test_empty(backend, B, T):
    case = make_case(B, T, 3, 2)
    ours = gradients(lambda **x: selective_scan(**x, backend=backend), case, upstream_of(case))
    expected = upstream_of(case)[1]
    for name, x in ours.items():
        assert torch.equal(x, expected if name == "initial_state" else torch.zeros_like(case[name])), name


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("options", ["", "D z initial_state"])
def test_operator_contract(backend, options):
    case = make_case(2, 2, 2, 3, options=options)
    values = [case.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "initial_state")]
    leaves = [None if x is None else x.detach().requires_grad_() for x in values]
    torch.library.opcheck(forward.scan, (*leaves, True, backend))
    starts = forward.scan(*values, True, backend)[2]
    upstream = upstream_of(case)
    torch.library.opcheck(backward.scan_backward, (*values[:7], starts, *upstream, True, backend))


def test_one_graph_differentiates_every_length():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda **case: tuple(selective_scan(**case)), backend=count, fullgraph=True)
    for T in range(10, 210, 10):
        case = make_case(1, T, 3, 2, strided=False)
        upstream = upstream_of(case)
        ours = gradients(compiled, case, upstream)
        assert all(torch.equal(x, ours[name]) for name, x in gradients(selective_scan, case, upstream).items())
    assert len(graphs) <= 2


def test_memory_grows_with_groups_not_with_states():
    case = make_case(1, 50 * SHORT, 3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_scan(**{name: x.detach().requires_grad_() for name, x in case.items()})
    largest = max(x.numel() for x in saved)
    assert largest == max(case["u"].numel(), case["B"].numel()) < case["u"].numel() * 4


MEMORY = """
def run(T):
    u, delta = torch.rand(2, 1, T, 32, requires_grad=True).unbind()
    B, C = torch.rand(2, 1, T, 16, requires_grad=True).unbind()
    out, h = ca.selective_scan(u, delta, -torch.rand(32, 16), B, C)
    (out.sum() + h.sum()).backward()
"""


# peak memory is read from /proc
if sys.platform == "linux":

    def test_memory_holds_no_state_a_token():
        short, long = grown_memory(MEMORY, 32768, 131072)
        assert long < 6 * short
        assert 1024 * long < 0.8 * 4 * 131072 * 32 * 16

"""partial_correlation and its like on every path against the float64 specification, and against 50-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
from correlations import ROUNDINGS, attention, correlation, smallest_pivot, some_tests, tensor
from helpers import DEVICE, PATHS, SEEDS, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from partial_corr_accuracy import exact

import causalattn as ca
from causalattn.partial_corr.factor import pivot_floor
from causalattn.reference import partial_corr as reference

CUT = ca.critical_correlation(768, 0.01, 0)


def rounding(dtype):
    return torch.finfo(dtype).eps / 2


def sets(given):
    return [[t for t in row if t >= 0] for row in given.tolist()]


def specified(R, i, j, given):
    """r and status of each test of R [T, T] by the specification."""
    tests = zip(i.tolist(), j.tolist(), sets(given), strict=True)
    found = [reference.partial_correlation(to_numpy(R), *test) for test in tests]
    return np.array([r for r, _ in found]), np.array([status for _, status in found])


@pytest.mark.parametrize("backend", PATHS)
@given(m=st.integers(0, 16), T=st.sampled_from([18, 33, 64]), N=st.sampled_from([1, 7, 130]), seed=SEEDS)
def test_matches_the_specification(backend, m, T, N, seed):
    R = tensor(correlation(attention(T, seed=seed)))
    i, j, given = some_tests(T, N, m, seed)
    r, status = ca.partial_correlation(R, i, j, given, backend=backend)
    expected, statuses = specified(R, i, j, given)
    assert r.dtype == torch.float64 and status.dtype == torch.int8
    assert np.array_equal(to_numpy(status), statuses)
    for n, S in enumerate(sets(given)):
        tokens = [*S, int(i[n]), int(j[n])]
        bound = 2 * ROUNDINGS * rounding(R.dtype) / smallest_pivot(to_numpy(R), tokens)
        assert abs(float(r[n]) - expected[n]) <= bound


@pytest.mark.parametrize("backend", PATHS)
def test_many_heads_at_once_and_lists_of_their_own(backend):
    R = torch.stack([tensor(correlation(attention(20, seed=s))) for s in range(6)]).view(2, 3, 20, 20)
    i, j, given = some_tests(20, 40, 3)
    shared = ca.partial_correlation(R, i, j, given, backend=backend)
    assert shared.r.shape == shared.status.shape == (2, 3, 40)
    own = torch.stack([torch.stack(some_tests(20, 40, 1, seed=s)[:2]) for s in range(6)]).view(2, 3, 2, 40)
    several = ca.partial_correlation(R, own[:, :, 0], own[:, :, 1], given.new_full((40, 1), -1), backend=backend)
    for b in range(2):
        for h in range(3):
            alone = ca.partial_correlation(R[b, h], i, j, given, backend=backend)
            # the same bits whatever else is in the batch
            assert torch.equal(shared.r[b, h], alone.r)
            pairs = own[b, h]
            assert torch.equal(several.r[b, h], R[b, h][pairs[0], pairs[1]])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_orders_of_a_pair_have_the_same_bits(backend, dtype):
    R = tensor(correlation(attention(24, sink=3.0)), dtype)
    for m in (0, 1, 4, 9):
        i, j, given = some_tests(24, 200, m)
        one, other = (ca.partial_correlation(R, *pair, given, backend=backend) for pair in ((i, j), (j, i)))
        assert torch.equal(one.status, other.status)
        if m <= 8 or backend == "torch":
            assert torch.equal(one.r.nan_to_num(9), other.r.nan_to_num(9))


@given(scale=st.floats(0.01, 100.0), seed=SEEDS)
def test_signs_and_scales_of_variables_only_change_signs(scale, seed):
    A = attention(16, seed=seed)
    signs = np.where(np.arange(16) % 3 == 0, -1.0, 1.0)
    i, j, given = some_tests(16, 60, 3, seed)
    plain = ca.partial_correlation(tensor(correlation(A)), i, j, given).r
    flipped = ca.partial_correlation(tensor(correlation(A * (scale * signs)[:, None])), i, j, given).r
    sign = tensor(signs)
    assert (flipped - plain * sign[i] * sign[j]).abs().max() < 1e-12


def assert_right(r, status, truth, bound):
    """Within the bound; what is CLIPPED is 1 or −1, and the truth may be as far from it again."""
    clipped = status == ca.Status.CLIPPED
    assert not (status == ca.Status.SINGULAR).any()
    assert (np.abs(r - truth) <= bound)[~clipped].all()
    assert (np.abs(r) == 1)[clipped].all() and (np.abs(r - truth) <= 2 * bound)[clipped].all()


CASES = {
    "near uniform": {"spread": 0.1},
    "causal": {"causal": True},
    "sink 4": {"causal": True, "sink": 4.0},
    "sink 8": {"causal": True, "sink": 8.0},
}


@pytest.mark.parametrize("k", [0, 1, 3, 6])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", PATHS)
def test_accuracy_against_50_digits(backend, name, k, request):
    A = attention(64, **CASES[name], seed=k)
    R = tensor(correlation(A))
    count = 300 if request.config.getoption("--full") else 40
    i, j, given = some_tests(64, count, k, seed=1, padded=False)
    tests = [[*S, a, b] for S, a, b in zip(sets(given), i.tolist(), j.tolist(), strict=True)]
    truth = np.array([exact(A, test) for test in tests])
    pivots = np.array([smallest_pivot(to_numpy(R), test) for test in tests])
    r, status = map(to_numpy, ca.partial_correlation(R, i, j, given, backend=backend))
    assert_right(r, status, truth, ROUNDINGS * rounding(torch.float64) / pivots)
    assert ((np.abs(r) < CUT) == (np.abs(truth) < CUT)).all()

    half = R.float()
    r, status = map(to_numpy, ca.partial_correlation(half, i, j, given, backend=backend))
    known = status != ca.Status.SINGULAR
    assert np.array_equal(np.isnan(r), ~known)
    assert_right(r[known], status[known], truth[known], (ROUNDINGS * rounding(torch.float32) / pivots)[known])
    # what float32 cannot say of R the rows do
    r, status = map(to_numpy, ca.partial_correlation(half, i, j, given, rows=tensor(A, torch.float32), backend=backend))
    assert not (status == ca.Status.SINGULAR).any() and not status[~known].any()
    assert (np.abs(r - truth)[~known] <= 2 * rounding(torch.float32)).all()
    assert ((np.abs(r) < CUT) == (np.abs(truth) < CUT)).all()


@pytest.mark.parametrize("backend", PATHS)
def test_singular_sets_and_pairs_say_so(backend):
    # token 3 is token 1 again, 4 is minus token 2, and 5 lies in the plane of 0 and 1
    A = np.random.default_rng(0).normal(size=(6, 9))
    A[3], A[4], A[5] = A[1], -A[2], A[0] + A[1]
    R = tensor(correlation(A))
    OK, CLIPPED, SINGULAR = ca.Status
    cases = {
        (0, 2, (1,)): OK,
        (1, 3, ()): CLIPPED,
        (1, 3, (0,)): CLIPPED,
        (2, 4, (0, 1)): CLIPPED,
        (0, 2, (1, 3)): SINGULAR,
        (5, 2, (0, 1)): SINGULAR,
        (0, 2, (5, 1)): SINGULAR,
        (2, 3, (1,)): SINGULAR,
    }
    for dtype in (torch.float64, torch.float32):
        for (i, j, S), expected in cases.items():
            r, status = ca.partial_correlation(R.to(dtype), i, j, list(S), backend=backend)
            assert r.shape == () and int(status) == expected, (i, j, S, int(status))
            assert r.isnan() if expected == SINGULAR else r.abs() == 1 if expected == CLIPPED else r.abs() < 1
            again = ca.partial_correlation(R.to(dtype), i, j, list(S), rows=tensor(A, torch.float32), backend=backend)
            # float32 rows are dependent but for a rounding of 2⁻²⁴, whose square is far above the bound
            assert int(again.status) in (expected, OK, CLIPPED) if expected == SINGULAR else again.status == expected
    assert float(ca.partial_correlation(R, 2, 4, backend=backend).r) == -1


@pytest.mark.parametrize("backend", PATHS)
def test_all_rows_equal_is_no_graph(backend):
    R = torch.ones(8, 8, dtype=torch.float64, device=DEVICE)
    i, j, given = some_tests(8, 20, 1, padded=False)
    assert (ca.partial_correlation(R, i, j, backend=backend).status == ca.Status.CLIPPED).all()
    assert (ca.partial_correlation(R, i, j, given, backend=backend).status == ca.Status.SINGULAR).all()
    assert (ca.partial_correlation_given(R, [0]).status[1:, 1:] == ca.Status.SINGULAR).all()
    assert ca.full_partial_correlation(R).r.isnan().all()


@given(m=st.integers(0, 6), seed=SEEDS)
def test_one_set_for_all_pairs(m, seed):
    R = tensor(correlation(attention(17, seed=seed))).expand(2, 17, 17)
    _, _, given = some_tests(17, 5, m, seed)
    r, status = ca.partial_correlation_given(R, given)
    assert r.shape == (2, 5, 17, 17) and torch.equal(r[0].nan_to_num(9), r[1].nan_to_num(9))
    pairs = torch.combinations(torch.arange(17, device=DEVICE))
    for n, S in enumerate(sets(given)):
        outside = ~torch.isin(pairs, torch.tensor(S, device=DEVICE)).any(1)
        i, j = pairs[outside].T
        one = ca.partial_correlation(R[0], i, j, torch.tensor(S, dtype=torch.int64, device=DEVICE).expand(len(i), -1))
        assert (r[0, n, i, j] - one.r).abs().max() < 1e-12
        assert torch.equal(r[0, n].nan_to_num(9), r[0, n].mT.nan_to_num(9))
        i, j = pairs[~outside].T
        assert (status[0, n, i, j] == ca.Status.SINGULAR).all()


def test_given_everything_else_is_the_precision_matrix():
    R = correlation(attention(12, S=40))
    r, status = ca.full_partial_correlation(tensor(R).expand(3, 12, 12))
    assert r.shape == (3, 12, 12) and not status.any()
    assert np.abs(to_numpy(r[1]) - reference.full_partial_correlation(R)).max() < 1e-12
    singular = ca.full_partial_correlation(tensor(correlation(attention(64, causal=True, sink=12.0))))
    assert (singular.status == ca.Status.SINGULAR).all() and singular.r.isnan().all()


def test_the_residuals_of_regressions_are_correlated_so():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    S = X[:, [2, 4, 5]] - X[:, [2, 4, 5]].mean(0)
    x, y = (X[:, c] - X[:, c].mean() for c in (0, 3))
    left = [v - S @ np.linalg.lstsq(S, v, rcond=None)[0] for v in (x, y)]
    expected = np.corrcoef(*left)[0, 1]
    r = ca.partial_correlation(tensor(np.corrcoef(X.T)), 0, 3, [2, 4, 5]).r
    assert abs(float(r) - expected) < 1e-12


# Fisher's cuts at |S| = 0, 1, 2, 4, 8 to four digits
CUTS = {(64, 0.01): [0.3183, 0.3208, 0.3233, 0.3285, 0.3398], (768, 0.01): [0.0929, 0.0929, 0.0930, 0.0931, 0.0933]}


@pytest.mark.parametrize(("n", "alpha"), CUTS)
def test_a_cut_decides_as_its_p_value_does(n, alpha):
    for k, cut in zip((0, 1, 2, 4, 8), CUTS[n, alpha], strict=True):
        ours = ca.critical_correlation(n, alpha, k)
        assert round(ours, 4) == cut
        assert math.isclose(ours, reference.critical_correlation(n, alpha, k), rel_tol=1e-12)
        around = torch.tensor([ours * (1 - 1e-9), ours * (1 + 1e-9)], dtype=torch.float64)
        below, above = ca.fisher_z(around, n, k).p
        assert above < alpha < below


def test_p_values():
    r = torch.tensor([0.0, 0.3, -0.3, 0.999999, 1.0, torch.nan], dtype=torch.float64)
    z, p, log_p = ca.fisher_z(r, 100_000, torch.tensor([0, 1, 1, 2, 3, 4]))
    assert p[0] == 1 and p[1] == p[2] and z[1] == -z[2] and p[4] == 0 and p[5].isnan()
    # p is 0 where no float64 holds it, and log p says how small it is
    assert p[3] == 0 and log_p[4] == -math.inf
    with mpmath.workdps(30):
        expected = float(mpmath.log(mpmath.erfc(abs(float(z[3])) / mpmath.sqrt(2))))
    assert math.isclose(expected, float(log_p[3]), rel_tol=1e-12)


GOOD = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("R", "arguments", "error", "message"),
    [
        ([[1.0]], (0, 1), TypeError, "R must be a torch.Tensor, got list"),
        (GOOD.half(), (0, 1), TypeError, "R must be float32 or float64, got float16"),
        (GOOD[:3], (0, 1), ValueError, r"R must be square, \[..., T, T\], got \[3, 4\]"),
        (GOOD.index_fill(0, torch.tensor(1), torch.nan), (0, 1), ValueError, "R must hold no NaN or inf, got 4"),
        (GOOD + 0.1 * torch.ones(4, 4).triu(1), (0, 1), ValueError, "R must be symmetric, got entries"),
        (GOOD * 2, (0, 1), ValueError, "R must have 1 on its diagonal, got 2 at token 0"),
        (GOOD.index_fill(0, torch.tensor(2), 0), (0, 1), ValueError, "got 0 at token 2, whose row of the attention is"),
        (GOOD, ([0, 0], [1, 1], [2, 3]), ValueError, "the set of each test, got one set for 2 tests"),
        (GOOD + 1.5 * (1 - GOOD), (0, 1), ValueError, "R must lie in −1…1, got 1.5"),
        (GOOD, (0, 0), ValueError, "i and j must be two tokens"),
        (GOOD, (0, 4), ValueError, "i and j must lie in 0…3, got 0…4"),
        (GOOD, (-1, 2), ValueError, "i and j must lie in 0…3, got -1…2"),
        (GOOD, (0, 1, [4]), ValueError, "given must lie in -1…3, got 4…4"),
        (GOOD, (0, 1, [0]), ValueError, "given must hold neither i nor j"),
        (GOOD, (0, 1, [2, 2]), ValueError, "given must hold a token once"),
        (GOOD, (0, 1, 2), ValueError, r"given must be \[N, m\], the set of each test, got a number"),
        (GOOD, ([0, 1], [1, 2, 3]), ValueError, "must have one N"),
        (GOOD, ([0], [1], [[2], [3]]), ValueError, None),
        (GOOD, (0, 1, [-1] * 17), ValueError, "given must have at most 16 columns, got 17"),
        (GOOD, ([0, 1], [1, 2], [[3], [0, 3]]), ValueError, "given must be rows of one length, −1 filling them up"),
        (GOOD, (0.5, 1), TypeError, "i must hold integers, got float32"),
        (GOOD, ("a", 1), TypeError, "i must hold integers, got str"),
        (GOOD, (torch.zeros(2, 3).long(), 1), ValueError, r"must have R's leading axes \[\] or none, got \[2\]"),
    ],
)  # fmt: skip
def test_bad_input(R, arguments, error, message):
    if message is None:
        # one pair, two sets: as many tests
        assert ca.partial_correlation(R, *arguments).r.shape == (2,)
        return
    with pytest.raises(error, match=message):
        ca.partial_correlation(R, *arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_correlations_of_many_samples_are_symmetric_enough(dtype):
    X = torch.randn(40, 100_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    R = torch.corrcoef(X.roll(1, 0) + X).to(DEVICE)
    # as another product of the same samples might round
    R[0, 1] += 100 * torch.finfo(dtype).eps
    expected = ca.partial_correlation((R + R.mT) / 2, 0, 1, [2]).r
    assert torch.equal(ca.partial_correlation(R, 0, 1, [2]).r, expected)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"rows must have shape \[4, 'S'\], got \[5, 7\]"):
        ca.partial_correlation(GOOD, 0, 1, rows=torch.zeros(5, 7))
    with pytest.raises(TypeError, match="rows must be a floating point tensor, got int64"):
        ca.partial_correlation(GOOD, 0, 1, rows=torch.zeros(4, 7).long())
    with pytest.raises(ValueError, match=r"given must be \[m\], \[M, m\]"):
        ca.partial_correlation_given(GOOD, 3)
    with pytest.raises(ValueError, match="given must hold a token once"):
        ca.partial_correlation_given(GOOD, [1, 1])
    with pytest.raises(ValueError, match="given must lie in -1…3"):
        ca.partial_correlation_given(GOOD, [4])
    with pytest.raises(ValueError, match=r"n must be greater than order \+ 3 = 7, got 7"):
        ca.critical_correlation(7, 0.01, 4)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 1"):
        ca.critical_correlation(100, 1, 0)
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        ca.critical_correlation(100, 0.1, -1)
    with pytest.raises(ValueError, match=r"n must be greater than order \+ 3"):
        ca.fisher_z(torch.zeros(2), 5, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="got n = nan and order up to 0"):
        ca.fisher_z(torch.zeros(2), float("nan"))
    with pytest.raises(ValueError, match="order must be at least 0, got -2"):
        ca.fisher_z(torch.zeros(2), 50, torch.tensor([0, -2]))
    with pytest.raises(ValueError, match="r must lie in −1…1"):
        ca.fisher_z(torch.tensor([0.0, -1.5]), 50)
    with pytest.raises(TypeError, match="r must be float32 or float64, got int"):
        ca.fisher_z(1, 50)
    with pytest.raises(TypeError, match=r"r must be float32 or float64, got torch\.bfloat16"):
        ca.fisher_z(torch.zeros(2).bfloat16(), 50)


@pytest.mark.parametrize("backend", PATHS)
def test_nothing_to_test(backend):
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    r, status = ca.partial_correlation(GOOD.to(DEVICE), empty, empty, backend=backend)
    assert r.shape == status.shape == (0,)
    assert ca.partial_correlation(torch.empty(0, 4, 4, device=DEVICE), 0, 1, backend=backend).r.shape == (0,)
    assert ca.full_partial_correlation(torch.empty(0, 0)).r.shape == (0, 0)


def test_strided_matrices_and_rows():
    A = attention(16, S=21)
    R = tensor(correlation(A), torch.float32)
    wide = torch.full((32, 32), torch.nan, device=DEVICE)
    wide[::2, ::2] = R
    i, j, given = some_tests(16, 30, 3)
    for backend in PATHS:
        plain = ca.partial_correlation(R, i, j, given, rows=tensor(A, torch.float32), backend=backend)
        rows = tensor(A.T, torch.float32).T
        strided = ca.partial_correlation(wide[::2, ::2], i, j, given, rows=rows, backend=backend)
        assert torch.equal(plain.r, strided.r)


def test_the_bound_is_what_the_docstring_says():
    assert math.isclose(pivot_floor(torch.float64), 1.8e-12, rel_tol=0.02)
    assert math.isclose(pivot_floor(torch.float32), 9.8e-4, rel_tol=0.01)


def test_one_graph_serves_every_number_of_tests():
    R = tensor(correlation(attention(12)))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def both(R, i, j, given):
        r = ca.partial_correlation(R, i, j, given).r
        return r, ca.fisher_z(r, 100, 2).p

    compiled = torch.compile(both, backend=count, fullgraph=True)
    for N in (5, 9, 40):
        arguments = R, *some_tests(12, N, 2)
        torch.testing.assert_close(compiled(*arguments), both(*arguments), rtol=0, atol=0, equal_nan=True)
    assert len(graphs) <= 2


def test_a_level_is_one_graph():
    R = tensor(correlation(attention(12)))
    adjacency = ~torch.eye(12, dtype=torch.bool, device=DEVICE)
    found = torch.compile(lambda R, near: ca.level_tests(R, near, 1, cut=0.2), backend="eager", fullgraph=True)
    for ours, plain in zip(found(R, adjacency), ca.level_tests(R, adjacency, 1, cut=0.2), strict=True):
        assert torch.equal(ours.nan_to_num(9), plain.nan_to_num(9))

"""A sequence over 1 to 8 ranks gives what one device gives, in either order, uneven too; its traffic as predicted."""

import itertools

import pytest
import scaling
import torch
from processes import SIZES

import causalattn as ca

B, T, H, H_KV, D, V = 2, 61, 2, 1, 16, 8
ORDERS = ("contiguous", "zigzag")
WORLDS = pytest.mark.parametrize("world", SIZES)
CASES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"mask": ca.sliding_window(9, right=4)},
    "packed": {"mask": ca.causal() & ca.packed([0, 20, 20, 47, 61])},
    "padded": {"mask": ca.causal() & ca.padding([61, 33], side="left")},
    "softcap, sink": {"causal": True, "softcap": 5.0, "sink": torch.tensor([-torch.inf, 3.0])},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1]), "scale": 0.3},
    "sharp": {"causal": True, "scale": 30.0},
}


def spread(*axes):
    """Every combination; `make test` runs one diagonal, so that each value of each axis has its turn."""
    axes = [[*axis] for axis in axes]
    turns = {tuple(axis[n % len(axis)] for axis in axes) for n in range(max(map(len, axes)))}
    return [
        pytest.param(*values, marks=() if values in turns else pytest.mark.full) for values in itertools.product(*axes)
    ]


def inputs(dtype=torch.float64, tokens=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, tokens, D), (B, H_KV, tokens, D), (B, H_KV, tokens, V))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def positions(world, order, tokens=T, lengths=None):
    """Which tokens each rank holds."""
    if lengths is not None:
        edges = [0, *itertools.accumulate(lengths)]
        return [torch.arange(a, b) for a, b in itertools.pairwise(edges)]
    if order == "contiguous":
        return list(torch.arange(tokens).tensor_split(world))
    runs = torch.arange(tokens).tensor_split(2 * world)
    return [torch.cat([runs[r], runs[-1 - r]]) for r in range(world)]


def whole(parts, held, dim=2):
    """Local results in the order of the tokens."""
    places = torch.cat(held)
    assert places.sort().values.equal(torch.arange(len(places)))
    return torch.cat(parts, dim).index_select(dim, places.argsort())


def check(result, alone, exact):
    """No further from the float64 result than twice what one device is, and one rounding of the largest value.

    In float64 the one device is the measure, and scores of some hundreds are rounded in tiles of other shapes.
    """
    finite = exact.isfinite()
    assert result.dtype == alone.dtype and result.shape == exact.shape
    assert result[~finite].double().equal(exact[~finite])
    error, expected = ((x.double() - exact)[finite].abs() for x in (result, alone))
    assert not error.isnan().any()
    scale = exact[finite].abs().amax() if finite.any() else 0.0
    band = scale * (1e-12 if alone.dtype == torch.float64 else torch.finfo(alone.dtype).eps)
    assert error.amax() <= 2 * expected.amax() + band


@pytest.mark.parametrize(("world", "order", "case"), spread(SIZES, ORDERS, CASES))
def test_attention(ranks, world, order, case):
    options = CASES[case]
    exact = ca.attention(*inputs(), **options)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = inputs(dtype)
        answers = [result for result, _ in ranks.run(world, "operator", "attention", (q, k, v), order=order, **options)]
        alone = ca.attention(q, k, v, **options)
        exact = ca.attention(*(x.double() for x in (q, k, v)), **options)
        for name in ("out", "lse"):
            parts = [getattr(answer, name) for answer in answers]
            check(whole(parts, positions(world, order)), getattr(alone, name), getattr(exact, name))
        assert {answer.probs for answer in answers} == {None}


@pytest.mark.parametrize(("world", "order", "case"), spread(SIZES, ORDERS, CASES))
def test_statistics(ranks, world, order, case):
    options = CASES[case] | {"columns": ("sink", 3, -1)}
    want = set(ca.AttentionStats._fields) - ({"asymmetry"} if case == "slopes" else set())
    held = positions(world, order)
    for dtype in (torch.float64, torch.float32):
        q, k, _ = inputs(dtype)
        given = {"order": order, "want": want, **options}
        answers = [result for result, _ in ranks.run(world, "operator", "attention_stats", (q, k), **given)]
        alone = ca.attention_stats(q, k, want=want, **options)
        exact = ca.attention_stats(q.double(), k.double(), want=want, **options)
        for name in want - {"asymmetry", "dag_score"}:
            check(whole([getattr(x, name) for x in answers], held), getattr(alone, name), getattr(exact, name))
        heads = [[x.dag_score, *(x.asymmetry[:4] if x.asymmetry else ())] for x in answers]
        expected = ([x.dag_score, *(x.asymmetry[:4] if x.asymmetry else ())] for x in (alone, exact))
        for *numbers, one, true in zip(*heads, *expected, strict=True):
            # every rank has the same bits
            assert all(x.equal(numbers[0]) for x in numbers)
            check(numbers[0], one, true)


SOME = ("full", "padded", "softcap, sink", "slopes", "sharp")


@pytest.mark.parametrize(("world", "order", "case", "n"), spread(SIZES, ORDERS, SOME, (1, 7, 70)))
def test_topk(ranks, world, order, case, n):
    options = CASES[case]
    q, k, _ = inputs()
    answers = [
        result for result, _ in ranks.run(world, "operator", "attention_topk", (q, k), n=n, order=order, **options)
    ]
    alone = ca.attention_topk(q, k, n, **options)
    held = positions(world, order)
    check(whole([x.values for x in answers], held), alone.values, alone.values)
    assert whole([x.indices for x in answers], held).equal(alone.indices)


def test_topk_of_equal_scores_is_by_key(ranks):
    q = torch.zeros(1, 1, 24, 4)
    for order in ORDERS:
        answers = ranks.run(3, "operator", "attention_topk", (q, q), n=5, order=order)
        indices = whole([result.indices for result, _ in answers], positions(3, order, 24))
        assert indices.equal(torch.arange(5, dtype=torch.int32).expand(1, 1, 24, 5))


def test_topk_goes_on_where_probabilities_come_to_nothing(ranks):
    q = torch.ones(1, 1, 8, 1)
    k = torch.tensor([0.0, -50, -120, -110, -200, -150, -300, -130]).view(1, 1, 8, 1)
    for world, order in ((1, "contiguous"), (2, "contiguous"), (3, "zigzag")):
        answers = [x for x, _ in ranks.run(world, "operator", "attention_topk", (q, k), n=9, order=order, scale=1.0)]
        indices = whole([x.indices for x in answers], positions(world, order, 8))
        assert indices.equal(torch.tensor([0, 1, 3, 2, 7, 5, 4, 6, -1], dtype=torch.int32).expand(1, 1, 8, 9))


EFFECTS = {
    "cut": {"kind": "cut"},
    "soft": {"kind": "soft", "strength": 1.5},
    "hard": {"kind": "hard", "measure": "kl"},
    "readout": {"measure": "readout"},
}


@pytest.mark.parametrize(("world", "kind", "case"), spread(SIZES, EFFECTS, ("padded", "softcap, sink", "sharp")))
def test_edge_effects(ranks, world, kind, case):
    options = CASES[case] | EFFECTS[kind] | {"n": 5}
    order = "zigzag" if world % 2 else "contiguous"
    held = positions(world, order)
    for dtype in (torch.float64, torch.float32):
        q, k, v = inputs(dtype)
        if kind == "readout":
            options["readout"] = torch.randn(B, H, T, V, generator=torch.Generator().manual_seed(1)).to(dtype)
        given = {"sharded": ("readout",) if kind == "readout" else (), "order": order, **options}
        answers = [result for result, _ in ranks.run(world, "operator", "edge_effects", (q, k, v), **given)]
        alone = ca.edge_effects(q, k, v, **options)
        wide = {name: x.double() if name == "readout" else x for name, x in options.items()}
        exact = ca.edge_effects(*(x.double() for x in (q, k, v)), **wide)
        for name in ("row", "column"):
            check(whole([getattr(x, name) for x in answers], held), getattr(alone, name), getattr(exact, name))
        values = whole([x.topk.values for x in answers], held)
        check(values.abs(), alone.topk.values.abs(), exact.topk.values.abs())
        if dtype == torch.float64:
            assert whole([x.topk.indices for x in answers], held).equal(exact.topk.indices)


CORRELATIONS = ("attention_correlation", "attention_covariance")


@pytest.mark.parametrize(
    ("world", "order", "case", "name", "sum_heads"), spread(SIZES, ORDERS, SOME, CORRELATIONS, (False, True))
)
def test_correlations(ranks, world, order, case, name, sum_heads):
    q, k, _ = inputs(torch.float32)
    options = CASES[case] | {"sum_heads": sum_heads}
    answers = [result for result, _ in ranks.run(world, "operator", name, (q, k), order=order, **options)]
    alone = getattr(ca, name)(q, k, **options)
    found = whole(answers, positions(world, order), -2)
    # P is float32 on one device and on many, formed from tiles of other shapes
    assert (found - alone).abs().amax() <= 4e-6 * alone.abs().amax()
    if name == "attention_correlation":
        assert found.diagonal(dim1=-2, dim2=-1).equal(alone.diagonal(dim1=-2, dim2=-1))
    exact = getattr(ca, name)(q.double(), k.double(), **options)
    doubled = ranks.run(world, "operator", name, (q.double(), k.double()), order=order, **options)
    found = whole([result for result, _ in doubled], positions(world, order), -2)
    assert (found - exact).abs().amax() <= 1e-12 * exact.abs().amax()


DECAYS = {"none": None, "head": (H,), "step": (B, H, T), "feature": (B, H, T, D)}


@pytest.mark.parametrize(("world", "decay", "normalize"), spread(SIZES, DECAYS, (True, False)))
def test_linear_attention(ranks, world, decay, normalize):
    shape = DECAYS[decay]
    state = ca.LinearState(torch.rand(B, H, D, V, dtype=torch.float64), torch.rand(B, H, D, dtype=torch.float64))
    held = positions(world, "contiguous")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = inputs(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        options = {"normalize": normalize, "initial_state": ca.LinearState(*(x.to(wide) for x in state))}
        if shape is not None:
            options["decay"] = -torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(wide)
        given = {"sharded": ("decay",) if decay in ("step", "feature") else (), **options}
        answers = [result for result, _ in ranks.run(world, "operator", "linear_attention", (q, k, v), **given)]
        alone = ca.linear_attention(q, k, v, **options)
        doubled = {
            "normalize": normalize,
            "initial_state": ca.LinearState(*(x.double() for x in options["initial_state"])),
        }
        doubled |= {"decay": options["decay"].double()} if shape is not None else {}
        exact = ca.linear_attention(*(x.double() for x in (q, k, v)), **doubled)
        check(whole([x.out for x in answers], held), alone.out, exact.out)
        for field in ("s", "z"):
            states = [getattr(x.state, field) for x in answers]
            assert all(x.equal(states[0]) for x in states)
            check(states[0], getattr(alone.state, field), getattr(exact.state, field))


@WORLDS
def test_linear_attention_that_is_not_causal(ranks, world):
    q, k, v = inputs()
    answers = [
        x for x, _ in ranks.run(world, "operator", "linear_attention", (q, k, v), causal=False, feature_map="exp")
    ]
    exact = ca.linear_attention(q, k, v, causal=False, feature_map="exp")
    check(whole([x.out for x in answers], positions(world, "contiguous")), exact.out, exact.out)
    check(answers[0].state.s, exact.state.s, exact.state.s)


@pytest.mark.parametrize(("world", "discretization", "uneven"), spread(SIZES, ("zoh", "euler"), (False, True)))
def test_selective_scan(ranks, world, discretization, uneven):
    generator = torch.Generator().manual_seed(3)
    u, delta, z = (torch.rand(2, T, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    A = -torch.rand(6, 4, generator=generator, dtype=torch.float64)
    B, C = (torch.randn(2, T, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    skip, state = torch.rand(6, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    lengths = [T, *[0] * (world - 1)] if uneven else None
    options = {"initial_state": state, "discretization": discretization}
    answers = ranks.run(world, "scan", u, delta, A, B, C, skip, z, lengths=lengths, **options)
    exact = ca.selective_scan(u, delta, A, B, C, skip, z, **options)
    held = positions(world, "contiguous", lengths=lengths)
    check(whole([x.out for x in answers], held, 1), exact.out, exact.out)
    assert all(x.state.equal(answers[0].state) for x in answers)
    check(answers[0].state, exact.state, exact.state)


UNEVEN = {2: [60, 1], 3: [0, 40, 21], 4: [1, 0, 59, 1], 8: [0, 7, 0, 0, 30, 1, 0, 23]}


@pytest.mark.parametrize("world", UNEVEN)
@pytest.mark.parametrize(
    "name", ["attention", "attention_stats", "edge_effects", "linear_attention", "attention_correlation"]
)
def test_uneven_shards(ranks, world, name):
    tensors = inputs()[: 2 if name in ("attention_stats", "attention_correlation") else 3]
    options = {"want": "all"} if name == "attention_stats" else {}
    lengths = UNEVEN[world]
    answers = [x for x, _ in ranks.run(world, "operator", name, tensors, lengths=lengths, **options)]
    exact = getattr(ca, name)(*tensors, **options)
    field = {"attention": "out", "attention_stats": "received", "edge_effects": "column", "linear_attention": "out"}
    found, true = ([getattr(x, field[name]) if name in field else x for x in results] for results in (answers, [exact]))
    check(whole(found, positions(world, None, lengths=lengths)), true[0], true[0])
    if name == "attention_stats":
        check(answers[-1].asymmetry.frobenius, exact.asymmetry.frobenius, exact.asymmetry.frobenius)


def test_a_nan_reaches_only_rows_that_may_attend_it(ranks):
    q, k, v = inputs()
    k[0, 0, 40] = torch.nan
    answers = [x for x, _ in ranks.run(4, "operator", "attention", (q, k, v), causal=True)]
    out = whole([x.out for x in answers], positions(4, "contiguous"))
    assert out[0, :, 40:].isnan().all()
    assert not out[0, :, :40].isnan().any() and not out[1].isnan().any()
    given = {"n": 3, "causal": True}
    answers = [x for x, _ in ranks.run(4, "operator", "attention_topk", (q, k), **given)]
    values = whole([x.values for x in answers], positions(4, "contiguous"))
    assert values.isnan().equal(ca.attention_topk(q, k, **given).values.isnan())
    given = {"want": "columns", "columns": [2, 50], "causal": True}
    answers = [x for x, _ in ranks.run(4, "operator", "attention_stats", (q, k), **given)]
    columns = whole([x.columns for x in answers], positions(4, "contiguous"))
    # what a row may not attend is 0, whatever else it holds
    assert columns[0, :, 40:, 0].isnan().all() and columns[0, :, 40:50, 1].eq(0).all()


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_shards_come_together_again(ranks, dim, order):
    x = torch.arange(66).view(22, 3) if dim == 0 else torch.arange(66).view(3, 22)
    answers = ranks.run(4, "round_trip", x, order, dim)
    for (own, again), held in zip(answers, positions(4, order, 22), strict=True):
        assert again.equal(x) and own.equal(x.index_select(dim, held))


VOLUMES = {
    "attention": ("attention", {}),
    "row statistics": ("attention_stats", {"want": "entropy"}),
    "dag_score": ("attention_stats", {"want": "dag_score"}),
    "received": ("attention_stats", {"want": "received"}),
    "asymmetry": ("attention_stats", {"want": "asymmetry"}),
    "top-k": ("attention_topk", {"n": 4}),
    "edge effects": ("edge_effects", {}),
    "covariances": ("attention_covariance", {}),
    "correlations": ("attention_correlation", {}),
    "linear attention": ("linear_attention", {}),
    "linear attention, a decay a feature": (
        "linear_attention",
        {"decay": -torch.ones(B, H, 48, D), "sharded": ["decay"]},
    ),
}


@pytest.mark.parametrize(("world", "dtype"), spread(SIZES, (torch.float32, torch.bfloat16, torch.float64)))
def test_bytes_are_those_of_the_formulas(ranks, world, dtype):
    tokens = 48
    tensors = inputs(dtype, tokens)
    size = scaling.Size(tokens, world, H, H_KV, D, V, dtype.itemsize, B)
    for operator, (name, options) in VOLUMES.items():
        given = tensors if name in ("attention", "edge_effects", "linear_attention") else tensors[:2]
        for _, sent in ranks.run(world, "operator", name, given, **options):
            assert sent.ring == scaling.ring_bytes(operator, size), operator
            assert sent.gathered == scaling.gathered_bytes(operator, size), operator
    u, A, C = torch.ones(B, tokens, 6), -torch.ones(6, 4), torch.ones(B, tokens, 4)
    size = size._replace(D=6, V=4)
    for _, sent in ranks.run(world, "scan", u, u, A, C, C, None, u, counted=True):
        assert sent.ring == 0 and sent.gathered == scaling.gathered_bytes("selective scan", size)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_holds_what_the_formula_says(ranks, world):
    tokens = 2**17
    size = scaling.Size(tokens, world, 1, 1, 16, 16, 4)
    found = ranks.run(world, "peak", tokens, 16)
    for peak in found:
        # beside tiles and what the allocator keeps
        assert peak <= scaling.held_bytes(size) + 24 * 2**20
    # eager's matrix, or that of one rank's rows, would be GiB
    assert max(found) < 2**27


@pytest.mark.parametrize("name", ["attention", "attention_stats"])
def test_kernels_give_the_same(ranks, name):
    q, k, v = inputs(torch.float32, 40)
    tensors = (q, k, v) if name == "attention" else (q, k)
    options = {"causal": True, "backend": "triton"}
    field = "out" if name == "attention" else "entropy"
    answers = [getattr(x, field) for x, _ in ranks.run(2, "operator", name, tensors, order="zigzag", **options)]
    alone = getattr(getattr(ca, name)(*tensors, **options), field)
    exact = getattr(getattr(ca, name)(*(x.double() for x in tensors), causal=True), field)
    check(whole(answers, positions(2, "zigzag", 40)), alone, exact)

"""The statistics of a matrix at hand against the float64 specification, and against those from q and k."""

import itertools

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, MASKS, PATHS, SEEDS, assert_within_reference_error, make_mask, to_numpy
from hypothesis import given
from hypothesis import strategies as st

import causalattn.masks as masks
from causalattn import dense
from causalattn.dense import offsets, pairs, rows
from causalattn.reference import dense as reference
from causalattn.reference.nulls import weights
from causalattn.statistics import AttentionStats
from causalattn.statistics import rows as row_tiles

LEADS = st.sampled_from([(), (2,), (2, 3), (1, 2), (0, 2)])
SIZES = st.sampled_from([1, 2, 7, 33, 63, 130])
LAYOUTS = st.sampled_from(["rows first", "columns first", "every other", "in a wider matrix", "heads last"])
RECTANGULAR = tuple(name for name in AttentionStats._fields if name not in ("lse", "net_flow", "asymmetry"))


def make_probs(lead, T, S, seed=0, dtype=torch.float32, seen=None):
    """Rows that sum to one over seen [B or 1, T, S], stored keys first, with some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, S, T, generator=generator, dtype=torch.float64).mT * 3
    x = x.masked_fill(x < -5, -torch.inf)
    if seen is not None:
        x = x.masked_fill(~(seen[:, None] if x.ndim == 4 else seen).cpu(), -torch.inf)
    return x.softmax(-1).nan_to_num(0).to(DEVICE, dtype)


def close(ours, expected, dtype):
    """One rounding of the result, which is summed in float64."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if dtype == torch.float64:
        eps *= 64  # sums of S float64 terms on both sides
    expected = np.asarray(expected).reshape(ours.shape)
    return np.abs(to_numpy(ours) - expected).max(initial=0) <= eps * np.abs(expected).max(initial=0)


def four(A):
    return to_numpy(A)[(None,) * (4 - A.ndim)]


def laid_out(A, layout):
    """The same numbers in other strides."""
    if layout == "columns first":
        return A.mT.contiguous().mT
    if layout == "every other":
        wide = torch.full((*A.shape[:-1], 2 * A.shape[-1]), torch.nan, dtype=A.dtype, device=A.device)
        wide[..., ::2] = A
        return wide[..., ::2]
    if layout == "in a wider matrix":
        wide = torch.full((*A.shape[:-2], A.shape[-2] + 3, A.shape[-1] + 5), torch.nan, dtype=A.dtype, device=A.device)
        wide[..., 1:-2, 2:-3] = A
        return wide[..., 1:-2, 2:-3]
    if layout == "heads last":
        return A.movedim(0, -1).contiguous().movedim(-1, 0)
    return A


def plain_dense(A, columns=()):
    """Eager torch on A in its accumulation dtype."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    T, S = A.shape[-2:]
    j = torch.arange(S, device=A.device)
    p = torch.arange(T, device=A.device)[:, None] + S - T
    chosen = [0 if column == "sink" else column for column in columns]
    plain = {
        "max": A.amax(-1) if S else A.sum(-1),
        "mass": A.sum(-1),
        "entropy": torch.special.entr(A).sum(-1),
        "sum_sq": A.square().sum(-1),
        "below": (A * (j < p)).sum(-1),
        "diag": (A * (j == p)).sum(-1),
        "distance": (A * (p - j).abs()).sum(-1),
        "columns": A[..., chosen],
        "received": A.sum(-2),
        "received_mean": A.mean(-2) if T else A.sum(-2),
        "dag_score": ((A * (j < p)).sum((-2, -1)) / A.sum((-2, -1))).nan_to_num(0),
    }
    if T == S:
        d, total = (A - A.mT).flatten(-2), (A + A.mT).flatten(-2)
        plain["net_flow"] = A.sum(-1) - A.sum(-2)
        ratio = (d.norm(dim=-1) / total.norm(dim=-1)).nan_to_num(0)
        largest = d.abs().amax(-1) if T else d.sum(-1)
        plain["asymmetry"] = dense.Asymmetry(d.norm(dim=-1), ratio, d.abs().sum(-1), largest, plain["net_flow"])
    return plain


def check(stats, A, columns=("sink", -1)):
    """Every statistic that stats holds within twice the error of eager torch."""
    expected = reference.matrix_stats(four(A), columns=columns)
    plain = plain_dense(A, columns)
    for name, value in stats._asdict().items():
        if value is None:
            continue
        parts = [(value, plain[name], expected[name])]
        if name == "asymmetry":
            parts = [(getattr(value, x), getattr(plain[name], x), expected[name][x]) for x in value._fields]
        for ours, theirs, exact in parts:
            assert ours.dtype == torch.promote_types(A.dtype, torch.float32)
            # sums of S float64 terms on both sides
            roundings = 64 if A.dtype == torch.float64 else 1
            assert_within_reference_error(
                ours, theirs, np.asarray(exact).reshape(theirs.shape), axis=None, roundings=roundings
            )


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(lead=LEADS, T=SIZES, S=st.none() | SIZES, layout=LAYOUTS, seed=SEEDS)
def test_every_statistic(backend, dtype, lead, T, S, layout, seed):
    backend = "auto" if dtype == torch.float64 else backend
    S = T if S is None else S
    A = laid_out(make_probs(lead, T, S, seed, dtype), layout)
    want = set(AttentionStats._fields) - ({"net_flow", "asymmetry"} if T != S else set())
    stats = dense.attention_stats(A, want=want, columns=("sink", -1), backend=backend)
    assert stats.lse is None
    check(stats, A)
    check(AttentionStats(dag_score=dense.dag_score(A, backend=backend)), A)
    if T == S:
        check(AttentionStats(asymmetry=dense.asymmetry(A, backend=backend)), A)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("T", [65, 130, 200])
def test_an_odd_and_an_even_number_of_tiles(backend, T):
    A = make_probs((2, 2), T, T)
    check(dense.attention_stats(A, want="all", columns=("sink", -1), backend=backend), A)
    check(AttentionStats(dag_score=dense.dag_score(A, backend=backend)), A)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("dtype", "T", "S"), [(torch.float32, 1100, 600), (torch.bfloat16, 600, 2500)], ids=str)
def test_more_than_one_tile(backend, dtype, T, S):
    A = make_probs((2,), T, S, dtype=dtype)
    check(dense.attention_stats(A, want=RECTANGULAR, columns=("sink", -1), backend=backend), A)
    square = A[:, : min(T, S), : min(T, S)]
    check(dense.attention_stats(square, want="all", columns=("sink", -1), backend=backend), square)
    check(AttentionStats(dag_score=dense.dag_score(square, backend=backend)), square)


# which passes run for what is wanted
PASSES = {
    ("dag_score",): ("", "mass below"),
    ("asymmetry",): ("", "sum_sq difference_sq l1 max net_flow"),
    ("asymmetry", "dag_score"): ("", "mass below sum_sq difference_sq l1 max net_flow"),
    ("net_flow", "diag"): ("", "net_flow"),
    ("entropy", "dag_score"): ("mass entropy below", ""),
    ("max", "net_flow"): ("max mass received", ""),
    ("received_mean",): ("mass received", ""),
    ("max", "asymmetry", "net_flow"): ("max", "sum_sq difference_sq l1 max net_flow"),
    ("columns", "diag"): ("", ""),
}


@pytest.mark.parametrize(("want", "passes"), PASSES.items())
def test_each_element_is_read_once_a_pass(want, passes, monkeypatch):
    ran = {"dense_rows": "", "dense_pairs": ""}
    for name in ran:
        op = getattr(dense, name)

        def counted(*args, name=name, op=op):
            assert not ran[name]
            ran[name] = args[-2]
            return op(*args)

        monkeypatch.setattr(dense, name, counted)
    A = make_probs((2,), 9, 9)
    stats = dense.attention_stats(A, want=want, columns=("sink", -1))
    assert tuple(ran.values()) == passes
    assert {name for name, value in stats._asdict().items() if value is not None} == set(want)
    check(stats, A)


@pytest.mark.parametrize("backend", PATHS)
def test_queries_that_sit_elsewhere_go_by_rows(backend):
    A = make_probs((2,), 9, 9)
    shifted = masks.full().resolve(9, 9, offset=3, device=DEVICE)
    expected = A.double().tril(2).sum((-2, -1)) / A.double().sum((-2, -1))
    ours = dense.attention_stats(A, want="dag_score", mask=shifted, backend=backend).dag_score
    assert (ours - expected).abs().max() < 1e-7


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_batch_nor_padding_nor_the_run(backend, dtype):
    A = make_probs((3, 2), 130, 130, dtype=dtype)
    A[:, :, 101:], A[:, :, :, 101:] = 0, 0
    whole, again = (dense.attention_stats(A, want="all", backend=backend) for _ in range(2))
    alone = dense.attention_stats(A[1:2, :, :101, :101], want="all", backend=backend)
    for name in RECTANGULAR:
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
        part = getattr(whole, name)[1:2]
        # a mean over rows is one over the padding too
        if name != "received_mean":
            assert torch.equal(part if part.ndim == 2 else part[:, :, :101], getattr(alone, name)), name
    for name in ("frobenius", "ratio", "l1", "max", "net_flow"):
        part = getattr(whole.asymmetry, name)[1:2]
        assert torch.equal(part if part.ndim == 2 else part[:, :, :101], getattr(alone.asymmetry, name)), name
    scores = [dense.dag_score(x, backend=backend) for x in (A, A, A[1:2, :, :101, :101])]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0][1:2], scores[2])


@pytest.mark.parametrize("backend", PATHS)
def test_offsets_past_two_to_the_31(backend):
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    small = make_probs((1,), 3, 3, dtype=torch.float16)
    for strides in ((0, stride, 1), (0, 1, stride)):
        A = storage.as_strided((1, 3, 3), strides)
        A.copy_(small)
        ours, theirs = (dense.attention_stats(x, want="all", backend=backend) for x in (A, small))
        for name in RECTANGULAR:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert all(map(torch.equal, ours.asymmetry, theirs.asymmetry))
    heads = storage.as_strided((3, 3, 3), (stride, 3, 1))
    heads.copy_(small.expand(3, 3, 3))
    assert torch.equal(dense.dag_score(heads, backend=backend)[2:], dense.dag_score(small, backend=backend))
    rows = dense.attention_stats(heads, want="mass", backend=backend).mass
    assert torch.equal(rows[2:], dense.attention_stats(small, want="mass", backend=backend).mass)


@pytest.mark.parametrize("backend", PATHS)
def test_operator_contracts(backend):
    A = make_probs((2, 2), 9, 9).requires_grad_()
    torch.library.opcheck(dense.dense_rows, (A, 0, " ".join(rows.ROWS), backend))
    torch.library.opcheck(dense.dense_rows, (A[..., :5], -4, "max entropy", backend))
    torch.library.opcheck(dense.dense_pairs, (A, " ".join(pairs.PAIRS), backend))
    torch.library.opcheck(dense.dense_pairs, (A, "mass below", backend))


@pytest.mark.parametrize("backend", PATHS)
def test_compiles_once_for_every_length(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def both(A):
        stats = dense.attention_stats(A, columns=("sink", -1), backend=backend)
        return stats.entropy, stats.columns, dense.dag_score(A, backend=backend), dense.asymmetry(A, backend=backend).l1

    compiled = torch.compile(both, backend=count, fullgraph=True)
    for T in range(10, 50, 8):
        A = make_probs((1, 2), T, T)
        assert all(map(torch.equal, compiled(A), both(A)))
    assert len(graphs) <= 2


@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_mask_gives_the_sink_and_the_mean(name, T, S, seed):
    intervals = make_mask(name, 3, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((3, 2), T, S, seed, torch.float64, seen)
    stats = dense.attention_stats(A, want=("columns", "received_mean"), mask=intervals)
    expected = reference.matrix_stats(four(A), to_numpy(seen), first=to_numpy(intervals.first))
    assert close(stats.columns, expected["columns"], A.dtype)
    assert close(stats.received_mean, expected["received_mean"], A.dtype)


@given(T=SIZES, seed=SEEDS)
def test_seed_definitions(T, seed):
    A = make_probs((2, 3), T, T, seed, torch.float64)
    assert close(dense.dag_score(A), reference.dag_score(to_numpy(A)), A.dtype)
    difference = dense.asymmetry_matrix(A)
    assert np.array_equal(to_numpy(difference), to_numpy(A - A.mT)) and torch.equal(difference, -difference.mT)
    assert close(dense.asymmetry(A).l1, np.abs(reference.asymmetry_matrix(to_numpy(A))).sum((-2, -1)), A.dtype)


@given(T=SIZES, seed=SEEDS)
def test_transpose_turns_the_flow_round(T, seed):
    A = make_probs((2,), T, T, seed, torch.float64)
    ours, turned = dense.asymmetry(A), dense.asymmetry(A.mT)
    assert torch.allclose(ours.net_flow, -turned.net_flow, rtol=0, atol=1e-14)
    assert torch.equal(ours.frobenius, turned.frobenius) and torch.equal(ours.max, turned.max)
    symmetric = dense.asymmetry(A + A.mT)
    assert not symmetric.frobenius.any() and not symmetric.ratio.any()


@pytest.mark.parametrize("backend", PATHS)
@given(T=SIZES, seed=SEEDS)
def test_triangles_score_one_and_zero(backend, T, seed):
    A = make_probs((2,), T, T, seed)
    assert (dense.dag_score(A.triu(), backend=backend) == 0).all()
    assert (dense.dag_score(A.tril(-1), backend=backend) == (A.tril(-1).sum((-2, -1)) > 0)).all()


@pytest.mark.parametrize("statistic", ["dag_score", "distance", "column"])
@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_permutation_null(statistic, name, T, S, seed):
    intervals = make_mask(name, 2, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((2, 3), T, S, seed, torch.float64, seen=seen)
    null = dense.permutation_null(A, statistic=statistic, mask=intervals)
    w = weights(statistic, T, S, offset=intervals.offset, column=to_numpy(intervals.first))
    expected = reference.permutation_null(to_numpy(A), w, to_numpy(seen), statistic)
    for part in ("value", "mean"):
        assert close(getattr(null, part), expected[part], torch.float64)
    # the variance of a row is a difference that cancels where its weights are nearly equal
    assert np.allclose(to_numpy(null.std), expected["std"], rtol=1e-7, atol=1e-7 * np.abs(expected["value"]).max())
    alone = dense.permutation_null(A[0, 1], statistic=statistic, mask=masks.intervals(*(x[0] for x in intervals[:3])))
    assert torch.equal(alone.value, null.value[0, 1]) and alone.z.shape == ()


@given(name=st.sampled_from(sorted(MASKS)), T=SIZES, S=SIZES, seed=SEEDS)
def test_offset_null(name, T, S, seed):
    intervals = make_mask(name, 2, S).resolve(T, S, device=DEVICE)
    seen = intervals.to_dense(S)
    A = make_probs((2, 3), T, S, seed, seen=seen)
    null = dense.offset_null(A, mask=intervals)
    allowed = np.broadcast_to(to_numpy(seen), (2, T, S))
    for b, h in np.ndindex(2, 3):
        assert close(null[b, h], reference.offset_null(to_numpy(A[b, h]), allowed[b]), A.dtype)
    # it keeps what depends on the offset alone
    both = (dense.attention_stats(x.double(), want=("dag_score", "distance")) for x in (A, null))
    for ours, theirs in zip(*both, strict=True):
        if ours is not None:
            ours, theirs = (x if x.ndim == 2 else x.sum(-1) for x in (ours, theirs))
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@given(T=SIZES, S=SIZES, seed=SEEDS)
def test_blocks_change_nothing(T, S, seed):
    A = make_probs((2,), T, S, seed, torch.float64)
    square = {"want": "all"} if T == S else {}

    def run():
        return dense.attention_stats(A, **square), dense.offset_null(A), dense.permutation_null(A)

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offsets, "BLOCK_SIZE", 3 * S)
        for module in (rows, pairs, row_tiles):
            patch.setattr(module, "BLOCK", 4)
        parts = run()
    assert torch.allclose(whole[1], parts[1], rtol=0, atol=1e-14)
    for a, b in zip([*whole[0], *whole[2]], [*parts[0], *parts[2]], strict=True):
        for x, y in zip(*((z,) if isinstance(z, torch.Tensor) else z or () for z in (a, b)), strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_nothing_at_all():
    for shape, backend in itertools.product([(0, 0), (0, 4), (4, 0), (2, 0, 3, 3)], PATHS):
        A = torch.zeros(shape, device=DEVICE)
        want = ("max", "mass", "received", "columns", "dag_score")
        stats = dense.attention_stats(A, columns=(), want=want, backend=backend)
        assert stats.mass.shape == stats.max.shape == shape[:-1] and stats.received.shape == shape[:-2] + shape[-1:]
        assert not stats.received.any() and not stats.dag_score.any()
        assert not dense.dag_score(A, backend=backend).any()
        if shape[-2] == shape[-1]:
            assert not any(x.any() for x in dense.asymmetry(A, backend=backend))
        assert dense.offset_null(A).shape == shape
        assert not dense.permutation_null(A, backend=backend).z.any()


def test_bad_input_is_named():
    A = torch.full((4, 5), 0.2)
    with pytest.raises(TypeError, match=r"A must be a torch.Tensor, got ndarray"):
        dense.attention_stats(A.numpy())
    with pytest.raises(TypeError, match="A must be float16, bfloat16, float32 or float64, got int64"):
        dense.dag_score(A.long())
    with pytest.raises(ValueError, match=r"A must have shape \[T, S\], .* got \[5\]"):
        dense.dag_score(A[0])
    with pytest.raises(ValueError, match=r"got \[1, 1, 1, 4, 5\]"):
        dense.offset_null(A[None, None, None])
    for name in ("asymmetry", "asymmetry_matrix"):
        with pytest.raises(ValueError, match="needs as many queries as keys, got T = 4 and S = 5"):
            getattr(dense, name)(A)
    with pytest.raises(ValueError, match="want must be 'all' or names among"):
        dense.attention_stats(A, want="pagerank")
    with pytest.raises(ValueError, match="columns must hold 'sink' or positions from -5 to 4, got 5"):
        dense.attention_stats(A, columns=(5,))
    with pytest.raises(ValueError, match="statistic must be one of dag_score, distance, column, got 'max'"):
        dense.permutation_null(A, statistic="max")
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton' or 'torch', got 'cuda'"):
        dense.dag_score(A, backend="cuda")
    with pytest.raises(TypeError, match="takes float16, bfloat16 or float32, got float64"):
        dense.asymmetry(A[:, :4].double(), backend="triton")
    with pytest.raises(TypeError, match="mask must be a causalattn Mask or Intervals, got str"):
        dense.permutation_null(A, mask="causal")

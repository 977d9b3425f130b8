"""Edges that take their probability from another run: against rows put together by hand in float64."""

import math

import pytest
import torch
import transformers
from helpers import DEVICE, PATHS, make_qkv
from tiny_models import exact, text_inputs

import causalattn as ca
from causalattn import Do, Plan
from causalattn.integrations.transformers import use
from causalattn.reference import interventions as reference

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def by_hand(A, row, keys, c):
    """A with row's keys at c, [..., n], the others in proportion."""
    A, keys = A.clone(), torch.tensor(keys, device=A.device)
    others = torch.ones(A.shape[-1], dtype=torch.bool, device=A.device).index_fill(0, keys, False)
    scale = (1 - c.sum(-1)) / (1 - A[..., row, keys].sum(-1))
    A[..., row, others] *= scale[..., None]
    A[..., row, keys] = c
    return A


def two_maps(**options):
    """q, k, v in float64, their map A and that of another query."""
    q, k, v = make_qkv(2, 4, 2, 9, 9, 16, V=24, dtype=torch.float64, seed=5)
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(7), dtype=q.dtype).to(q.device)
    maps = (ca.attention(x, k, v, return_probs=True, **options).probs for x in (q, other))
    return q, k, v, *maps


def test_rows_and_columns_of_another_map():
    q, k, v, A, clean = two_maps(causal=True)
    c = ca.attention_rows(q, k, [7, 5], causal=True) * 0 + clean[:, :, [7, 5]]
    plan = Do.patch_edges(c[..., [4, 1]], [7, 5], [4, 1])
    expected = by_hand(by_hand(A, 7, [4, 1], clean[:, :, 7, [4, 1]]), 5, [4, 1], clean[:, :, 5, [4, 1]])
    for same in (
        plan,
        Do.patch_edges(c[..., [1, -5]], [-2, 5], [1, -5]),
        Do.patch_edges(c[..., [4]], [7, 5], 4) + Do.patch_edges(c[..., [1]], [7, 5], 1),
        Do.patch_edges(clean[:, :, [7, 5, 7, 5], [4, 4, 1, 1]], edges=[(7, 4), (-4, 4), (7, 1), (5, 1)]),
    ):
        result = ca.attention(q, k, v, causal=True, do=same, return_probs=True)
        torch.testing.assert_close(result.probs, expected, **CLOSE)
        torch.testing.assert_close(result.out, expected @ v.repeat_interleave(2, 1), **CLOSE)
        rows = ca.attention_rows(q, k, [5, 0, 7, 5], causal=True, do=same)
        torch.testing.assert_close(rows, expected[:, :, [5, 0, 7, 5]], **CLOSE)
    # it is a soft do of log(c/p) − log((1 − Σ c)/(1 − Σ p)), and lse is what that makes of it
    A5, c5 = A[0, 0, 5, [4, 1]], clean[0, 0, 5, [4, 1]]
    strengths = (c5 / A5).log() - ((1 - c5.sum()) / (1 - A5.sum())).log()
    softs = sum((Do.soft(5, j, float(x), batch=0, heads=0) for j, x in zip((4, 1), strengths, strict=True)), Plan())
    softened = ca.attention(q, k, v, causal=True, do=softs)
    torch.testing.assert_close(softened.out[0, 0, 5], result.out[0, 0, 5], **CLOSE)
    torch.testing.assert_close(softened.lse[0, 0, 5], result.lse[0, 0, 5], **CLOSE)


def test_a_whole_column_and_a_whole_map():
    q, k, v, A, clean = two_maps(causal=True)
    column = ca.attention(q, k, v, causal=True, do=Do.patch_edges(clean[..., :1], None, 0), return_probs=True)
    expected = A.clone()
    for row in range(1, 9):
        expected = by_hand(expected, row, [0], clean[:, :, row, :1])
    torch.testing.assert_close(column.probs, expected, **CLOSE)
    # a row that has no other key keeps what it has, and its lse
    torch.testing.assert_close(column.lse[:, :, 0], ca.attention(q, k, v, causal=True).lse[:, :, 0], **CLOSE)
    whole = ca.attention(q, k, v, causal=True, do=Do.patch_edges(clean, None, slice(None)), return_probs=True)
    torch.testing.assert_close(whole.probs, clean, **CLOSE)
    torch.testing.assert_close(whole.out, clean @ v.repeat_interleave(2, 1), **CLOSE)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("share", [0.5, 1 - 1e-5, 1 - 1e-9])
def test_what_a_peaked_row_keeps_has_its_digits(backend, share):
    q, k, v = make_qkv(1, 2, 1, 33, 33, 16, seed=3, scale=0.3)
    bias = torch.zeros(33, 33, device=DEVICE)
    bias[20, 4] = math.log(share / (1 - share) * 20)
    plan = Do.patch_edges(0.25, 20, 4)
    result = ca.attention(q, k, v, causal=True, bias=bias, do=plan, return_probs=True, backend=backend)
    bias[20, 4] = -torch.inf
    rest = ca.attention(q.double(), k.double(), v.double(), causal=True, bias=bias, return_probs=True)
    expected = 0.75 * rest.out[:, :, 20] + 0.25 * v[:, :, 4].double()
    torch.testing.assert_close(result.out[:, :, 20].double(), expected, rtol=2e-6, atol=2e-6)
    probs = (0.75 * rest.probs[:, :, 20]).index_fill(-1, torch.tensor(4, device=DEVICE), 0.25)
    torch.testing.assert_close(result.probs[:, :, 20].double(), probs, rtol=2e-6, atol=2e-6)
    lse = rest.lse[:, :, 20] - math.log(0.75)
    torch.testing.assert_close(result.lse[:, :, 20].double(), lse, rtol=2e-6, atol=2e-6)


def test_a_row_with_nothing_beside_its_patched_keys():
    q, k, v, A, _ = two_maps(causal=True)
    scores = q[:, :, 3] * k.repeat_interleave(2, 1)[:, :, 1] / 4
    for plan in (Do.patch_edges(1.0, 3, 1), Do.patch_edges(1, 3, 1) + Do.soft(3, 0, 2.0)):
        result = ca.attention(q, k, v, causal=True, do=plan, return_probs=True)
        hard = ca.attention(q, k, v, causal=True, do=Do.hard(3, 1), return_probs=True)
        for x, y in zip(result, hard, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
        torch.testing.assert_close(result.lse[:, :, 3], scores.sum(-1), **CLOSE)
    # c is divided by its sum where every key has one, or the others are cut
    for plan in (Do.patch_edges([0.3, 0.1], 1, [0, 1]), Do.cut(3, [2, 3]) + Do.patch_edges([0.3, 0.1], 3, [0, 1])):
        row = plan.items[-1].row[0]
        A = ca.attention_rows(q, k, [row], causal=True, do=plan)[:, :, 0]
        torch.testing.assert_close(A[..., :2], torch.tensor([0.75, 0.25]).to(A).expand(2, 4, -1), **CLOSE)
        assert not A[..., 2:].any()
    empty = ca.attention(q, k, v, causal=True, do=Do.patch_edges(0, 1, [0, 1]))
    assert not empty.out[:, :, 1].any() and (empty.lse[:, :, 1] == -torch.inf).all()


def test_a_learned_sink_is_part_of_the_rest():
    q, k, v = make_qkv(1, 2, 1, 9, 9, 16, dtype=torch.float64, seed=5)
    sink = torch.tensor([0.5, -1.0], dtype=torch.float64, device=DEVICE)
    options = {"causal": True, "sink": sink, "return_probs": True}
    A = ca.attention(q, k, v, **options).probs
    result = ca.attention(q, k, v, do=Do.patch_edges(0.4, [3, 0], 0), **options)
    expected = A.clone()
    expected[:, :, 3] *= (0.6 / (1 - A[:, :, 3, :1])).where(torch.arange(9, device=DEVICE) > 0, 0)
    expected[:, :, [3, 0], 0] = 0.4
    torch.testing.assert_close(result.probs, expected, **CLOSE)
    torch.testing.assert_close(result.out, expected @ v, **CLOSE)
    # row 0 has the sink alone beside: 0.6 of it is e^{sink − lse}
    torch.testing.assert_close(result.lse[0, :, 0], sink - math.log(0.6), **CLOSE)


def test_other_interventions_on_the_same_row():
    q, k, v, _, clean = two_maps(causal=True)
    c, shift, delta = clean[..., 7, 2], torch.linspace(-1, 1, 24).double(), torch.linspace(0, 1, 16).double()
    others = Do.cut(7, [0, 5]) + Do.soft(7, [1, 2], 1.5) + Do.key_edit(2, delta) + Do.key_edit(4, delta)
    plan = others + Do.patch_edges(c[..., None, None], 7, 2) + Do.value_edit([2, 3], shift) + Do.hard(6, 2)
    plan += Do.patch_edges(0.2, 6, 1) + Do.patch_edges(1.0, 5, 2)
    A = ca.attention(q, k, v, causal=True, do=others + Do.hard(6, 2) + Do.hard(5, 2), return_probs=True).probs
    A = by_hand(A, 7, [2], c[..., None])
    values = v.repeat_interleave(2, 1).clone()
    values[:, :, [2, 3]] += shift.to(values)
    result = ca.attention(q, k, v, causal=True, do=plan, return_probs=True)
    torch.testing.assert_close(result.probs, A, **CLOSE)
    torch.testing.assert_close(result.out, A @ values, **CLOSE)
    want = ("entropy", "received", "below", "sum_sq")
    stats = ca.attention_stats(q, k, causal=True, do=plan, want=want)
    for name in want:
        expected = getattr(ca.dense.attention_stats(A, want=want), name)
        torch.testing.assert_close(getattr(stats, name), expected, **CLOSE)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 2, 1, 5, 5, 3, V=2, dtype=torch.float64))
    c = torch.tensor([[[0.3, 0.2], [0.6, 0.4]]], dtype=torch.float64, requires_grad=True)
    # the last row loses 0.9 and is formed again
    bias = torch.zeros(5, 5, dtype=torch.float64)
    bias[4, 1] = 9.0
    delta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)

    def under(q, k, v, c):
        plan = Do.patch_edges(c, edges=[(4, 1), (3, 0)]) + Do.patch_edges(c[:, :, 1:] * 0.9, edges=[(0, 0)])
        plan += Do.soft(4, 2, 1.0) + Do.key_edit(0, delta) + Do.value_edit(1, delta[:2])
        out, lse, probs = ca.attention(q, k, v, causal=True, bias=bias, do=plan, return_probs=True)
        return out, lse, probs, ca.attention_stats(q, k, causal=True, bias=bias, do=plan, want="entropy").entropy

    assert torch.autograd.gradcheck(under, (q, k, v, c))


def test_a_matrix_takes_one_edge():
    A = torch.rand(2, 3, 5, 6, dtype=torch.float64).softmax(-1)
    c = torch.rand(2, 3, dtype=torch.float64)
    torch.testing.assert_close(ca.dense.do_patch(A, -1, 2, c), by_hand(A, 4, [2], c[..., None]), **CLOSE)
    torch.testing.assert_close(ca.dense.do_patch(torch.eye(3), 1, 1, 0.3), torch.eye(3))
    halved = ca.dense.do_patch(A / 2, 0, 0, 0.2)
    torch.testing.assert_close(halved[:, :, 0].sum(-1), torch.full((2, 3), 0.5).double(), **CLOSE)
    assert torch.autograd.gradcheck(
        lambda A, c: ca.dense.do_patch(A, 2, 1, c), (A.requires_grad_(), c.requires_grad_())
    )
    expected = reference.do_patch(A.detach().numpy(), 4, 2, c.detach().numpy())
    torch.testing.assert_close(ca.dense.do_patch(A, 4, 2, c), torch.from_numpy(expected), **CLOSE)
    with pytest.raises(ValueError, match="probability must be from 0 to the row's sum"):
        ca.dense.do_patch(A / 2, 0, 0, 0.7)


def test_a_patch_of_edges_as_json():
    plan = Do.patch_edges(0.25, "sank", "storm") + Do.patch_edges([[[0.5]], [[0.1]]], 3, 1, layers=[0, 2])
    plan += Do.patch_edges({0: [0.1, 0.2], 3: 0.5}, edges=[(4, 1), (3, 0)], heads=1)
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and str(again) == str(plan)
    assert str(plan) == (
        "patch_edges('sank', 'storm') + patch_edges(3, 1, layers=[0, 2]) + patch_edges([(4, 1), (3, 0)], heads=1)"
    )
    assert again.items[2].source[0].tolist() == [0.1, 0.2] and again.items[2].source[3] == 0.5
    edge = Plan.from_json('{"items": [{"do": "patch_edges", "edge": "L5H3: sank <- storm", "source": 0.3}]}')
    assert str(edge) == "patch_edges('sank', 'storm', heads=3, layers=5)"
    with pytest.raises(ValueError, match="is wrong: source must hold probabilities, got 'x'"):
        Plan.from_json('{"items": [{"do": "patch_edges", "row": 1, "col": 0, "source": "x"}]}')


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Do.patch_edges("x", 1, 0), TypeError, "source must hold probabilities, got 'x'"),
        (lambda: Do.patch_edges([], 1, 0), TypeError, r"source must hold probabilities, got .* of shape \[0\]"),
        (lambda: Do.patch_edges(torch.ones(1, dtype=torch.int64), 1, 0), TypeError, "probabilities, got torch.int64"),
        (lambda: Do.patch_edges({}, 1, 0), ValueError, "source must be of at least one layer, got none"),
        (
            lambda: Do.patch_edges({"a": 0.5}, 1, 0),
            TypeError,
            "source must map layer numbers to probabilities, got 'a'",
        ),
        (lambda: Do.patch_edges([0.5, 1.2], 1, [0, 1]), ValueError, "probabilities, from 0 to 1, got 0.5 to 1.2"),
        (lambda: Do.patch_edges(float("nan"), 1, 0), ValueError, "probabilities, from 0 to 1, got nan to nan"),
        (lambda: Do.patch_edges(0.5, 1), ValueError, "patch_edges needs a col, got None"),
    ],
)
def test_a_source_that_is_wrong_says_so(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            Do.patch_edges(torch.zeros(3, 1), [3, 4], 0),
            r"source of .* must broadcast to \[2, 2, 2, 1\], got \[1, 1, 3, 1\]",
        ),
        (Do.patch_edges(torch.zeros(4, 1), None, 0), r"must broadcast to \[2, 2, 9, 1\], got \[1, 1, 4, 1\]"),
        (Do.patch_edges([0.1, 0.2], edges=[(3, 1)]), r"must broadcast to \[2, 2, 1, 1\], got \[1, 1, 1, 2\]"),
        (
            Do.patch_edges(torch.zeros(1, 1, 1, 1), edges=[(3, 1)]),
            r"at most 3 axes \[B, H, edges\], got \[1, 1, 1, 1\]",
        ),
        (Do.patch_edges(0.1, edges=[(3, 1), (-6, 1)]), r"patch_edges\(.*\) names an edge twice"),
        (Do.patch_edges(0.1, 3, 1) + Do.patch_edges(0.1, 3, [0, 1]), r"an edge takes one patch, got two on \(3, 1\)"),
        (Do.patch_edges(0.1, 3, 1) + Do.cut(3, 1), "row 3 has a patch onto key 1, which is cut"),
        (Do.patch_edges(0.6, 3, [0, 1]), "probabilities must sum to at most 1 in a row, got 1.2 on row 3"),
        (Do.patch_edges(0.1, 3, 5), r"patch_edges\(3, 5\) matched no edge: the mask forbids it"),
        (Do.patch_edges(0.1, edges=[(3, 1), (3, 5)]), "the mask forbids 1 of its 2 edges"),
        (Do.patch_edges({3: 0.1}, 3, 1), "has no source for layer None, only for"),
    ],
)
def test_a_patch_that_does_not_fit_says_so(plan, says):
    q, k, v = make_qkv(2, 2, 1, 9, 9, 16)
    with pytest.raises(ValueError, match=says):
        ca.attention(q, k, v, causal=True, do=plan)


def attend_by(maps):
    """An attention function by these maps, one a layer."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        A = maps[module.layer_idx]
        return (A @ value.repeat_interleave(A.shape[1] // value.shape[1], 1)).transpose(1, 2).contiguous(), A

    return attend


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_model_takes_the_edges_of_its_clean_run(padding):
    clean, model = text_inputs(padding), exact("llama")
    ids = clean["input_ids"].clone()
    ids[:, 8] = ids[:, 8] % 50 + 5
    corrupt = clean | {"input_ids": ids}
    wanted, present = (model(**inputs, output_attentions=True).attentions for inputs in (clean, corrupt))
    # rows 9 and 10 and keys 8 and 3 of each sequence's real tokens
    origins = [int(mask.argmax()) for mask in clean["attention_mask"]]
    source = torch.stack([wanted[0][b, :, f + 9 : f + 11][..., [f + 8, f + 3]] for b, f in enumerate(origins)])
    # and all of row 12 on one key
    with ca.do(Do.patch_edges({0: source}, [9, 10], [8, 3], layers=0) + Do.patch_edges(1, 12, 5, layers=0)) as receipt:
        use(model)(**corrupt)
    new = present[0]
    for b, f in enumerate(origins):
        edited = by_hand(new[b], f + 12, [f + 5], torch.ones(4, 1).to(new))
        for n in (0, 1):
            edited = by_hand(edited, f + 9 + n, [f + 8, f + 3], source[b, :, n])
        new = new.index_copy(0, torch.tensor([b], device=new.device), edited[None])
    real = clean["attention_mask"].bool()[:, None, :, None]
    moved = torch.special.xlogy(new, new / present[0]).nan_to_num(0) * real
    assert receipt.items == [2 * 4 * 4, 2 * 4] and receipt.emptied == 0
    assert receipt.mass == pytest.approx(((present[0] - new).clamp(min=0) * real).sum().item(), rel=1e-9)
    assert receipt.kl == pytest.approx(moved.sum().item(), rel=1e-9)


@torch.no_grad()
def test_a_model_takes_whole_maps_and_later_rows_stay():
    clean, model = text_inputs(), exact("llama")
    corrupt = clean | {"input_ids": clean["input_ids"].flip(0)}
    maps = dict(enumerate(model(**clean, output_attentions=True).attentions))
    transformers.AttentionInterface.register("by_maps", attend_by(maps))
    transformers.AttentionMaskInterface.register("by_maps", transformers.masking_utils.eager_mask)
    model.set_attn_implementation("by_maps")
    expected = model(**corrupt).logits
    plan = Do.patch_edges(maps, None, slice(None))
    with ca.do(plan):
        logits = use(model)(**corrupt).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    with ca.do(plan) as receipt:
        model.generate(**corrupt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert receipt.items == [2 * 2 * 4 * 19 * 20 // 2]
    with (
        pytest.raises(ValueError, match="has no source for layer 1, only for"),
        ca.do(Do.patch_edges({0: maps[0]}, None, slice(None))),
    ):
        model(**corrupt)

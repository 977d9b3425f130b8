"""Plans: what they say, how they are written and read, and every way in which they can be wrong."""

import json

import numpy as np
import pytest
import torch
from helpers import make_qkv

import causalattn as ca
from causalattn import Do, Plan

TOKENS = ["[CLS]", "because", "the", "storm", "inten", "##sified", ",", "the", "Ġship", "▁sank", "."]


def test_items_say_what_they_do():
    plan = Do.hard("sank", "storm") + Do.soft(3, [0, 1], -2) + Do.cut(None, slice(-4, None), heads=[0, 2], layers=5)
    assert str(plan) == "hard('sank', 'storm') + soft(3, [0, 1], -2) + cut(*, '[-4:]', heads=[0, 2], layers=5)"
    assert str(Do.head_off([1, 2], value="mean") + Do.causal()) == "head_off(value='mean', heads=[1, 2]) + causal()"


@pytest.mark.parametrize(
    ("text", "row", "col", "layers", "heads"),
    [
        ("L5H3: sank <- storm", "sank", "storm", (5,), (3,)),
        ("H3: the ship <- storm", "the ship", "storm", None, (3,)),
        ("L11: [7] <- [2:5]", (7,), "[2:5]", (11,), None),
        ("sank<-storm", "sank", "storm", None, None),
        ("* <- [0]", None, (0,), None, None),
        (": the <- x", ": the", "x", None, None),
        ("L: x <- y", "L: x", "y", None, None),
    ],
)
def test_an_arrow_names_an_edge(text, row, col, layers, heads):
    item = Do.cut(text).items[0]
    assert (item.row, item.col, item.layers, item.heads) == (row, col, layers, heads)


def test_texts_become_the_tokens_they_name():
    plan = Do.cut("the ship <- intensified") + Do.soft("sank", "the#2", 1.0) + Do.hard(-1, "[2]")
    first, second, third = plan.locate(TOKENS).items
    assert (first.row, first.col) == ((7, 8), (4, 5))
    assert (second.row, second.col) == ((9,), (7,))
    assert (third.row, third.col) == ((-1,), (2,))
    special = Do.cut("[CLS]", "[2:]").locate(TOKENS).items[0]
    assert (special.row, special.col) == ((0,), "[2:]")


@pytest.mark.parametrize(
    ("tokens", "text", "places"),
    [
        # the tail of a longer word is no word
        (["friend", "##ship", "ship"], "ship", (2,)),
        (["friend", "##ship", "ship"], "friendship", (0, 1)),
        (["friend", "##ship", "ship"], "##ship", (1,)),
        (["un", "##friend", "##ly"], "##friendly", (1, 2)),
        (["note", ":", "the", "end"], ": the", (1, 2)),
        # GPT-2's letters for bytes, also where a letter lies in two tokens
        (["In", "ĠZÃ¼rich", "ĠcafÃ©"], "Zürich", (1,)),
        (["In", "ĠZÃ¼rich", "ĠcafÃ©"], "Zürich café", (1, 2)),
        (["In", "ĠZÃ¼rich", "ĠcafÃ©"], "cafÃ©", (2,)),
        (["Z", "Ã", "¼", "rich"], "Zürich", (0, 1, 2, 3)),
        (["the", "Ċ", "Ġend"], "the end", (0, 1, 2)),
        (["caf", "##é"], "café", (0, 1)),
        (["▁Z", "<0xC3>", "<0xBC>", "rich"], "Zürich", (0, 1, 2, 3)),
        # a lone ▁ is a blank
        (["▁in", "▁", "東京", "▁", "駅"], "in 東京駅", (0, 1, 2, 3, 4)),
        (["▁in", "▁", "東京", "▁"], "東京", (2,)),
    ],
)
def test_texts_of_every_tokenizer(tokens, text, places):
    assert Do.cut(text, 0).locate(tokens).items[0].row == places


@pytest.mark.parametrize(
    ("tokens", "text", "says"),
    [
        (["friend", "##ship"], "ship", "'ship' is not among the tokens friend ship"),
        (["ĠZÃ¼rich", "ĠcafÃ©"], "Bern", "'Bern' is not among the tokens Zürich café"),
        (["caf", "##é"], "Bern", "'Bern' is not among the tokens caf é"),
        (["##", "a"], "##", "'##' is not among the tokens  a"),
    ],
)
def test_tokens_are_shown_as_they_are_read(tokens, text, says):
    with pytest.raises(ValueError, match=says):
        Do.cut(text, 0).locate(tokens)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sun", r"'sun' is not among the tokens \[CLS\] because the"),
        ("the", "'the' occurs 2 times among the tokens, at 2, 7: write 'the#2', say"),
        ("the#3", "'the' occurs 2 times among the tokens, got 'the#3'"),
        ("stor", "'stor' is not among"),
    ],
)
def test_a_text_must_name_one_place(text, says):
    with pytest.raises(ValueError, match=says):
        Do.cut(text, 0).locate(TOKENS)


def test_json_there_and_back():
    plan = Do.hard("sank", "storm", layers=5) + Do.soft(7, slice(0, 3), 0.5, heads=[1, 2], batch=0) + Do.cut(None, -1)
    plan += Do.cut(edges=[(3, 1), (4, 0)]) + Do.causal(layers=[0, 1]) + Do.key_edit(2, [0.5, -1.0]) + Do.head_off(3)
    plan += Do.value_edit("[1:]", torch.tensor([1.0, 2.0])) + Do.layer_off(2, value="mean")
    again = Plan.from_json(plan.to_json())
    assert str(again) == str(plan) and json.loads(again.to_json()) == json.loads(plan.to_json())
    assert torch.equal(again.items[5].delta, plan.items[5].delta.double())
    edge = Plan.from_json('{"items": [{"do": "soft", "edge": "L5H3: sank <- storm", "strength": 3}]}')
    assert str(edge) == "soft('sank', 'storm', 3, heads=3, layers=5)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "a plan must be JSON, got .* at line 1"),
        ("[]", 'an object with a list "items"'),
        ('{"items": []}', "at least one item"),
        ('{"version": 2, "items": [{"do": "causal"}]}', "must have version 1, got 2"),
        ('{"items": [{"do": "patch"}]}', 'an item must have "do" among hard, soft'),
        ('{"items": [{"do": "causal"}], "layers": [3]}', 'a plan has "version" and "items", got \'layers\' too'),
        ('{"items": [3]}', 'an item must have "do" among hard, soft'),
        ('{"items": [{"do": "soft", "row": 1, "col": 0}]}', "is wrong: strength must be a number"),
        ('{"items": [{"do": "cut", "row": 1, "column": 0}]}', "is wrong: .*unexpected keyword argument 'column'"),
        ('{"items": [{"do": "cut", "row": 1.5, "col": 0}]}', "is wrong: row must be a number or numbers, got 1.5"),
        ('{"items": [{"do": "cut", "edge": "a", "row": 0}]}', "edge or row and col, got both"),
        ('{"items": [{"do": "cut", "edge": "a"}]}', "edge must read like 'L5H3: sank <- storm', got 'a'"),
    ],
)
def test_a_plan_file_that_is_wrong_says_so(text, says):
    with pytest.raises(ValueError, match=says):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Do.soft(1, 0), TypeError, "strength must be a number, got NoneType"),
        (lambda: Do.soft(1, 0, float("inf")), ValueError, r"Do.cut is −∞ and Do.hard is ∞\), got inf"),
        (lambda: Do.soft(1, 0, float("nan")), ValueError, "strength must be finite"),
        (lambda: Do.soft(1, None, 1.0), ValueError, "soft needs a col, got None"),
        (lambda: Do.cut(), ValueError, "cut needs a row or a col, got neither"),
        (lambda: Do.soft(1, 0, 10**400), ValueError, r"strength must be finite .*, got inf"),
        (lambda: Do.soft(1, 0, np.ones(2)), TypeError, "strength must be a number, got ndarray"),
        (lambda: Do.soft(1, 0, True), TypeError, "strength must be a number, got bool"),
        (lambda: Do.cut(np.array([1.5]), 0), TypeError, "row must be a number or numbers, got array"),
        (lambda: Do.cut(np.True_, 0), TypeError, "row must be a number or numbers, got np.True_"),
        (lambda: Do.cut(slice(0.5, 2), 0), TypeError, r"row must be a span between two numbers, got slice\(0.5, 2"),
        (lambda: Do.cut(edges=np.ones((1, 2))), TypeError, r"edges must hold \(row, col\) pairs of numbers, got \(1.0"),
        (lambda: Do.cut(True, 0), TypeError, "row must be a number or numbers, got True"),
        (lambda: Do.cut([], 0), ValueError, "row must hold at least one number"),
        (lambda: Do.cut(1, slice(0, 4, 2)), ValueError, "col must be a span of step 1, got step 2"),
        (lambda: Do.cut(1, "[-:3]"), ValueError, "a span must read like"),
        (lambda: Do.cut(1, 0, layers=-1), ValueError, "layers must count from 0, got -1"),
        (lambda: Do.cut(edges=(3, 1)), TypeError, r"edges must hold \(row, col\) pairs of numbers, got \(3, 1\)"),
        (lambda: Do.key_edit("a <- b", [1.0]), ValueError, "col must name a token, got 'a <- b'"),
        (lambda: Do.key_edit(1, [float("nan")]), ValueError, "delta must be finite, got NaN or inf"),
        (lambda: Do.cut(" ", 0), ValueError, "row must name a token, got ' '"),
        (lambda: Do.cut("a <- b", 0), ValueError, "col must be left out beside 'a <- b', got 0"),
        (lambda: Do.cut("a <- b <- c"), ValueError, "an edge must read like"),
        (lambda: Do.cut("<- b"), ValueError, "an edge must read like"),
        (lambda: Do.cut(1, edges=[(1, 0)]), ValueError, "edges stand in place of row and col, got both"),
        (lambda: Do.cut(edges=[(1, 0, 2)]), TypeError, r"edges must hold \(row, col\) pairs"),
        (lambda: Do.cut(edges=[]), ValueError, "edges must hold at least one"),
        (lambda: Do.head_off(None), TypeError, "heads must be a number or numbers, got None: Do.layer_off"),
        (lambda: Do.head_off(1, value="median"), ValueError, "value must be 'zero' or 'mean', got 'median'"),
        (lambda: Do.key_edit(1, [[1.0]]), ValueError, r"delta must be a vector of numbers, got shape \[1, 1\]"),
        (lambda: Do.key_edit(1, "x"), TypeError, "delta must be a vector of numbers, got str"),
        (lambda: Do.patch([1.0]), TypeError, "source must be a tensor"),
        (lambda: Do.patch({}), TypeError, "source must be a tensor"),
        (lambda: (Do.patch(torch.zeros(1, 1, 1, 1)) + Do.causal()).to_json(), TypeError, "a patch cannot be written"),
    ],
)
def test_an_item_that_is_wrong_says_so(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_numbers_of_numpy_and_torch_are_numbers():
    plain = Do.soft([3, 4], 1, 2.0, heads=1) + Do.cut(edges=[(5, 0)], layers=[0, 2]) + Do.cut(slice(2, 4), -1)
    given = Do.soft(np.array([3, 4]), np.int64(1), np.float32(2), heads=torch.tensor(1))
    given += Do.cut(edges=np.array([[5, 0]]), layers=[np.int32(0), np.uint8(2)]) + Do.cut(
        slice(np.int64(2), np.int64(4)), torch.tensor([-1])
    )
    assert given.to_json() == plain.to_json()
    assert Do.soft(1, 0, np.array(2.0)).items[0].strength == Do.soft(1, 0, np.int64(2)).items[0].strength == 2.0
    assert torch.equal(ca.dense.do_cut(torch.eye(3), np.int64(1), np.int32(1)), ca.dense.do_cut(torch.eye(3), 1, 1))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Do.cut(9, 0), r"row of cut\(9, 0\) must be from 0 to 8, got 9"),
        (Do.cut(-10, 0), r"row of cut\(-10, 0\) must be from -9 to 8, got -10"),
        (Do.cut(10**30, 0), r"row of cut\(10+, 0\) must be from -9 to 8, got 10+"),
        (Do.cut(3, -(10**30)), r"col of cut\(3, -10+\) must be from -9 to 8, got -10+"),
        (Do.cut(edges=[(3, 10**30)]), r"col of cut\(.*\) must be from -9 to 8, got 10+"),
        (Do.cut(3, slice(0, 2**31 - 1)), r"col of cut\(3, .*\) must be from 0 to 8, got 2147483646"),
        (Do.cut(slice(0, 10**30), 0), r"row of cut\(.*\) must be from -9 to 9, got 10+"),
        (Do.cut(3, 0, heads=10**30), r"heads of .* must be from 0 to 1, got \[10+\]"),
        (Do.cut(3, 12), r"col of cut\(3, 12\) must be from 0 to 8, got 12"),
        (Do.cut(3, 0, heads=2), r"heads of cut\(3, 0, heads=2\) must be from 0 to 1, got \[2\]"),
        (Do.cut(3, 0, batch=2), r"batch of .* must be from 0 to 1, got \[2\]"),
        (Do.cut(3, 0, layers=5), r"a do on tensors has no layers, got cut\(3, 0, layers=5\)"),
        (Do.key_edit(3, [1.0]), "the delta of a key_edit must hold 16 numbers, got 1"),
        (Do.value_edit(3, [1.0] * 3), "the delta of a value_edit must hold 16 numbers, got 3"),
        (Do.cut(3, "[4:2]"), "must hold at least one token, got"),
        (Do.cut(3, 5), r"cut\(3, 5\) matched no edge: the mask forbids it"),
        (Do.cut(edges=[(3, 1), (3, 5)]), "the mask forbids 1 of its 2 edges"),
        (Do.hard([2, 4], 4), "the mask forbids 1 of its 2 edges"),
        (Do.hard(3, 1) + Do.hard(3, 2), "a row takes one hard do, got two on row 3"),
        (Do.hard(3, slice(0, 2)), "a row takes one hard do, got two on row 3"),
        (Do.cut(3, 1) + Do.hard(3, 1), "row 3 has a hard do onto key 1, which is cut"),
        (Do.head_off(0) + Do.head_off([0, 1], value="mean"), "switched off to zero or to its mean, got both"),
        (Do.cut("storm", 1), r"'storm' names a token, and tensors have none: use plan.locate\(tokens\) first"),
        (Do.patch(torch.zeros(1, 1, 9, 16)), r"source of a patch must have shape \[2 or 1, 2, 9, 16\], got \[1, 1, 9"),
        (Do.patch({3: torch.zeros(1, 2, 9, 16)}), "has no source for layer None, only for"),
    ],
)
def test_a_plan_that_does_not_fit_says_so(plan, says):
    q, k, v = make_qkv(2, 2, 1, 9, 9, 16)
    with pytest.raises(ValueError, match=says):
        ca.attention(q, k, v, causal=True, do=plan)


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("per_head", [False, True])
def test_an_edge_that_the_bias_forbids_is_none(lowest, per_head):
    q, k, v = make_qkv(2, 2, 1, 9, 9, 16)
    bias = torch.zeros(2, 2, 9, 9) if per_head else torch.zeros(9)
    bias[..., [1, 3]] = lowest
    if per_head:
        bias[1, 1, 5, 3] = 0.5
    run = {
        "attention": lambda plan: ca.attention(q, k, v, causal=True, bias=bias, do=plan),
        "rows": lambda plan: ca.attention_rows(q, k, [5], causal=True, bias=bias, do=plan),
        "stats": lambda plan: ca.attention_stats(q, k, causal=True, bias=bias, do=plan),
    }
    for call in run.values():
        for plan in (Do.soft(5, 1, 2.0), Do.cut(None, 1), Do.hard(4, 3), Do.cut(0, 1) + Do.soft(5, 0, 1.0)):
            with pytest.raises(ValueError, match=r"\) matched no edge: the mask forbids it"):
                call(plan)
        with pytest.raises(ValueError, match="the mask forbids 1 of its 2 edges"):
            call(Do.cut(edges=[(5, 0), (5, 1)]))
        call(Do.cut(5, slice(0, 4)))
        if per_head:
            call(Do.hard(5, 3))
        else:
            with pytest.raises(ValueError, match=r"hard\(5, 3\) matched no edge"):
                call(Do.hard(5, 3))
    if per_head:
        forced, plain = (ca.attention(q, k, v, causal=True, bias=bias, do=x).out for x in (Do.hard(5, 3), None))
        assert torch.equal(forced[1, 1, 5], v[1, 0, 3])
        forced[1, 1, 5] = plain[1, 1, 5]
        assert torch.equal(forced, plain)


def test_a_do_is_a_plan():
    q, k, v = make_qkv(1, 1, 1, 9, 9, 16)
    for call in (lambda do: ca.attention(q, k, v, do=do), lambda do: ca.attention_rows(q, k, [1], do=do)):
        with pytest.raises(TypeError, match="do must be a causalattn Plan"):
            call("cut")
    with pytest.raises(NotImplementedError, match="asymmetry needs all of A under a do"):
        ca.attention_stats(q, k, want="asymmetry", do=Do.cut(1, 0))


def test_matrices_take_the_same_interventions():
    A = torch.rand(2, 3, 5, 6, dtype=torch.float64).softmax(-1)
    hard = ca.dense.do_hard(A, 4, -1)
    assert (hard[..., 4, :] == torch.eye(6)[5]).all() and torch.equal(hard[..., :4, :], A[..., :4, :])
    logits = A.log()
    logits[..., 2, 1] += 3
    torch.testing.assert_close(ca.dense.do_soft(A, 2, 1, 3.0), logits.softmax(-1))
    logits[..., 2, 1] = -torch.inf
    torch.testing.assert_close(ca.dense.do_cut(A, 2, 1), logits.softmax(-1))
    torch.testing.assert_close(ca.dense.do_soft(A, 2, 1, 2000.0)[0, 0, 2], torch.eye(6, dtype=torch.float64)[1])
    # where the raised key has nothing, or all underflows, the row stays
    assert torch.equal(ca.dense.do_soft(torch.eye(2), 0, 1, 2000.0), torch.eye(2))
    assert not ca.dense.do_cut(torch.eye(3), 1, 1)[1].any()
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda A: ca.dense.do_soft(A, 2, 1, -1.0), (A,))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((5, 0), ValueError, "row must be from -4 to 3, got 5"),
        ((0, -7), ValueError, "col must be from -4 to 3, got -7"),
        ((1.0, 0), TypeError, "row must be an integer, got float"),
    ],
)
def test_matrices_refuse_what_is_out_of_range(arguments, error, says):
    for do in (ca.dense.do_hard, ca.dense.do_cut, lambda A, i, j: ca.dense.do_soft(A, i, j, 1.0)):
        with pytest.raises(error, match=says):
            do(torch.eye(4), *arguments)
    with pytest.raises(ValueError, match="strength must be finite"):
        ca.dense.do_soft(torch.eye(4), 0, 0, float("-inf"))
    with pytest.raises(ValueError, match="A must have shape"):
        ca.dense.do_hard(torch.ones(4), 0, 0)

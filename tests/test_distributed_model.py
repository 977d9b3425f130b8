"""distributed.analyze reports of a sharded sequence what analyze reports of a whole one."""

import math

import pytest
import torch
from sharded import model_of

import causalattn as ca

pytest.importorskip("transformers")

TOKENS = 37


def inputs(tokens=TOKENS):
    return {"input_ids": torch.randint(50, (1, tokens), generator=torch.Generator().manual_seed(4))}


@pytest.mark.parametrize(
    ("family", "world", "order"),
    [
        ("bert", 3, None),
        ("gpt2", 2, None),
        ("llama", 4, "contiguous"),
        ("mistral", 2, None),
        pytest.param("llama", 8, None, marks=pytest.mark.full),
    ],
)
def test_reports_are_alike(ranks, family, world, order):
    answers = ranks.run(world, "report", family, inputs(), order, want="all")
    model = model_of(family)
    alone = ca.analyze(model, inputs(), want="all")
    exact = ca.analyze(model.double(), inputs(), want="all")
    for found, seen in answers:
        assert seen == [(1, 2), (2, 2)]
        assert (found.layer_ids, found.head_ids, found.tokens) == (alone.layer_ids, alone.head_ids, alone.tokens)
        for layer, one, true in zip(found.layers, alone.layers, exact.layers, strict=True):
            for name in set(ca.AttentionStats._fields) - {"asymmetry"}:
                # every layer before it adds its own roundings
                close(getattr(layer, name), getattr(one, name), getattr(true, name))
            for name in ca.Asymmetry._fields:
                close(getattr(layer.asymmetry, name), getattr(one.asymmetry, name), getattr(true.asymmetry, name))
        for row, other in zip(found.rows(), alone.rows(), strict=True):
            assert row.keys() == other.keys() and row["causal"] == other["causal"]
            for name, value in other.items():
                if isinstance(value, float):
                    assert math.isclose(row[name], value, rel_tol=2e-3, abs_tol=2e-4), name
            assert [x["index"] for x in row["received"]] == [x["index"] for x in other["received"]]
    first, *others = (found.to_json() for found, _ in answers)
    assert all(text == first for text in others)


def close(found, alone, exact):
    band = 1e-4 * exact[exact.isfinite()].abs().amax()
    finite = exact.isfinite()
    assert found.dtype == alone.dtype and found.shape == exact.shape
    assert ((found.double() - exact)[finite].abs() <= 2 * (alone.double() - exact)[finite].abs().amax() + band).all()


def test_chosen_layers_and_names(ranks):
    tokens = [f"t{n}" for n in range(TOKENS)]
    for found, seen in ranks.run(
        2, "report", "bert", inputs(), layers=[1], null=False, want=["entropy"], tokens=tokens
    ):
        assert found.layer_ids == [1] and seen == [(1, 1)] and found.tokens == [tokens]
        assert found.scores[0].dag_score is None and found.layers[0].lse is None
        close(found.layers[0].entropy, *2 * [ca.analyze(model_of("bert"), inputs(), layers=[1]).layers[0].entropy])


@pytest.mark.parametrize(
    ("family", "given", "options", "kind", "message"),
    [
        ("bert", [1, 2, 3], {}, TypeError, "inputs must map names to tensors, as a tokenizer returns them, got list"),
        ("bert", {}, {}, ValueError, "inputs must hold one sequence, got neither input_ids nor inputs_embeds"),
        (
            "bert",
            {"input_ids": torch.ones(2, 9).long()},
            {},
            ValueError,
            "inputs must hold one sequence, got 2 sequences",
        ),
        ("bert", inputs() | {"attention_mask": torch.zeros(1, TOKENS)}, {}, ValueError, "inputs must hold no padding"),
        ("bert", inputs(3), {}, ValueError, "inputs must hold at least two tokens a rank, 4, got 3"),
        ("bert", inputs(), {"layers": [7]}, ValueError, r"layers must be among \[0, 1\], got \[7\]"),
        ("bert", inputs(), {"want": "beauty"}, ValueError, "want must be 'all' or names among"),
        ("bert", inputs(), {"order": "striped"}, ValueError, "order must be 'contiguous' or 'zigzag', got 'striped'"),
        ("roberta", inputs(), {}, NotImplementedError, "roberta does not count its positions from 0"),
        ("jamba", inputs(), {}, NotImplementedError, "jamba is not supported"),
        (
            "dynamic",
            inputs(),
            {},
            NotImplementedError,
            "llama is not supported on shards: a token's queries and keys dep",
        ),
        (
            "llama",
            inputs() | {"position_ids": (torch.arange(TOKENS) % 20)[None]},
            {},
            ValueError,
            "inputs must hold one text, its positions 0 to 36, got other position_ids",
        ),
        ("t5", inputs(), {}, NotImplementedError, "t5 "),
    ],
)
def test_what_does_not_fit_is_refused(ranks, family, given, options, kind, message):
    ranks.start(2, "report", family, given, **options)
    for answer in [ranks.answer(rank) for rank in range(2)]:
        with pytest.raises(kind, match=message):
            raise answer.rebuilt()

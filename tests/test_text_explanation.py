"""Explanations of texts: a model that hangs on one token, every kind of model against brute force, and refusals."""

import json
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import transformers as t

from causalattn.text_discovery import discover_text
from causalattn.text_explanation import Replacement, explain_text, table

T, VOCAB, MASK = 7, 30, 29
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
TOKENS = list("^abcdef")
BERT = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "num_labels": 6, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "num_labels": 6}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = {
    "masked": (t.BertForMaskedLM, t.BertConfig(**BERT)),
    "next": (t.GPT2LMHeadModel, t.GPT2Config(**GPT2)),
    "class": (t.BertForSequenceClassification, t.BertConfig(**BERT)),
    "last class": (t.GPT2ForSequenceClassification, t.GPT2Config(**GPT2)),
}
# of tokens without an edge to the target nothing is asked: without conditioning there is an edge wherever r > cut
WHOLE = {"cut": 1e-9, "max_order": 0}


def random_model(kind, seed=0):
    torch.manual_seed(seed)
    model = KINDS[kind][0](KINDS[kind][1])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.5)
    return model


def hangs_on(token):
    """A classifier whose class is 1 where the token is anywhere: head 0 carries its first dimension to the second."""
    model = random_model("class")
    bert, layer = model.bert, model.bert.encoder.layer[0]
    bert.encoder.layer = bert.encoder.layer[:1]
    words, value, mixed = bert.embeddings.word_embeddings, layer.attention.self.value, layer.attention.output.dense
    with torch.no_grad():
        words.weight[:, :2] = 0
        words.weight[token, 0] = 20
        for linear in (value, mixed, layer.intermediate.dense, layer.output.dense, bert.pooler.dense, model.classifier):
            linear.weight.zero_()
            linear.bias.zero_()
        value.weight[0, 0] = mixed.weight[1, 0] = bert.pooler.dense.weight[0, 1] = 1
        model.classifier.weight[1, 0] = 1
        model.eval()
        without = IDS.masked_fill(IDS == token, MASK)
        middle = model(torch.cat([IDS, without])).logits[:, 1].mean()
        model.classifier.bias[1] = -middle
    return model


@pytest.mark.parametrize("token", [5, 8, 10])
def test_the_token_that_it_hangs_on(token):
    explained = explain_text(hangs_on(token), {"input_ids": IDS}, TOKENS, replacement=MASK, cut=0.05)
    at = IDS[0].tolist().index(token)
    assert [found.positions for found in explained.found] == [[at]]
    assert explained.prediction == "LABEL_1" and explained.found[0].prediction == "LABEL_0"
    assert explained.found[0].tokens == [TOKENS[at]] and explained.target == 0
    lines = table(explained)
    assert lines[0].startswith("'LABEL_1' is predicted; explained at '^' @0") and lines[3].endswith(
        f"{TOKENS[at]} @{at}"
    )
    assert json.loads(explained.to_json())["found"][0]["positions"] == [at]


def asked(kind, target):
    """The ids that sets are replaced in, the tokens that may be, and the row of logits that decides."""
    ids = IDS.clone()
    if kind == "masked":
        ids[0, target] = MASK
        return ids, [p for p in range(T) if p != target], target
    if kind == "next":
        return ids[:, :target], [*range(target)], target - 1
    return ids, [p for p in range(T) if p != target], None


@pytest.mark.parametrize(("kind", "target"), [("masked", 3), ("next", 7), ("next", 5), ("class", 0), ("last class", 6)])
def test_whole_graphs_give_what_brute_force_gives(kind, target):
    names = dict(zip(IDS[0].tolist(), TOKENS, strict=True))
    for seed in range(3):
        model = random_model(kind, seed)
        results = [
            explain_text(model, {"input_ids": IDS}, TOKENS, target=target, replacement=MASK, batch=batch, **WHOLE)
            for batch in (1, 4)
        ]
        assert len({str(result._replace(forwards=0)) for result in results}) == 1 and model.training
        ids, others, row = asked(kind, target)
        model.eval()

        def predict(positions, model=model, ids=ids, row=row):
            changed = ids.clone()
            changed[0, list(positions)] = MASK
            logits = model(changed).logits
            return int((logits[0] if row is None else logits[0, row]).argmax())

        with torch.no_grad():
            hits = {}
            for size in range(1, len(others) + 1):
                hits = {S: predict(S) for S in combinations(others, size) if predict(S) != predict(())}
                if hits:
                    break
        assert {tuple(found.positions) for found in results[0].found} == {*hits}
        for found in results[0].found:
            number = hits[tuple(found.positions)]
            assert found.prediction == (f"LABEL_{number}" if row is None else names.get(number, str(number)))
        assert results[0].forwards == results[0].tested + 1


@pytest.mark.parametrize(("kind", "target"), [("masked", 3), ("next", 7), ("next", 5)])
def test_the_prediction_is_put_in_where_attention_is_read(kind, target):
    model = random_model(kind, 1)
    ids, _, row = asked(kind, target)
    with torch.no_grad():
        predicted = int(model.eval()(ids).logits[0, row].argmax())
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    explained = explain_text(model, inputs, TOKENS, target=target, replacement=MASK, cut=0.3, max_size=1)
    read = torch.cat([ids, ids[:, :1]], 1) if kind == "next" else ids.clone()
    read[0, target] = predicted
    found = discover_text(model, {"input_ids": read}, [str(n) for n in range(read.shape[1])], cut=0.3, draws=1)
    joined = {a for head in found.heads for a in head.found.pag.adjacent(target)}
    assert (
        explained.adjacent == len(joined) and explained.tested == len(joined) and len(explained.tokens) == len(read[0])
    )
    plain = explain_text(model, inputs, TOKENS, target=target, replacement=MASK, cut=0.3, abduct=False)
    assert plain.target == row and plain.prediction == explained.prediction
    assert all(row not in found.positions for found in plain.found)


def test_special_tokens_are_in_no_set_and_heads_are_chosen():
    model = random_model("class", 2)
    options = {"replacement": MASK, "special": ["^", "b", "f"], **WHOLE}
    explained = explain_text(model, {"input_ids": IDS}, TOKENS, heads=[1], layer=0, **options)
    assert explained.adjacent == 4 and explained.heads == [1] and explained.layer == 0
    assert all({2, 6}.isdisjoint(found.positions) for found in explained.found)


def test_a_tokenizer_names_and_replaces():
    tokenizer = SimpleNamespace(
        mask_token_id=None, pad_token_id=MASK, all_special_tokens=["f"], convert_ids_to_tokens=lambda n: f"<{n}>"
    )
    explained = explain_text(random_model("next"), {"input_ids": IDS}, TOKENS, tokenizer=tokenizer, **WHOLE)
    assert explained.replacement == MASK and explained.tokens[-1] == explained.prediction and explained.target == T
    assert explained.prediction.startswith("<") and explained.adjacent == 6
    tokenizer.mask_token_id = 3
    mine, masked = (
        explain_text(random_model("next"), {"input_ids": IDS}, TOKENS, tokenizer=tokenizer, replacement=x, **WHOLE)
        for x in (7, None)
    )
    assert mine.replacement == 7 and masked.replacement == 3
    silent = explain_text(random_model("next"), {"input_ids": IDS}, TOKENS, replacement=7, heads=[0], cut=0.999)
    assert not silent.found and "no set of tokens" in table(silent)[2]
    assert json.loads(silent.to_json())["found"] == []


def test_a_set_is_replaced_at_its_positions():
    rows = []

    def choose(ids):
        rows.extend(ids.tolist())
        return ids.sum(1)

    tester = Replacement(choose, torch.tensor([3, 4, 5]), 0, positions=[0, 2])
    assert tester([(0,), (0, 1), ()], 1) == [True, True, False]
    assert rows == [[3, 4, 5], [0, 4, 5], [0, 4, 0], [3, 4, 5]]
    assert tester.after == {(): 12, (0,): 9, (0, 1): 4} and tester.forwards == 2


def refused(kind, **arguments):
    arguments = {"inputs": {"input_ids": IDS}, "tokens": TOKENS, "replacement": MASK, "cut": 0.2} | arguments
    explain_text(random_model(kind), arguments.pop("inputs"), arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("next", {"target": 8}, r"target must lie in 1…7, got 8"),
        ("next", {"target": 0}, r"target must lie in 1…7, got 0"),
        ("masked", {"target": -1}, r"target must lie in 0…6, got -1"),
        ("masked", {}, "target must be given for a masked model"),
        ("class", {"target": 7}, r"target must lie in 0…6, got 7"),
        ("masked", {"target": 6, "special": ["f"]}, "target must not be a special token, got 'f' at 6"),
        ("class", {"replacement": None}, "replacement must be given"),
        ("class", {"inputs": {"input_ids": IDS.repeat(2, 1)}}, r"one sequence of its tokens, \[1, 7\], got \[2, 7\]"),
        ("class", {"tokens": TOKENS[1:]}, r"one sequence of its tokens, \[1, 6\], got \[1, 7\]"),
        ("class", {"inputs": {"input_ids": IDS, "attention_mask": (IDS > 5).long()}}, "inputs must be without padding"),
        ("class", {"inputs": {"inputs_embeds": IDS}}, "inputs must hold input_ids"),
        ("class", {"heads": [2]}, r"heads must be different numbers from 0 to 1, got \[2\]"),
        ("class", {"heads": [0, 0]}, r"heads must be different numbers from 0 to 1, got \[0, 0\]"),
        ("class", {"heads": []}, r"heads must be different numbers from 0 to 1, got \[\]"),
        ("class", {"replacement": VOCAB}, f"replacement must be an id in 0…{VOCAB - 1}, got {VOCAB}"),
        ("class", {"replacement": -1}, f"replacement must be an id in 0…{VOCAB - 1}, got -1"),
        # it reads the last token that is no padding, which a replaced one may be
        ("last class", {"target": 5}, r"target must lie in 6…6, got 5"),
        ("class", {"layer": 5}, "layers must be among"),
        ("class", {"special": TOKENS}, "a graph needs at least 2 tokens, got 1"),
        ("class", {"n": 10}, "cut"),
    ],
)
def test_what_does_not_fit_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        refused(kind, **arguments)


def test_the_token_that_follows_needs_room():
    model = t.GPT2LMHeadModel(t.GPT2Config(**GPT2 | {"n_positions": T}))
    with pytest.raises(ValueError, match=f"must find room after the text, got {T + 1} tokens and {T} places"):
        explain_text(model, {"input_ids": IDS}, TOKENS, replacement=MASK, cut=0.2)
    assert explain_text(model, {"input_ids": IDS}, TOKENS, replacement=MASK, abduct=False, **WHOLE).target == T - 1
    assert explain_text(model, {"input_ids": IDS}, TOKENS, target=T - 1, replacement=MASK, **WHOLE).target == T - 1


def test_progress_counts_sets():
    told = []
    explained = explain_text(
        random_model("next"), {"input_ids": IDS}, TOKENS, replacement=MASK, batch=2, max_size=2,
        progress=lambda *x: told.append(x), **WHOLE,
    )  # fmt: skip
    done, totals = zip(*told, strict=True)
    assert done[-1] == totals[-1] == explained.tested and list(done) == sorted(done)


def test_models_that_predict_neither_tokens_nor_a_class():
    single = t.BertForSequenceClassification(t.BertConfig(**BERT | {"num_labels": 1}))
    with pytest.raises(NotImplementedError, match="logits must be of several classes, got 1 of BertForSequence"):
        explain_text(single, {"input_ids": IDS}, TOKENS, replacement=MASK, cut=0.2)
    for arguments, message in [
        ({"target": 2.5}, "target must be a position, got 2.5"),
        ({"special": "ab"}, "special must be a collection of tokens"),
        ({"inputs": {"input_ids": IDS.tolist()}}, "input_ids must be a tensor, got list"),
    ]:
        with pytest.raises(TypeError, match=message):
            refused("class", **arguments)
    options = {"replacement": MASK, "cut": 0.2}
    with pytest.raises(TypeError, match="model must return logits, got BertModel"):
        explain_text(t.BertModel(t.BertConfig(**BERT)), {"input_ids": IDS}, TOKENS, **options)
    tagger = t.BertForTokenClassification(t.BertConfig(**BERT))
    with pytest.raises(NotImplementedError, match="logits must be of tokens or of a class, got BertForTokenClass"):
        explain_text(tagger, {"input_ids": IDS}, TOKENS, **options)
    with pytest.raises(TypeError, match="inputs must map names to tensors"):
        explain_text(tagger, IDS, TOKENS, **options)

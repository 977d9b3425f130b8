"""The study of explanations: a model that follows the rule exactly, its searches, its splits, its tables."""

from itertools import combinations
from types import SimpleNamespace

import explanations as study
import numpy as np
import pytest
import torch
from explained import (
    ANSWER,
    ASK,
    CONTEXT,
    FILLER,
    ITEMS,
    MASK,
    NONE,
    WORDS,
    A,
    B,
    Case,
    Explained,
    answer,
    causes,
    gpt2,
    history,
    links,
    question,
)  # fmt: skip
from reviews import ADJECTIVES, NOUNS, SPLITS, TEMPLATES, review

from causalattn.discovery import PAG, discover


def asks(context, places):
    return Case(torch.tensor([*context, ASK]), [*range(CONTEXT)], frozenset(places), [MASK])


def ruled():
    """A model that answers by the rule."""

    def logits(case, input_ids):
        answers = [answer(ids[:-1].numpy()) for ids in input_ids]
        return torch.nn.functional.one_hot(torch.tensor(answers), WORDS).float()

    return SimpleNamespace(logits=logits, replacement=MASK)


def random_model(seed=0):
    model = gpt2(WORDS, seed).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return Explained(model, -1, MASK, [], [], 0.0)


def whole(T):
    """A discovery in which every token has an edge to every other."""
    found = discover(torch.eye(T, dtype=torch.float64), cut=0.5)
    return found._replace(pag=PAG(1 - np.eye(T, dtype=int)))


def test_the_rule():
    filler = [FILLER] * CONTEXT
    assert answer(np.array(filler)) == NONE
    assert answer(np.array([A + 2, *filler[1:]])) == ANSWER + 3
    assert answer(np.array([A + 2, A + 2, *filler[2:]])) == ANSWER + 3
    assert answer(np.array([A + 2, B + 3, *filler[2:]])) == ANSWER + (3 + 4) % 5
    assert answer(np.array([MASK, B + 3, *filler[2:]])) == ANSWER + 4


def test_where_the_rule_is_followed_every_search_finds_the_causes():
    rng = np.random.default_rng(0)
    sizes = []
    for number in range(30):
        context, places = question(rng)
        case = asks(context.tolist(), places)
        asked = study.Asked(ruled(), case)
        twice = len(places) == 2 and len({*context[places].tolist()}) == 1
        least = 2 if twice else 1
        scores = rng.random(CONTEXT)
        founds = [
            study.exhaustive(asked, case.positions),
            asked.until(study.by_size(case.positions, scores)),
            study.cleann(asked, [*case.positions, CONTEXT], [whole(CONTEXT + 1)]),
        ]
        for found in founds:
            assert len(found.positions) == least and case.causes >= {*found.positions}, number
        assert founds[0][:2] == founds[2][:2] and founds[0].tested == founds[2].tested
        best = asked.until(study.growing(case.positions, np.isin(np.arange(CONTEXT), places) * 1.0))
        assert len(best.positions) == least == best.tested
        sizes.append(least)
    assert {*sizes} == {1, 2}


def test_sets_come_by_size_and_then_by_score():
    scores = np.array([0.1, 0.5, 0.2, 0.15])
    positions = [3, 4, 6, 9]
    score = dict(zip(positions, scores.tolist(), strict=True))
    sets = [*study.by_size(positions, scores)]
    assert len(sets) == len({*sets}) == 4 + 6 + 4 and sets[0] == (4,) and sets[4] == (4, 6)
    keys = [(len(each), -sum(score[t] for t in each)) for each in sets]
    assert keys == sorted(keys)
    assert [*study.growing(positions, scores)] == [(4,), (4, 6), (4, 6, 9), (3, 4, 6, 9)]


def test_only_sets_that_the_graph_connects_are_tested():
    marks = np.zeros((CONTEXT + 1, CONTEXT + 1), int)
    marks[2, CONTEXT] = marks[CONTEXT, 2] = 1
    graph = whole(CONTEXT + 1)._replace(pag=PAG(marks))
    context = [FILLER] * CONTEXT
    context[5] = A
    asked = study.Asked(ruled(), asks(context, [5]))
    assert study.cleann(asked, [*range(CONTEXT + 1)], [graph]) == (None, 1, 1)


def test_gradients_are_slopes():
    model, case = random_model(), asks(range(FILLER, FILLER + CONTEXT), [0])
    predicted = 5
    x = model.model.get_input_embeddings()(case.ids[None]).detach()
    D, step = x.shape[-1], 1e-5
    bumps = torch.eye(D, dtype=x.dtype) * step
    for t in (0, 7):
        there, back = x.repeat(D, 1, 1), x.repeat(D, 1, 1)
        there[:, t] += bumps
        back[:, t] -= bumps
        up, down = (model.logits(case, inputs_embeds=each)[:, predicted].detach() for each in (there, back))
        expected = ((up - down) / (2 * step) * x[0, t]).norm()
        assert study.gradient(model, case, predicted)[t] == pytest.approx(float(expected), rel=1e-5)


def test_what_is_read():
    model, case = random_model(), asks(range(FILLER, FILLER + CONTEXT), [0])
    whole_text = torch.cat([case.ids, torch.tensor([7])])
    model.model.set_attn_implementation("eager")
    attentions = model.model(whole_text[None], output_attentions=True).attentions[-1][0].mean(0)
    placed = study.read(model, case, 7, True)
    assert placed.positions == [*range(CONTEXT), CONTEXT + 1]
    np.testing.assert_allclose(placed.row(), attentions[-1, :CONTEXT].detach(), atol=1e-6)
    before = study.read(model, case, 7, False)
    assert before.positions == [*range(CONTEXT), CONTEXT]
    np.testing.assert_allclose(before.row(), attentions[-2, :CONTEXT].detach(), atol=1e-6)
    for graphs in (placed.graphs(0.2), placed.null_graphs(0.2, 0)):
        assert [len(graph.pag.names) for graph in graphs] == [CONTEXT + 1] * 4


def test_the_cut_of_fewest_tests_among_those_that_find_enough():
    hit, miss = (lambda tests: study.Found((1,), tests, tests)), study.Found(None, 2, 2)
    hits = {0.1: [hit(9)] * 10, 0.2: [hit(5)] * 9 + [miss], 0.3: [hit(1)] * 8 + [miss] * 2}
    assert study.choose_cut(hits, 10) == 0.2
    assert study.choose_cut(hits, 8) == 0.3
    assert study.choose_cut({0.1: [miss], 0.2: [miss]}, 0) in (0.1, 0.2)
    assert study.choose_cut({0.2: [hit(3)], 0.3: [miss]}, 9) == 0.2


def test_histories_and_what_leads_to_an_item():
    after = links(3)
    assert sorted(after[1:].tolist()) == [*range(1, ITEMS + 1)] and all(after[i] != i for i in range(1, ITEMS + 1))
    rng = np.random.default_rng(1)
    for _ in range(20):
        items = history(rng, after, 11)
        assert len({*items}) == 11 and all(1 <= i <= ITEMS for i in items)
    leads = int(np.flatnonzero(after == 8)[0])
    others = [i for i in range(13, ITEMS + 1) if i != leads][:3]
    assert causes([leads, 9, *others], 8, after) == {0, 1}


def test_splits_share_neither_templates_nor_words():
    for one, other in combinations(SPLITS, 2):
        assert {*TEMPLATES[one]}.isdisjoint(TEMPLATES[other]) and {*NOUNS[one].split()}.isdisjoint(NOUNS[other].split())
        words = [{word for words in ADJECTIVES[split].values() for word in words.split()} for split in (one, other)]
        assert words[0].isdisjoint(words[1])
    rng = np.random.default_rng(0)
    for _ in range(50):
        words, says, decide = review(rng, "test")
        adjectives = {word: polarity for polarity, text in ADJECTIVES["test"].items() for word in text.split()}
        shown = {adjectives[words[t]] for t in decide if words[t] != "not"}
        turned = any(words[t] == "not" for t in decide) and says
        assert shown == {says if not turned else 3 - says}


def test_rows_tables_and_the_figure(monkeypatch):
    monkeypatch.setattr(study, "CUTS", (0.1, 0.3))
    model, rng = random_model(), np.random.default_rng(2)
    rows = []
    for number in range(2):
        context, places = question(rng)
        cuts = {study.CLEANN: 0.1, study.BEFORE: 0.1}
        rows += [{"seed": 0, "case": number, "accuracy": 0.5} | row for row in study.rows_of(
            model, asks(context.tolist(), places), cuts, number
        )]  # fmt: skip
    found = {(row["case"], row["method"]): row for row in rows if "method" in row}
    for number in range(2):
        least = found[number, study.EXHAUSTIVE]["size"]
        for method in study.SEARCHES:
            assert found[number, method]["size"] == least
        for method in study.METHODS:
            row = found[number, method]
            assert not row["gap"] < 0 and row["first"] <= row["tested"] and row["rank"] != 1
        at_cut = next(r for r in rows if r.get("graph") == "graphs" and r["cut"] == 0.1 and r["case"] == number)
        assert at_cut["first"] == found[number, study.CLEANN]["first"]
    rows = [{"task": task} | row for task in study.TASKS for row in rows]
    made = study.tables(rows)
    assert len(made) == 4 and len(made[0].rows) == len(study.METHODS) and len(made[3].rows) == 6
    assert len(study.draw(rows).png()) > 5000

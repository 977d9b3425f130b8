"""What the studies of text measure, each held to a second way of computing it or to what must come out."""

import itertools
import math

import embeddings
import layers
import minilm
import near_tokens
import numpy as np
import pytest
import torch
from minilm import attention, correlations, hidden, last_call, sentence, sentences, trained, untrained
from ranks import Pairs, correlated, ranked
from skeletons import above, agreements, chance_f1, f1
from systems import System, random_system

import causalattn as ca
from causalattn.discovery import discover
from causalattn.partial_corr import partial_correlation


@pytest.fixture(scope="module")
def encoder():
    return trained()


@pytest.fixture(scope="module")
def text(encoder):
    return sentence(encoder, "The captain saw the dark rocks before his crew did.")


def test_sentences_are_whole_and_untrained_models_repeat(encoder):
    found = sentences(encoder)
    assert len(found) == 20 and all(10 <= len(each.words) <= 29 for each in found)
    ids = found[0].inputs["input_ids"][0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids[[0, -1]]) == ["[CLS]", "[SEP]"]
    assert len(found[0].words) == len(ids) - 2
    one, same, other = (untrained(encoder, seed).model.embeddings.word_embeddings.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_chance_is_the_mean_over_all_placements():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(7) < 0.5, rng.random(7) < 0.4
    classes = np.array([1, 1, 1, 1, 2, 2, 2])

    def placements(within):
        for moved in itertools.product(*(set(itertools.permutations(theirs[part])) for part in within)):
            placed = np.zeros(7, bool)
            for part, values in zip(within, moved, strict=True):
                placed[part] = values
            yield f1(ours, placed)

    everywhere = np.mean(list(placements([np.arange(7)])))
    by_class = np.mean(list(placements([np.arange(4), np.arange(4, 7)])))
    assert math.isclose(chance_f1(ours, theirs), everywhere)
    assert math.isclose(chance_f1(ours, theirs, classes), by_class)
    assert f1(ours, ours) == 1 and f1(ours, ~ours) == 0 and f1(ours & ~ours, ours & ~ours) == 1


def test_agreements_are_those_of_single_heads():
    rng = np.random.default_rng(1)
    edges, classes = rng.random((2, 3, 10)) < 0.4, np.repeat([1, 2, 3, 4], [4, 3, 2, 1])
    edges[0, 0] = False
    found = {row["layers"]: row for row in agreements(edges, classes)}
    assert [*found] == [(0, 0), (0, 1), (1, 1)]
    for (a, b), row in found.items():
        heads = [(x, y) for x in range(3) for y in range(3) if a != b or x != y]
        pairs = [(edges[a, x], edges[b, y]) for x, y in heads]
        assert math.isclose(row["f1"], np.mean([f1(*pair) for pair in pairs]))
        assert math.isclose(row["chance"], np.mean([chance_f1(*pair) for pair in pairs]))
        assert math.isclose(row["chance by class"], np.mean([chance_f1(*pair, classes) for pair in pairs]))


def test_decisions_at_order_one():
    A = torch.rand(5, 9, dtype=torch.float64)
    R = ca.dense.correlation(A)
    tests = [(i, j, k) for k in range(5) for i, j in itertools.combinations(range(5), 2) if k not in (i, j)]
    one_by_one = [float(partial_correlation(R, i, j, [k]).r) for i, j, k in tests]
    np.testing.assert_allclose(embeddings.first_order(R), one_by_one, rtol=1e-10)
    twins = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]], dtype=torch.float64)
    assert np.isinf(embeddings.first_order(twins)).sum() >= 2
    assert embeddings.strongest(np.array([0.1, np.inf, 0.3, 0.2]), 2).tolist() == [False, True, True, False]
    ours, theirs = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert embeddings.equal(ours, theirs) == (0.5, 0.5) and embeddings.equal(ours, ours)[0] == 1


def test_uncorrelated_values_make_embeddings_of_the_attention():
    A = torch.rand(6, 8, dtype=torch.float64).softmax(-1)
    V = 3 * torch.linalg.qr(torch.randn(8, 12, dtype=torch.float64).T).Q.T
    ours, theirs = embeddings.Graphs(ca.dense.correlation(A)), embeddings.Embedding.of(A @ V)
    (row,) = embeddings._beside("model", ours, {"Z": theirs})
    assert math.isclose(row["r"], 1) and row["equal 1"] == row["half 0"] == row["f1 0.376"] == row["f1 of size"] == 1


def test_outputs_are_those_of_the_value_aware_correlation(encoder, text):
    call = last_call(encoder, text)
    Z = attention(call, text.words) @ call.v[0].double()
    ours = torch.stack([ca.dense.correlation(each) for each in Z])
    torch.testing.assert_close(ours, correlations(call, text.words, v=call.v), atol=1e-5, rtol=0)


def rank_correlation(x, y):
    """Spearman's, ranks by counting who is below."""
    return np.corrcoef(*((each[:, None] > each).sum(1) + (each[:, None] == each).sum(1) / 2 for each in (x, y)))[0, 1]


def test_ranks():
    rng = np.random.default_rng(2)
    wanted, score = rng.random((7, 7)), np.round(rng.random((7, 7)), 1)
    apart = np.abs(np.subtract.outer(range(7), range(7)))
    x, y, far = above(score), above(wanted), above(apart)
    found = Pairs(wanted).foretold(score)
    assert math.isclose(found["rank"], rank_correlation(x, y))
    a, b, c = rank_correlation(x, y), rank_correlation(x, far), rank_correlation(y, far)
    assert math.isclose(found["rank, given distance"], (a - b * c) / math.sqrt((1 - b * b) * (1 - c * c)))
    assert Pairs(wanted).foretold(np.ones((7, 7)))["rank"] == 0
    assert Pairs(wanted).foretold(-apart)["rank, given distance"] == 0
    off = ~np.eye(7, dtype=bool)
    directed = Pairs(wanted, directed=True).foretold(score)
    assert math.isclose(directed["rank"], rank_correlation(score[off], wanted[off])) and directed != found
    assert ranked(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize("directed", [False, True])
def test_given_tokens_only_pairs_are_left(directed):
    rng = np.random.default_rng(3)
    pairs = Pairs(rng.random((6, 6)), directed=directed)
    left, right = rng.random((2, 6))
    of_words = np.add.outer(left, right if directed else left)[pairs.at]
    assert correlated(of_words, pairs.wanted, pairs.bases[2]) == 0 != correlated(of_words, pairs.wanted, pairs.bases[1])
    of_pairs = rng.random(len(of_words))
    mixed = [correlated(of_pairs + n * of_words, pairs.wanted, pairs.bases[2]) for n in (0, 5)]
    assert math.isclose(*mixed, rel_tol=1e-9) and mixed[0] != 0


def test_removal_is_one_forward_pass_a_word(encoder, text):
    effect = layers.removal(encoder, text)
    j = 3
    ids = text.inputs["input_ids"].clone()
    ids[0, text.words[j]] = encoder.tokenizer.mask_token_id
    before, after = (hidden(encoder, x)[0, text.words] for x in (text.inputs, text.inputs | {"input_ids": ids}))
    wanted = 1 - torch.cosine_similarity(before, after, dim=-1).numpy()
    wanted[j] = 0
    np.testing.assert_allclose(effect[:, j], wanted, atol=1e-5)
    assert effect.shape == (len(text.words),) * 2 and not effect.diagonal().any() and effect.max() > 0.01


def test_special_tokens_keys_are_left_out(encoder, text):
    call = last_call(encoder, text)
    whole = attention(call, text.words)
    A = whole[3][:, text.words].numpy()
    rows = A / np.linalg.norm(A, axis=1, keepdims=True)
    found = layers.among_words(A)
    np.testing.assert_allclose(found["R, words' keys"], rows @ rows.T, atol=1e-12)
    with_all = layers.read(whole[3], correlations(call, text.words)[3], text.words)
    np.testing.assert_array_equal(with_all["A"], A)
    assert np.abs(with_all["R"] - found["R, words' keys"]).max() > 0.1
    np.testing.assert_array_equal(with_all["A + Aᵀ"], A + A.T)


def test_what_is_chosen_never_saw_the_sentences_it_is_read_on():
    first, last = layers.split(range(19))
    assert not first & last and first | last == {*range(19)} and len(first) == 9
    at = {"kind": "effect", "source": "model"}
    rows = [
        at | {"layer": layer, "head": head, "score": "R", "sentence": n, "rank": layer == (2 if n in first else 1)}
        for layer in range(3) for head in range(2) for n in range(19)
    ]  # fmt: skip
    assert layers.choose(rows, "model", ["R"], first)[0] == 2 and layers.choose(rows, "model", ["R"], last)[0] == 1


def test_excess_over_null_maps():
    def heads(*counts):
        found = []
        for count in counts:
            matrix = np.zeros((4, 4))
            matrix[np.triu_indices(4, 1)] = np.arange(6) < count
            found.append({f"edge {cut}": matrix for cut in layers.PUBLISHED})
        return found

    row = next(layers.excess(heads(5, 3), [heads(1, 3), heads(2, 4)]))
    assert row["edges"] == 4 and row["null"] == 2.5 and math.isclose(row["z"], (8 - 5) / math.sqrt(2 + 2))


def test_a_copy_has_the_correlations_of_one():
    system = random_system(np.random.default_rng(0), 6)
    R = near_tokens.with_copy(system, system.observed[2], 0.3).correlations()
    T = len(system.observed)
    np.testing.assert_allclose(R[:T, :T], system.correlations())
    np.testing.assert_allclose(R[T, :T], R[2, :T] / math.hypot(1, 0.3), atol=1e-12)
    # y = x + u, so r(x, y | x') = √v / √(1 + v), v = the variance that x' leaves of x
    chain = near_tokens.with_copy(System(np.array([[0, 1.0], [0, 0]]), [0, 1]), 0, 0.2)
    v = 0.2**2 / (1 + 0.2**2)
    left = float(partial_correlation(torch.from_numpy(chain.correlations()), 0, 1, [2]).r)
    assert math.isclose(left, math.sqrt(v / (1 + v)), rel_tol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_cost_nothing_exactly_and_then_everything(seed, monkeypatch):
    sharp, dull = near_tokens.CUTS[0], near_tokens.CUTS[2]
    monkeypatch.setattr(near_tokens, "CUTS", (sharp, dull))
    monkeypatch.setattr(near_tokens, "NOISES", (0.1, 1e-3, 1e-7))
    rows = {(row["cut"], row["noise"]): row for row in near_tokens.of_system(seed)}
    for noise in ("none", 0.1, 1e-3):
        row = rows[sharp, noise]
        assert row["f1"] == row["inner f1"] == row["kept"] == 1 and row["singular"] == 0
    assert rows[dull, 1e-3]["kept"] == 0 and rows[dull, 1e-3]["edge"] == 1
    # one that tests cannot tell apart is merged: it has its twin's edges
    merged = rows[sharp, 1e-7]
    assert merged["singular"] > 0 and merged["stolen"] == merged["kept"] == merged["inner f1"] == 1 > merged["f1"]


def test_moving_an_embedding(encoder, text):
    a, b = near_tokens.pairs(np.random.default_rng(0), encoder, text)[0]
    assert b - a >= near_tokens.APART
    away = encoder.tokenizer.convert_tokens_to_ids("storm")
    still = near_tokens.moved(encoder, text, a, b, 0.0, "word", away)
    torch.testing.assert_close(hidden(encoder, still.inputs), hidden(encoder, text.inputs))
    replaced = text.inputs["input_ids"].clone()
    for move, word in (("word", replaced[0, a].item()), ("elsewhere", away)):
        replaced[0, b] = word
        whole = near_tokens.moved(encoder, text, a, b, 1.0, move, away)
        wanted = hidden(encoder, text.inputs | {"input_ids": replaced})
        torch.testing.assert_close(hidden(encoder, whole.inputs), wanted, atol=1e-5, rtol=0)
    twins = last_call(encoder, near_tokens.moved(encoder, text, a, b, 1.0, "word and place", away))
    rows = [int((text.words == t).nonzero()) for t in (a, b)]
    R = correlations(twins, text.words)
    assert (R[:, rows[0], rows[1]] > 1 - 1e-9).all()
    graphs = [discover(each, cut=0.093, max_order=1) for each in R]
    assert all(graph.pag.skeleton[rows[0], rows[1]] for graph in graphs)


def test_what_changed():
    found, empty = (discover(R, cut=0.1) for R in (ca.dense.correlation(torch.rand(8, 30), center=True), torch.eye(8)))
    same = near_tokens._changed(found, found, 1, 4)
    assert (same["at them"], same["others"], same["joined"]) == (1, 1, 0)
    around = near_tokens._around(found, 1, 4)
    degrees = [len({*found.pag.adjacent(x)} - {1, 4}) for x in (1, 4)]
    assert around["neighbours"] == sum(degrees) / 2 > 0 and around["edge"] == found.pag.skeleton[1, 4]
    grown = near_tokens._changed(empty, found, 1, 4)
    assert (
        grown["joined"] == sum(degrees) / 12 and grown["at them"] == grown["others"] == grown["others by chance"] == 0
    )


@pytest.mark.parametrize("study", [embeddings, near_tokens, layers])
def test_a_quick_run_makes_tables_and_a_figure(study, encoder, monkeypatch):
    few = sorted(sentences(encoder), key=lambda each: len(each.words))[: 1 if study is embeddings else 2]
    small = {"trained": lambda: encoder, "sentences": lambda encoder: few, "GRID": (0.093, 0.2)}
    small |= {"SHARES": (0.0, 1.0), "NOISES": (1.0, 1e-7), "MAX_ORDER": 1, "SYSTEMS": 2}
    for module in (study, minilm):
        for name in small.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, small[name])
    told = []
    rows = study.STUDY.measure(True, lambda *x: told.append(x))
    assert told[-1][0] == told[-1][1]
    for table in study.STUDY.tables(rows):
        assert table.rows and len({tuple(row) for row in table.rows}) == 1
    assert len(study.STUDY.draw(rows).png(dpi=40)) > 3000

"""What the study of trained transformers measures, held to closed forms, counts by hand and planted answers."""

from itertools import combinations

import numpy as np
import pytest
import torch
from masked_model import BINS, CENTRES, MASK, accuracy, ceiling, coded, majority, masked, model_of, trained, world
from trained_transformer import (
    CUTS,
    STUDY,
    Size,
    chosen,
    correlated,
    edge_f1,
    edges_of,
    followed,
    held_f1,
    maps,
    null_f1,
    p_value,
    random_f1,
    ranked,
    references,
    searched,
    shuffled_f1,
)

from causalattn.discovery import PAG, compare, discover
from causalattn.discovery.nulls import NULLS

TINY = Size(1, (0, 3), 400, 60, 1, 1, 4, 5)


def skeletons(rng, *shape, T=6, density=0.4):
    upper = np.triu(rng.random((*shape, T, T)) < density, 1)
    return upper | upper.swapaxes(-1, -2)


def gaussian_ceiling(rho):
    """The share of eighths named from one correlated normal, by a sum over a fine grid of what is known."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    known = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    ends = normal.icdf(torch.arange(BINS + 1, dtype=torch.float64) / BINS)
    mass = normal.cdf((ends - rho * known[:, None]) / (1 - rho**2) ** 0.5).diff(dim=-1).amax(-1)
    weight = normal.log_prob(known).exp()
    return float((mass * weight).sum() / weight.sum())


@pytest.mark.parametrize("rho", [0.0, 0.6, -0.95])
def test_the_ceiling_is_the_best_predictors_share(rho):
    rng = np.random.default_rng(0)
    R = np.array([[1, rho], [rho, 1]])
    n = 20000
    got = ceiling(R, torch.from_numpy(rng.multivariate_normal([0, 0], R, n)))
    expected = gaussian_ceiling(rho)
    assert abs(got - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_predictors_stay_below_the_ceiling():
    drawn = world(0, 4000, 4000)
    known = references(drawn)
    assert known["majority"] < 0.2 < known["ceiling"]
    # the best guess from the nearest other token alone knows less than from all values
    R = drawn.system.correlations() - np.eye(len(drawn.truth.names))
    nearest = abs(R).argmax(0)
    values = CENTRES[coded(drawn.test)][:, nearest] * torch.from_numpy(R[nearest, range(len(R))])
    assert float((coded(values) == coded(drawn.test)).double().mean()) < known["ceiling"]
    tokens = coded(drawn.train)
    shares = torch.nn.functional.one_hot(tokens, BINS).double().mean(0)
    assert np.isclose(majority(tokens, tokens), float(shares.amax(-1).mean()))


def test_tokens_are_bins_of_equal_mass_and_splits_share_no_sequence():
    drawn = world(1, 4000, 300)
    counts = torch.bincount(coded(drawn.train).flatten(), minlength=BINS)
    assert len(counts) == BINS and (counts / counts.sum() - 1 / BINS).abs().max() < 0.01
    assert torch.equal(coded(CENTRES), torch.arange(BINS))
    rows = torch.cat([drawn.train, drawn.validation, drawn.test])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 4600
    again = world(1, 4000, 300)
    assert torch.equal(drawn.test, again.test) and not torch.equal(drawn.test, drawn.validation)


def test_exact_correlations_give_the_truth():
    for seed in range(4):
        drawn = world(seed, 10, 2)
        R = torch.from_numpy(drawn.system.correlations())
        assert discover(R, cut=1e-6, selection_bias=False).pag == drawn.truth


def test_masking_is_as_bert_masks():
    tokens = torch.randint(BINS, (4000, 9), generator=torch.Generator().manual_seed(1))
    inputs, labels = masked(tokens, torch.Generator().manual_seed(2))
    picked = labels >= 0
    assert torch.equal(labels[picked], tokens[picked]) and torch.equal(inputs[~picked], tokens[~picked])
    share = {"picked": picked.double().mean(), "masked": (inputs == MASK)[picked].double().mean()}
    share["kept"] = (inputs == tokens)[picked].double().mean()
    # a random token is the right one in an eighth of the cases
    expected = {"picked": 0.25, "masked": 0.8, "kept": 0.1 + 0.1 / BINS}
    for name in expected:
        assert abs(float(share[name]) - expected[name]) < 0.02


def test_edge_f1_is_that_of_compare():
    rng = np.random.default_rng(3)
    found, truth = skeletons(rng, 5), skeletons(rng)
    expected = [compare(PAG(edges.astype(int)), PAG(truth.astype(int))).f1 for edges in found]
    np.testing.assert_allclose(edge_f1(found, truth), expected)
    empty = np.zeros((4, 4), bool)
    assert edge_f1(empty, empty) == 1


def test_a_random_graph_is_the_mean_of_all():
    truth = skeletons(np.random.default_rng(4), T=4)
    pairs = list(combinations(range(4), 2))
    for m in (1, 3):
        every = np.zeros((0, 4, 4), bool)
        for edges in combinations(pairs, m):
            one = np.zeros((1, 4, 4), bool)
            for a, b in edges:
                one[0, a, b] = one[0, b, a] = True
            every = np.concatenate([every, one])
        assert np.isclose(random_f1(every, truth), edge_f1(every, truth).mean())


def test_the_choice_is_of_validation_alone():
    rng = np.random.default_rng(5)
    truth = skeletons(rng, density=0.3)
    validation, test = skeletons(rng, 3, 4, 3), skeletons(rng, 5, 4, 3)
    validation[:, 2, 1] = truth
    test[:, 0, 0] = truth
    assert chosen(validation, truth) == (2, 1)
    assert np.isclose(held_f1(validation, test, truth), edge_f1(test[:, 2, 1], truth).mean())


def test_shuffled_truths_tell_recovery_from_choice():
    rng = np.random.default_rng(6)
    truth = skeletons(rng, T=8)
    validation, test = skeletons(rng, 3, 4, 3, T=8), skeletons(rng, 5, 4, 3, T=8)
    validation[:, 1, 0] = test[:, 1, 0] = truth
    found = held_f1(validation, test, truth)
    null = shuffled_f1(validation, test, truth, rng, 40)
    assert found == 1 and null.max() < 1 and p_value(np.array(found), null) == 1 / 41
    # a complete graph is the same under any exchange, and nothing beyond it
    whole = ~np.eye(8, dtype=bool)
    validation[:], test[:] = whole, whole
    null = shuffled_f1(validation, test, truth, rng, 40)
    assert p_value(np.array(held_f1(validation, test, truth)), null) == 1


def test_rank_counts_pairs():
    truth = np.zeros((4, 4), bool)
    truth[0, 1] = truth[1, 0] = truth[2, 3] = truth[3, 2] = True
    score = np.zeros((4, 4))
    score[0, 1], score[2, 3], score[0, 2], score[1, 3] = 0.9, 0.5, 0.7, 0.5
    # 0.9 is above all 4 others; 0.5 is below one, beside one and above two
    assert ranked(score, truth) == (4 + 2.5) / 8
    assert ranked(np.stack([score, score]), truth) == (4 + 2.5) / 8


def test_correlated_is_undefined_without_change():
    assert np.isnan(correlated(np.ones(3), np.arange(3.0)))
    assert np.isclose(correlated(np.arange(3.0), -np.arange(3.0)), -1)


def test_maps_are_those_of_the_models_own_attention():
    model = model_of(6, seed=0).eval()
    model.set_attn_implementation("eager")
    tokens = torch.randint(BINS, (5, 6), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        A = model(input_ids=tokens, output_attentions=True).attentions[1].double()
    got = maps(model, tokens, 1, few=2, many=5)
    C = (A @ A.mT).numpy()
    unit = np.sqrt(np.einsum("bhtt->bht", C))
    np.testing.assert_allclose(got.A, A[:2], atol=1e-6)
    np.testing.assert_allclose(got.R, (C / unit[..., None] / unit[..., None, :])[:2], atol=1e-5)
    mean = C.mean(0)
    unit = np.sqrt(np.einsum("htt->ht", mean))
    np.testing.assert_allclose(got.mean[0], mean / unit[..., None] / unit[..., None, :], atol=1e-5)


def test_planted_attention_is_recovered_and_its_nulls_are_not():
    # token b attends itself and a, so that rows 2n and 2n + 1 alone overlap
    A = 0.6 * torch.eye(8, dtype=torch.float64)
    for n in range(0, 8, 2):
        A[n, n + 1] = A[n + 1, n] = 0.4
    truth = (A > 0).numpy() & ~np.eye(8, dtype=bool)
    unit = (A @ A.T).diagonal().sqrt()
    R = (A @ A.T / unit / unit[:, None]).expand(2, 1, 8, 8)
    edges = edges_of(searched(R))
    assert edges.shape == (2, 1, len(CUTS), 8, 8) and held_f1(edges, edges, truth) == 1
    blurred = 0.93 * A + 0.07 / 8
    for null in NULLS:
        assert null_f1(null, blurred.expand(2, 8, 8), blurred.expand(6, 8, 8), truth, 0) < 0.6


def test_training_lowers_the_loss_and_repeats():
    drawn = world(2, 600, 100)
    tokens = coded(drawn.train)

    def after(seed):
        model = model_of(tokens.shape[1], seed)
        loss = [
            float(model(input_ids=tokens, labels=tokens).loss.detach()) for _ in trained(model, tokens, (0, 12), seed)
        ]
        return loss, accuracy(model, coded(drawn.test))

    (before, later), named = after(1)
    assert later < before and 0 <= named <= 1
    assert ((before, later), named) == (tuple((again := after(1))[0]), again[1])
    assert after(2)[0] != [before, later]


def test_the_study_runs_whole(monkeypatch):
    monkeypatch.setattr("trained_transformer.CUTS", (0.376,))
    rows = list(followed(3, TINY, lambda: None))
    assert [(row["step"], row["layer"]) for row in rows] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert all(0 <= row["f1"] <= 1 and len(row["shuffled"]) == 5 and row["cut"] == 0.376 for row in rows)
    both = rows + [row | {"model": 4, "f1": row["f1"] / 2} for row in rows]
    for table in STUDY.tables(both):
        assert len({tuple(row) for row in table.rows}) == 1 and not any("|" in head for head in table.rows[0])
    assert STUDY.draw(both).png().startswith(b"\x89PNG")

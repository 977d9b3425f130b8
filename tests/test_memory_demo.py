"""Images in two Hopfield networks: what the theory makes certain of them, and the command that shows it."""

import importlib.util
import io
import json

import pytest
import torch
from matplotlib.image import imread

from causalattn import cli, hopfield_certificate, hopfield_retrieve
from causalattn.memory_demo import (
    BETA,
    PERCENT,
    PIXELS,
    SIDE,
    SIGNS,
    TOLERANCE,
    compare_memories,
    draw_signs,
    table,
    verdict,
)
from causalattn.plot.hopfield import draw_memory


@pytest.fixture(scope="module")
def result():
    return compare_memories(trials=8)


@pytest.fixture(scope="module")
def full():
    """All the signs, on few trials."""
    return compare_memories(len(SIGNS), trials=2)


def refused(capsys, *options):
    assert cli.main(["demo", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n")
    last = err.splitlines()[-1]
    assert last.startswith("causalattn: error: ")
    return last.removeprefix("causalattn: error: ")


def test_the_images_are_distinct_spins():
    X = draw_signs(len(SIGNS))
    assert X.shape == (len(SIGNS), PIXELS) and (X.abs() == 1).all()
    overlaps = (X @ X.mT).fill_diagonal_(0)
    # nor is one nearly another, or its negative
    assert overlaps.abs().max() < 0.75 * PIXELS
    assert (X == 1).sum(1).min() > PIXELS / 4 and torch.equal(draw_signs(3), X[:3])


def test_the_images_stand_upright():
    X = dict(zip(SIGNS, draw_signs(len(SIGNS)).unflatten(1, (SIDE, SIDE)), strict=True))
    ink = {name: (image > 0).double() for name, image in X.items()}
    assert ink["triangle"][: SIDE // 2].sum() < ink["triangle"][SIDE // 2 :].sum()
    assert ink["arrow"][: SIDE // 2].sum() > ink["arrow"][SIDE // 2 :].sum()
    assert ink["moon"][:, : SIDE // 2].sum() > ink["moon"][:, SIDE // 2 :].sum()
    assert ink["stripes"].var(1).max() == 0 and ink["bars"].var(0).max() == 0


def test_every_image_is_damaged_as_its_table_says(result):
    for recall in result.recalls:
        assert recall.wrong == (recall.damaged != recall.stored).sum()
    *flipped, hidden = result.recalls
    assert {recall.wrong for recall in flipped} == {PIXELS // 4}
    assert len({tuple((recall.damaged != recall.stored).flatten().tolist()) for recall in flipped}) == len(flipped)
    half = SIDE // 2
    assert torch.equal(hidden.damaged[:half], hidden.stored[:half]) and (hidden.damaged[half:] == -1).all()


def test_no_step_climbs(full):
    for recall in full.recalls:
        for descent in (recall.classical, recall.modern):
            energies = torch.tensor(descent.energies, dtype=torch.float64)
            assert len(energies) > descent.steps and energies[0] > energies[-1]
            assert (energies.diff() <= 1e-12 * energies.abs().max()).all()
        # a spin that turns lowers E, and so does an update by half its length squared
        assert (torch.tensor(recall.classical.energies).diff() < 0).sum() == recall.classical.steps > 0
        drops = -torch.tensor(recall.modern.energies, dtype=torch.float64).diff()[: recall.modern.steps]
        assert len(drops) > 0 and drops.min() > TOLERANCE**2 / 2


def test_energies_begin_and_end_with_those_of_the_states(result):
    X = draw_signs(6)
    W = X.mT @ X / 6 - torch.eye(PIXELS, dtype=torch.float64)
    for recall in result.recalls:
        for n, image in ((0, recall.damaged), (-1, recall.classical.state)):
            xi = image.flatten()
            assert recall.classical.energies[n] == pytest.approx((-xi @ W @ xi / 2).item())
        for n, image in ((0, recall.damaged), (-1, recall.modern.state)):
            xi = image.flatten()
            lse = (BETA * (X @ xi)).logsumexp(0) - torch.tensor(6.0).log()
            assert recall.modern.energies[n] == pytest.approx((xi @ xi / 2 + PIXELS / 2 - lse / BETA).item())


def test_classical_states_are_where_no_spin_turns(full):
    X = draw_signs(len(SIGNS))
    for recall in full.recalls:
        xi = recall.classical.state.flatten()
        field = (X @ xi) @ X - len(X) * xi
        assert (field * xi >= 0).all()
        assert recall.classical.wrong == (xi != recall.stored.flatten()).sum()


def test_modern_states_are_where_no_update_leads_away(full):
    X = draw_signs(len(SIGNS))
    ended = torch.stack([recall.modern.state.flatten() for recall in full.recalls])
    assert hopfield_retrieve(ended, X, beta=BETA).change.max() <= TOLERANCE
    assert [recall.modern.wrong for recall in full.recalls] == [
        (xi.sign() != recall.stored.flatten()).sum() for xi, recall in zip(ended, full.recalls, strict=True)
    ]


def test_the_modern_network_keeps_what_is_certified_and_retrieves_it_from_a_quarter_flipped(full):
    X = draw_signs(len(SIGNS))
    certificate = hopfield_certificate(X, X, beta=BETA)
    # within the radius of an image every sign is the image's
    assert certificate.stored.all() and certificate.radius.max() < 1 and full.certified == len(SIGNS)
    assert full.basins[0].percent == 0 and set(full.basins[0].modern) == {1.0}
    assert [recall.modern.wrong for recall in full.recalls[:-1]] == [0] * len(SIGNS)


def test_the_classical_network_keeps_exactly_the_images_that_no_spin_leaves(full):
    X = draw_signs(len(SIGNS))
    stays = (((X @ X.mT) @ X - len(X) * X) * X >= 0).all(1)
    assert [share == 1 for share in full.basins[0].classical] == stays.tolist()
    assert 0 < stays.sum() < len(SIGNS)


def test_basins_are_shares_at_every_percentage(result):
    assert [basin.percent for basin in result.basins] == list(PERCENT) == list(range(0, 51, 5))
    for basin in result.basins:
        for shares in basin[1:]:
            assert len(shares) == 6 and all(8 * share in range(9) for share in shares)
    # an image half of whose pixels are flipped says nothing of itself
    assert sum(result.basins[-1].modern) < sum(result.basins[0].modern) == 6


def test_the_same_seed_gives_the_same_result():
    first, again, other = (compare_memories(3, trials=4, seed=seed) for seed in (1, 1, 2))
    assert first.to_json() == again.to_json()
    assert not torch.equal(first.recalls[0].damaged, other.recalls[0].damaged) and first.basins != other.basins


def test_the_table_has_a_line_for_every_image_and_percentage(result):
    lines = list(table(result))
    moon = result.recalls[4]
    cells = [moon.wrong, moon.classical.wrong, moon.classical.steps, moon.modern.wrong, moon.modern.steps]
    assert lines[6].split() == ["moon", "64", "pixels", "flipped", *map(str, cells)]
    for line, basin in zip(lines[10:21], result.basins, strict=True):
        assert line.split() == [f"{basin.percent}%", *(f"{sum(shares) / 6:.1%}" for shares in basin[1:])]
    assert lines[21:] == list(verdict(result))


def test_networks_are_counted():
    seen = []
    compare_memories(2, trials=1, progress=lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": 1}, "patterns must be from 2 to 12, got 1"),
        ({"patterns": 13}, "patterns must be from 2 to 12, got 13"),
        ({"seed": -1}, "seed must be from 0 to 2⁶³ − 1, got -1"),
        ({"seed": 2**63}, "seed must be from 0 to 2⁶³ − 1, got 9223372036854775808"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        compare_memories(**options)


def test_the_verdict_says_what_was_seen(result):
    perfect = result.basins[0]._replace(classical=(1.0,) * 6)
    assert "leaves" not in " ".join(verdict(result._replace(basins=(perfect, *result.basins[1:]))))
    lost = perfect._replace(modern=(1.0, 0.5, 1.0, 1.0, 1.0, 0.0))
    found = " ".join(verdict(result._replace(basins=(lost, *result.basins[1:]), recalls=result.recalls[:2])))
    assert "The modern one leaves ring, frame even" in found and "Of 2 damaged images" in found
    X = dict(zip(SIGNS, draw_signs(6), strict=False))
    first, second, share = result.alike
    assert share == (X[first] == X[second]).double().mean() and f"{first} and {second}" in found
    others = [(X[a] == X[b]).double().mean() for a in X for b in X if a < b]
    assert share == max(others)


@pytest.mark.parametrize("which", ["result", "full"])
def test_the_figure_can_be_drawn(which, request):
    drawing = draw_memory(request.getfixturevalue(which))
    image = imread(io.BytesIO(drawing.png(dpi=50)))
    assert image.std() > 0 and 7 <= drawing.figure.get_figwidth() <= 9


def test_the_command_prints_its_tables_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "new" / "memory.png"
    assert cli.main(["demo", "hopfield", "--patterns", "2", "--seed", "5", "--figure", str(figure)]) == 0
    out, err = capsys.readouterr()
    expected = compare_memories(2, seed=5)
    assert out.splitlines() == [*table(expected), f"wrote {figure}"] and err == ""
    names = [line.split()[0] for line in out.splitlines()[2:5]]
    assert names == ["cross", "ring", "cross"]
    assert [line.split()[0] for line in out.splitlines()[6:17]] == [f"{percent}%" for percent in PERCENT]
    assert figure.read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_command_prints_nothing_but_json(tmp_path, capsys):
    figure = tmp_path / "memory.png"
    assert cli.main(["demo", "hopfield", "--patterns", "2", "--json", "--figure", str(figure)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["names"] == ["cross", "ring"] and len(found["basins"]) == len(PERCENT)
    recall = found["recalls"][0]
    assert recall["stored"][0] == "......####......" and recall["modern"]["state"] == recall["stored"]
    assert recall["damage"] == "64 pixels flipped" and recall["classical"]["energies"][0] < 0
    assert err == f"wrote {figure}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hopfield", "--patterns", "13"], "patterns must be from 2 to 12, got 13"),
        (["hopfield", "--patterns", "x"], "argument --patterns: invalid int value: 'x'"),
        (["hopfield", "--seed", "-1"], "seed must be from 0 to 2⁶³ − 1, got -1"),
        (["hopfield", "--html", "x.html"], "unrecognized arguments: --html x.html"),
        (["--html", "x.html", "hopfield"], "demo hopfield takes none of --model, --figures, --html"),
        (["boltzmann"], "invalid choice: 'boltzmann'"),
    ],
)
def test_the_command_refuses_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *options)
    assert not list(tmp_path.iterdir())


def test_the_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figure = str(tmp_path / "memory.png")
    assert refused(capsys, "hopfield", "--figure", figure).startswith("matplotlib is not installed")
    assert cli.main(["demo", "hopfield", "--patterns", "2"]) == 0

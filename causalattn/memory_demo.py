"""Small images stored in a classical and in a modern Hopfield network, damaged, and retrieved from both.

An image is 16 × 16 spins: 1 is ink, −1 paper. A pixel that a network returns is right when its sign is.
basin: of an image with so many pixels flipped, chosen anew each time, the share of retrievals that end in the image
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .hopfield import (
    ClassicalRetrieval,
    Retrieval,
    classical_hopfield_energy,
    classical_hopfield_retrieve,
    hopfield_certificate,
    hopfield_energy,
    hopfield_retrieve,
)

SIDE = 16
PIXELS = SIDE * SIDE
# 4/√d: the certificate proves each of all twelve signs stored, which it does not at attention's 1/√d
BETA = 4 * PIXELS**-0.5
# of an update's length; a looser one stops on the saddle between two images
TOLERANCE = 1e-5
LONGEST = 100
DAMAGE = 25
PERCENT = range(0, 51, 5)
TRIALS = 40

# ink at x to the right of the middle and y below it, in pixels
SIGNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross": lambda x, y: torch.minimum(x.abs(), y.abs()) < 2,
    "ring": lambda x, y: (x.hypot(y) - 5.5).abs() < 1.6,
    "triangle": lambda x, y: (2 * x.abs() < y + 7) & (y < 6),
    "checkers": lambda x, y: (x // 4 + y // 4) % 2 == 0,
    "moon": lambda x, y: (x.hypot(y) < 7.5) & ((x - 4).hypot(y) > 6),
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 5.5).abs() < 1.2,
    "saltire": lambda x, y: (x.abs() - y.abs()).abs() < 2,
    "stripes": lambda x, y: y // 2 % 2 == 0,
    "diamond": lambda x, y: x.abs() + y.abs() < 7.5,
    "arrow": lambda x, y: ((x.abs() < 1.6) & (y > -2)) | ((x.abs() < y + 8) & (y < 0)),
    "bars": lambda x, y: x // 2 % 2 == 0,
    "slash": lambda x, y: (x + y).abs() < 3.2,
}


class Descent(NamedTuple):
    """What one network made of a damaged image: the state it ended in, [16, 16], spins or numbers between.

    energies: before the first step, then after each. steps: how many moved the state. wrong: pixels of the other sign.
    """

    state: Tensor
    energies: tuple[float, ...]
    steps: int
    wrong: int


class Recall(NamedTuple):
    """One image, how it was damaged, [16, 16] each, in how many pixels, and its retrieval by both networks."""

    name: str
    damage: str
    stored: Tensor
    damaged: Tensor
    wrong: int
    classical: Descent
    modern: Descent


class Basin(NamedTuple):
    """The share of each image's retrievals that end in the image, with so many percent of its pixels flipped."""

    percent: int
    classical: tuple[float, ...]
    modern: tuple[float, ...]


class MemoryDemo(NamedTuple):
    """What `compare_memories` saw.

    names: of the images. alike: the two that have the most pixels in common, and which share of all that is.
    certified: how many the certificate proves stored in the modern network. trials: retrievals an image and percentage.
    """

    names: tuple[str, ...]
    recalls: tuple[Recall, ...]
    basins: tuple[Basin, ...]
    alike: tuple[str, str, float]
    certified: int
    beta: float
    trials: int
    seed: int

    def to_json(self) -> str:
        recalls = [_plain(recall) for recall in self.recalls]
        basins = [basin._asdict() for basin in self.basins]
        return json.dumps({**self._asdict(), "recalls": recalls, "basins": basins}, indent=1)


def compare_memories(
    patterns: int = 6,
    *,
    seed: int = 0,
    trials: int = TRIALS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MemoryDemo:
    """Store images in both Hopfield networks and retrieve them damaged: a quarter flipped, and one with half hidden.

    Args:
        patterns: how many images, from 2 to 12.
        seed: of what is flipped, and of the order of the classical network's updates.
        trials: retrievals of each image at each percentage of flipped pixels.
        progress: called with (done, total) networks whose basins are known.

    Returns:
        MemoryDemo, of float64 states on the CPU; the same for the same arguments.

    Raises:
        ValueError: patterns or seed out of range, trials < 1.

    Example:
        >>> compare_memories(3, trials=2).basins[0]
        Basin(percent=0, classical=(1.0, 1.0, 1.0), modern=(1.0, 1.0, 1.0))
    """
    if not 2 <= patterns <= len(SIGNS):
        raise ValueError(f"patterns must be from 2 to {len(SIGNS)}, got {patterns}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2⁶³ − 1, got {seed}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    names, X = tuple(SIGNS)[:patterns], draw_signs(patterns)
    generator = torch.Generator().manual_seed(seed)
    recalls = _recalls(names, X, generator)
    basins = _basins(X, trials, generator, progress)
    certified = int(hopfield_certificate(X, X, beta=BETA).stored.sum())
    return MemoryDemo(names, recalls, basins, _most_alike(names, X), certified, BETA, trials, seed)


def draw_signs(count: int) -> Tensor:
    """The first so many images as spins, [N, 256] in float64."""
    middle = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    ink = torch.stack([sign(x, y).flatten() for sign in list(SIGNS.values())[:count]])
    return 2.0 * ink.double() - 1


def table(result: MemoryDemo) -> Iterator[str]:
    """The lines that `causalattn demo hopfield` prints."""
    N = len(result.names)
    yield f"{N} images of {PIXELS} pixels; β = {result.beta:g}, at which {result.certified} of {N} are certified stored"
    yield f"{'image':<10}{'damage':<18}{'wrong':>7}  after classical  steps  after modern  steps"
    for name, damage, _, _, wrong, classical, modern in result.recalls:
        found = f"{classical.wrong:>15}  {classical.steps:>5}  {modern.wrong:>12}  {modern.steps:>5}"
        yield f"{name:<10}{damage:<18}{wrong:>7}  {found}"
    yield f"{'flipped':>8}  {'classical':>9}  {'modern':>7}   retrieved, of {N * result.trials} each"
    for percent, *shares in result.basins:
        classical, modern = (sum(share) / N for share in shares)
        yield f"{percent:>7}%  {classical:>9.1%}  {modern:>7.1%}"
    yield from verdict(result)


def verdict(result: MemoryDemo) -> Iterator[str]:
    """What the two networks did, in a few sentences."""
    found = [sum(getattr(recall, which).wrong == 0 for recall in result.recalls) for which in ("classical", "modern")]
    of = f"Of {len(result.recalls)} damaged images"
    yield f"{of} the classical network retrieves {found[0]}, the modern one {found[1]}."
    for which, kept in zip(("classical", "modern"), result.basins[0][1:], strict=True):
        lost = [name for name, share in zip(result.names, kept, strict=True) if share < 1]
        if lost:
            yield f"The {which} one leaves {', '.join(lost)} even when started in the undamaged image."
    first, second, share = result.alike
    yield f"The two images most alike, {first} and {second}, agree in {share:.0%} of their pixels."


def _recalls(names: Sequence[str], X: Tensor, generator: torch.Generator) -> tuple[Recall, ...]:
    """Every image with a quarter of its pixels flipped, and the first with its lower half left white."""
    N, flipped = len(X), PIXELS * DAMAGE // 100
    hidden = X[:1].clone()
    hidden[:, PIXELS // 2 :] = -1
    states = torch.cat([_flipped(X, flipped, generator), hidden])
    stored, whose = torch.cat([X, X[:1]]), [*names, names[0]]
    damages = [f"{flipped} pixels flipped"] * N + ["lower half hidden"]
    turn = partial(classical_hopfield_retrieve, patterns=X, steps=1, generator=generator)
    classical = _descents(states, stored, turn, partial(classical_hopfield_energy, patterns=X))
    turn = partial(hopfield_retrieve, patterns=X, beta=BETA, steps=1, tol=TOLERANCE)
    modern = _descents(states, stored, turn, partial(hopfield_energy, patterns=X, beta=BETA))
    images = (x.unflatten(1, (SIDE, SIDE)) for x in (stored, states))
    wrong = (states != stored).sum(1).tolist()
    return tuple(map(Recall, whose, damages, *images, wrong, classical, modern))


def _descents(
    state: Tensor,
    stored: Tensor,
    turn: Callable[[Tensor], ClassicalRetrieval | Retrieval],
    energy: Callable[[Tensor], Tensor],
) -> list[Descent]:
    """Step by step from each state until it moves no more."""
    energies, steps = [energy(state)], torch.zeros(len(state), dtype=torch.int64)
    moving = torch.ones(len(state), dtype=torch.bool)
    for _ in range(LONGEST):
        moved = turn(state)
        state = torch.where(moving[:, None], moved.state, state)
        energies.append(energy(state))
        moving &= ~moved.converged
        steps += moving
        if not moving.any():
            break
    each = map(tuple, torch.stack(energies, 1).tolist())
    wrong = (state.sign() != stored).sum(1)
    return list(map(Descent, state.unflatten(1, (SIDE, SIDE)), each, steps.tolist(), wrong.tolist()))


def _basins(
    X: Tensor, trials: int, generator: torch.Generator, progress: Callable[[int, int], None]
) -> tuple[Basin, ...]:
    # half the time of float64, and only signs are looked at
    X = X.float()
    stored = X.repeat_interleave(trials, 0)
    states = torch.cat([_flipped(stored, round(PIXELS * percent / 100), generator) for percent in PERCENT])
    retrievals = (
        partial(classical_hopfield_retrieve, steps=LONGEST, generator=generator),
        partial(hopfield_retrieve, beta=BETA, steps=LONGEST, tol=TOLERANCE),
    )
    found = []
    for done, retrieve in enumerate(retrievals):
        progress(done, len(retrievals))
        # all percentages at once: a classical step is one small product a pixel, whatever the number of states
        ended = retrieve(states, X).state.sign().view(len(PERCENT), len(X), trials, PIXELS)
        found.append((ended == X[:, None]).all(3).double().mean(2).tolist())
    progress(len(retrievals), len(retrievals))
    return tuple(Basin(*each) for each in zip(PERCENT, *(map(tuple, shares) for shares in found), strict=True))


def _flipped(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The images with so many pixels turned, others in each."""
    rank = torch.rand(images.shape, generator=generator).argsort(1)
    return torch.where(rank < count, -images, images)


def _most_alike(names: Sequence[str], X: Tensor) -> tuple[str, str, float]:
    overlaps = (X @ X.mT).fill_diagonal_(-PIXELS)
    first, second = divmod(int(overlaps.argmax()), len(X))
    return names[first], names[second], float(1 + overlaps.max() / PIXELS) / 2


def _plain(result: Recall | Descent) -> dict:
    """A result without tensors: an image is a string a row, # where there is ink."""
    plain = result._asdict()
    for name, value in plain.items():
        if isinstance(value, Tensor):
            plain[name] = ["".join("#" if pixel else "." for pixel in row) for row in (value > 0).tolist()]
        elif isinstance(value, Descent):
            plain[name] = _plain(value)
    return plain

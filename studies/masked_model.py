"""Small masked language models of sequences from linear systems: a variable a position, its value's bin the token."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from systems import System, random_system
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from causalattn.discovery import PAG

SEED = 20
VARIABLES, BINS, MASK = 9, 8, 8
LAYERS, HEADS, WIDTH = 2, 4, 32
BATCH, RATE, WARM, SHARE = 64, 3e-3, 100, 0.25
NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
INNER = NORMAL.icdf(torch.arange(1, BINS, dtype=torch.float64) / BINS)
CENTRES = NORMAL.icdf((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS)


class World(NamedTuple):
    """A system and its sequences: standardised values [n, T], three splits of independent draws."""

    system: System
    truth: PAG
    train: Tensor
    validation: Tensor
    test: Tensor


def world(seed: int, train: int, held: int) -> World:
    rng = np.random.default_rng([SEED, seed])
    system = random_system(rng, VARIABLES)
    x = system.sample(rng, train + 2 * held)
    splits = torch.from_numpy(x / x[:train].std(0)).split([train, held, held])
    return World(system, system.truth(), *splits)


def coded(values: Tensor) -> Tensor:
    """Each value's bin among those of equal mass under the standard normal."""
    return torch.bucketize(values.contiguous(), INNER)


def model_of(T: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=BINS + 1, max_position_embeddings=T, type_vocab_size=1, initializer_range=0.1,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def masked(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels: of the positions drawn 80 % are masked, 10 % another token's, 10 % as they were."""
    picked = torch.rand(tokens.shape, generator=generator) < SHARE
    which = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(BINS, tokens.shape, generator=generator)
    inputs = torch.where(picked & (which < 0.8), MASK, torch.where(picked & (which >= 0.9), other, tokens))
    return inputs, torch.where(picked, tokens, -100)


def trained(model: BertForMaskedLM, tokens: Tensor, steps: tuple[int, ...], seed: int) -> Iterator[int]:
    """Train to the last of the steps, and stop at each of them."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in range(steps[-1] + 1):
        if step in steps:
            yield step
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM) * (1 - 0.9 * step / steps[-1])
        inputs, labels = masked(tokens[torch.randint(len(tokens), (BATCH,), generator=generator)], generator)
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: BertForMaskedLM, tokens: Tensor) -> float:
    """Share of tokens that the model names where they alone are masked."""
    right = []
    for t in range(tokens.shape[1]):
        inputs = tokens.clone()
        inputs[:, t] = MASK
        right.append(model(input_ids=inputs).logits[:, t, :BINS].argmax(-1) == tokens[:, t])
    return float(torch.stack(right).double().mean())


def ceiling(R: np.ndarray, values: Tensor) -> float:
    """Share of tokens named by the best predictor that is told the values of the others, R exactly known.

    x_t given the others is normal, of mean x_t − (x R⁻¹)_t / (R⁻¹)_tt and variance 1 / (R⁻¹)_tt.
    """
    precision = torch.linalg.inv(torch.from_numpy(R))
    mean = values - values @ precision / precision.diagonal()
    ends = torch.nn.functional.pad(INNER, (1, 1), value=torch.inf)
    ends[0] = -torch.inf
    mass = NORMAL.cdf((ends - mean[..., None]) * precision.diagonal()[:, None].sqrt()).diff(dim=-1)
    return float((mass.argmax(-1) == coded(values)).double().mean())


def majority(train: Tensor, tokens: Tensor) -> float:
    """Share of tokens named by the most frequent one of their position."""
    return float((tokens == train.mode(0).values).double().mean())

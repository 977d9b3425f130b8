"""Three small models whose predictions are to be explained, and inputs made by programs that know their causes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

# as in a masked language model, that replaced tokens are nothing new
MASKED = 0.1
BATCH, STEPS = 96, 500


class Case(NamedTuple):
    """ids [T], the positions that may be replaced, those that the program let decide, and what is never predicted."""

    ids: Tensor
    positions: list[int]
    causes: frozenset[int]
    excluded: list[int]


class Explained(NamedTuple):
    """A trained model: row is the one whose logits predict, None of a classifier; accuracy on the test cases."""

    model: nn.Module
    row: int | None
    replacement: int
    validation: list[Case]
    test: list[Case]
    accuracy: float

    def logits(self, case: Case, **inputs: Tensor) -> Tensor:
        """[N, classes] of N inputs, −∞ at what is never predicted."""
        logits = self.model(**inputs).logits
        logits = logits if self.row is None else logits[:, self.row]
        return logits.index_fill(1, torch.tensor(case.excluded, dtype=torch.int64), -torch.inf)


def gpt2(vocabulary: int, seed: int) -> GPT2LMHeadModel:
    """2 layers of 4 heads, 64 wide, without dropout."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocabulary, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=None))


def train(model: GPT2LMHeadModel, batch_of: Callable[[], tuple[Tensor, Tensor]], steps: int) -> None:
    """Adam on the next token of every position, where batch_of gives what is read and what is to be predicted."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        read, wanted = batch_of()
        loss = F.cross_entropy(model(read[:, :-1]).logits.flatten(0, 1), wanted[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval()


# an answer is (x + y) mod 5 of the values x in A and y in B that the context shows, "none" where it shows neither
CONTEXT, MODULUS = 10, 5
MASK, ASK, END, NONE = 0, 1, 2, 3
ANSWER, A, B, FILLER, WORDS = 4, 9, 13, 17, 29


def answer(context: np.ndarray) -> int:
    """The token that answers a context; a value that is masked does not count."""
    x = {*(context[(context >= A) & (context < B)] - A + 1).tolist()}
    y = {*(context[(context >= B) & (context < FILLER)] - B + 1).tolist()}
    return ANSWER + (sum(x) + sum(y)) % MODULUS if x or y else NONE


def question(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A context, and where its values are: one of A, one of A and one of B, or the same of A twice."""
    context = rng.integers(FILLER, WORDS, CONTEXT)
    kind = rng.integers(3)
    places = rng.permutation(CONTEXT)[: 1 if kind == 0 else 2]
    x = rng.integers(A, B)
    context[places] = [x] if kind == 0 else [x, rng.integers(B, FILLER)] if kind == 1 else [x, x]
    return context, sorted(places.tolist())


def questions(rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor]:
    """Texts "context ? answer .", some of the context masked, what is masked not counting; the context is random, so
    only what follows it is to be predicted.
    """
    contexts = np.array([question(rng)[0] for _ in range(number)])
    contexts[rng.random(contexts.shape) < MASKED] = MASK
    answers = np.array([answer(context) for context in contexts])
    columns = [contexts, np.full((number, 1), ASK), answers[:, None], np.full((number, 1), END)]
    texts = torch.from_numpy(np.concatenate(columns, 1))
    wanted = texts.clone()
    wanted[:, : CONTEXT + 1] = -100
    return texts, wanted


def next_token(seed: int, cases: tuple[int, int], quick: bool) -> Explained:
    """A model of text whose last token one or two earlier ones decide."""
    rng = np.random.default_rng([seed, 1])
    model = gpt2(WORDS, seed)
    train(model, lambda: questions(rng, BATCH), 60 if quick else STEPS)

    def case() -> Case:
        context, places = question(rng)
        return Case(torch.tensor([*context.tolist(), ASK]), [*range(CONTEXT)], frozenset(places), [MASK])

    validation, test = ([case() for _ in range(number)] for number in cases)
    with torch.no_grad():
        predicted = model(torch.stack([each.ids for each in test])).logits[:, -1].argmax(-1).tolist()
    right = [p == answer(each.ids[:-1].numpy()) for p, each in zip(predicted, test, strict=True)]
    return Explained(model, -1, MASK, validation, test, float(np.mean(right)))


# items 1 … 48 in groups of 6; each item has another that it leads to
ITEMS, GROUP, HISTORY, LIST = 48, 6, 10, 5


def links(seed: int) -> np.ndarray:
    """Of each item the one that it leads to, never itself; entry 0 is no item's."""
    order = np.random.default_rng([seed, 2]).permutation(ITEMS) + 1
    after = np.zeros(ITEMS + 1, int)
    after[order] = np.roll(order, -1)
    return after


def history(rng: np.random.Generator, after: np.ndarray, length: int) -> list[int]:
    """A user's items, none twice: half the time what one of the last 4 leads to, else one of the user's two groups."""
    groups = rng.permutation(ITEMS // GROUP)[:2]
    liked = [g * GROUP + n + 1 for g in groups.tolist() for n in range(GROUP)]
    items: list[int] = []
    while len(items) < length:
        led = [int(after[i]) for i in items[-4:] if after[i] not in items]
        fresh = [i for i in liked if i not in items]
        items.append(int(rng.choice(led if led and (rng.random() < 0.5 or not fresh) else fresh)))
    return items


def causes(items: list[int], recommended: int, after: np.ndarray) -> frozenset[int]:
    """Where in a history are items of the recommended one's group, and those that lead to it."""
    group = (recommended - 1) // GROUP
    return frozenset(t for t, i in enumerate(items) if after[i] == recommended or (i - 1) // GROUP == group)


def recommender(seed: int, cases: tuple[int, int], quick: bool) -> Explained:
    """A model of users' histories; accuracy is how often the next item is in the list of 5."""
    rng, after = np.random.default_rng([seed, 3]), links(seed)
    model = gpt2(ITEMS + 1, seed)
    pool = torch.tensor([history(rng, after, HISTORY + 2) for _ in range(400 if quick else 8000)])

    def batch() -> tuple[Tensor, Tensor]:
        wanted = pool[torch.from_numpy(rng.integers(0, len(pool), BATCH))]
        return wanted.masked_fill(torch.from_numpy(rng.random(wanted.shape)) < MASKED, MASK), wanted

    train(model, batch, 60 if quick else STEPS)
    users = [history(rng, after, HISTORY + 1) for _ in range(sum(cases))]
    listed, made = [], []
    for *items, following in users:
        case = Case(torch.tensor(items), [*range(HISTORY)], frozenset(), [MASK, *items])
        with torch.no_grad():
            top = Explained.logits(Explained(model, -1, MASK, [], [], 0), case, input_ids=case.ids[None])[0].topk(LIST)
        listed.append(following in top.indices.tolist())
        made.append(case._replace(causes=causes(items, int(top.indices[0]), after)))
    return Explained(model, -1, MASK, made[: cases[0]], made[cases[0] :], float(np.mean(listed[cases[0] :])))

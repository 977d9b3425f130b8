"""Reviews made of templates, and a small sentence encoder whose last layer is trained to tell what they say."""

import re

import numpy as np
import torch
import torch.nn.functional as F
from explained import MASKED, Case, Explained
from minilm import FOLDER
from torch import Tensor
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

NEUTRAL, POSITIVE, NEGATIVE = range(3)
SPLITS = ("train", "validation", "test")
# P an adjective of the review's polarity, O one of the other, in a clause that concedes, X the same where "not" turns
# it round, U a neutral one, N a noun; what P, X and "not" before X say decides
TEMPLATES = {
    "train": [
        "the N was P", "a P N and a U N", "i watched the U N and it was P", "although the N was O , the N was P",
        "the N was not X", "the N was P and the N was P", "what a P N , with a U N and a P N",
        "the N was U but the N was P", "even if the N seemed O , i found the N P", "i thought the N was not X",
    ],
    "validation": ["we saw a U N and found it P", "while the N was O , the N felt P", "the N was not X and the N P"],
    "test": [
        "my friends called this U N P", "the N , though O , had a P N", "it was P from the U start and the N was P too",
        "i must say the N was not X", "the N looked P , the N sounded P and the N stayed P",
    ],
}  # fmt: skip
ADJECTIVES = {
    "train": {
        POSITIVE: "superb delightful brilliant charming wonderful excellent gripping lovely impressive enjoyable",
        NEGATIVE: "awful boring terrible clumsy dreadful poor tedious ugly disappointing annoying",
        NEUTRAL: "recent early local modern typical foreign digital final",
    },
    "validation": {
        POSITIVE: "fantastic engaging splendid", NEGATIVE: "horrible dull lousy", NEUTRAL: "annual regional usual"
    },
    "test": {
        POSITIVE: "marvelous captivating terrific touching outstanding",
        NEGATIVE: "atrocious tiresome pathetic irritating miserable",
        NEUTRAL: "standard weekly national common",
    },
}  # fmt: skip
NOUNS = {"train": "film plot cast script story ending acting", "validation": "soundtrack direction movie",
         "test": "lighting dialogue editing picture"}  # fmt: skip
WRITTEN, EPOCHS, RATE = 900, 4, 3e-4


def review(rng: np.random.Generator, split: str) -> tuple[list[str], int, list[int]]:
    """The words of a review, what it says, and which words decide that: of a neutral one its adjectives."""
    says = int(rng.integers(3))
    other = {NEUTRAL: NEUTRAL, POSITIVE: NEGATIVE, NEGATIVE: POSITIVE}[says]
    polarity = {"P": says, "O": other, "X": other, "U": NEUTRAL}
    words = rng.choice(TEMPLATES[split]).split()
    decide = [t for t, word in enumerate(words) if word in ("P", "X", "not")]
    for t, word in enumerate(words):
        if word in polarity:
            words[t] = str(rng.choice(ADJECTIVES[split][polarity[word]].split()))
        elif word == "N":
            words[t] = str(rng.choice(NOUNS[split].split()))
    return words, says, decide


def encode(tokenizer, words: list[str], decide: list[int]) -> Case:
    encoded = tokenizer(words, is_split_into_words=True)
    of_word = encoded.word_ids()
    positions = [t for t, word in enumerate(of_word) if word is not None]
    return Case(
        torch.tensor(encoded["input_ids"]), positions, frozenset(t for t in positions if of_word[t] in decide), []
    )


def padded(cases: list[Case], pad: int) -> tuple[Tensor, Tensor]:
    """ids and attention mask, [N, T]."""
    ids = torch.nn.utils.rnn.pad_sequence([case.ids for case in cases], batch_first=True, padding_value=pad)
    return ids, (ids != pad).long()


def classifier(seed: int, cases: tuple[int, int], quick: bool) -> Explained:
    """MiniLM with a class of three read of [CLS]; its last layer is trained, on masked reviews too."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 4])
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = BertForSequenceClassification.from_pretrained(FOLDER, num_labels=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(r"layer\.5\.|pooler|classifier", name) is not None)
    model.eval()

    def write(split: str, number: int) -> tuple[list[Case], Tensor]:
        made = [review(rng, split) for _ in range(number)]
        return [encode(tokenizer, words, decide) for words, _, decide in made], torch.tensor([x[1] for x in made])

    reviews, says = write("train", 64 if quick else WRITTEN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    for _ in range(1 if quick else EPOCHS):
        for some in torch.from_numpy(rng.permutation(len(reviews))).split(32):
            chosen = [reviews[n] for n in some.tolist()]
            ids, real = padded(
                [mask_some(rng, case, tokenizer.mask_token_id) for case in chosen], tokenizer.pad_token_id
            )
            loss = F.cross_entropy(model(input_ids=ids, attention_mask=real).logits, says[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.requires_grad_(False)
    validation, test = write("validation", cases[0])[0], write("test", cases[1])
    ids, real = padded(test[0], tokenizer.pad_token_id)
    right = model(input_ids=ids, attention_mask=real).logits.argmax(-1) == test[1]
    return Explained(model, None, tokenizer.mask_token_id, validation, test[0], float(right.float().mean()))


def mask_some(rng: np.random.Generator, case: Case, mask: int) -> Case:
    """The case with some tokens masked that do not decide: a mask is nothing new, and says nothing."""
    ids = case.ids.clone()
    for t in case.positions:
        if t not in case.causes and rng.random() < MASKED:
            ids[t] = mask
    return case._replace(ids=ids)

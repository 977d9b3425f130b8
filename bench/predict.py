"""What the kernels should take on GPUs, from what they compile to and from published rates; docs/predicted.md.

    python bench/predict.py [--check]

Compiles the kernels of OPERATORS and writes their instructions a score into bench/counts.json, of which
`python bench/report.py` makes the page, beside what was measured. --check: write nothing, exit 1 where they differ.

A score takes the longest of: its instructions, 128 lanes a clock and multiprocessor; those of the pipe of exp2, 16; its
products, at the tensor cores' rate. Latency and what does not overlap are left out, and so are the tiles at an edge of
the mask, which are few in a long text: a time that is met means a pipe that is never idle.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

COUNTS = Path(__file__).with_name("counts.json")
HEADS, LENGTH, DIMS = 32, 16384, (64, 128)
LANES, SPECIAL = 128, 16


class Gpu(NamedTuple):
    """Published: multiprocessors, boost clock in Hz, dense bfloat16 FLOPs a clock and each of them, bytes a second."""

    name: str
    multiprocessors: int
    clock: float
    flops: int
    bandwidth: float


# vendors' data sheets: 312, 989, 2,250 and 209.5 TFLOP/s
GPUS = {
    "sm_80": Gpu("A100", 108, 1.410e9, 2048, 2.039e12),
    "sm_90": Gpu("H200", 132, 1.830e9, 4096, 4.8e12),
    "sm_100": Gpu("B200", 148, 1.856e9, 8192, 8.0e12),
    "sm_120": Gpu("RTX 5090", 170, 2.407e9, 512, 1.792e12),
}


class Pass(NamedTuple):
    """A launcher, its options on the sheet, and of each kernel the products of 2·D FLOPs a score."""

    launcher: str
    options: str
    products: dict[str, int]


FORWARD = Pass("attention_fwd", "", {"_attention_fwd_kernel": 2})
SUMS = Pass("row_statistics_fwd", "", {"_row_statistics_kernel": 1})
OPERATORS = {
    "attention": (FORWARD,),
    "attention + gradients": (
        FORWARD, Pass("attention_bwd", "", {"_attention_bwd_dq_kernel": 3, "_attention_bwd_dkv_kernel": 4}),
    ),
    "dag_score": (SUMS,),
    "row statistics": (Pass("row_statistics_fwd", "all", {"_row_statistics_kernel": 1}),),
    "received": (SUMS, Pass("received_fwd", "", {"_received_kernel": 1})),
    "asymmetry": (SUMS, Pass("pair_statistics_fwd", "", {"_pair_statistics_kernel": 1})),
}  # fmt: skip
# one reading of q, k, v and one writing of out, bfloat16
STREAMED = {"linear attention": 8}


class Count(NamedTuple):
    """Of one kernel, a score of the steady loop: instructions issued, and those of the pipe of exp2."""

    loop: float
    special: float


class Prediction(NamedTuple):
    """Milliseconds, and the pipe that takes longest in the longest kernel."""

    ms: float
    bound: str


def predicted(operator: str, D: int, arch: str, counts: dict[str, Count], causal: bool = False) -> Prediction:
    """HEADS heads of LENGTH tokens in bfloat16; counts by the names of `key`."""
    gpu = GPUS[arch]
    if operator in STREAMED:
        return Prediction(1e3 * STREAMED[operator] * HEADS * LENGTH * D / gpu.bandwidth, "bandwidth")
    scores = HEADS * LENGTH**2 / (2 if causal else 1)
    second = gpu.multiprocessors * gpu.clock
    total, longest = 0.0, (0.0, "")
    for step in OPERATORS[operator]:
        for kernel, products in step.products.items():
            count = counts[key(step, kernel, D, arch)]
            pipes = (
                (count.loop / LANES, "instructions"),
                (count.special / SPECIAL, "exponentials"),
                (2 * D * products / gpu.flops, "products"),
            )
            clocks, _ = slowest = max(pipes)
            total += clocks
            longest = max(longest, slowest)
    return Prediction(1e3 * total * scores / second, longest[1])


def key(step: Pass, kernel: str, D: int, arch: str) -> str:
    return " ".join([kernel, *step.options.split(), f"D={D}", arch])


def page(counts: dict[str, Count], rows: Sequence[dict]) -> str:
    """docs/predicted.md, with what was measured of the same shapes behind each prediction."""
    names = [gpu.name for gpu in GPUS.values()]
    lines = [
        "# What GPUs should take",
        f"Milliseconds of {HEADS} heads of {LENGTH:,} tokens in bfloat16: nothing but what the busiest pipe takes. The "
        "instructions a score are those of the machine code (`make sheet`), the rates published ones. Times grow with "
        "the square of the tokens, and a causal mask halves them; of linear attention they grow with the tokens. "
        "Behind a time: what it is bound by, and what was measured where that GPU was at hand. Made by "
        "`python bench/report.py` of `bench/counts.json`.",
        "\n".join(_table(counts, rows, names)),
        "\n".join(_rates()),
    ]
    return "\n\n".join(lines) + "\n"


def _table(counts: dict[str, Count], rows: Sequence[dict], names: Sequence[str]) -> Iterator[str]:
    yield f"| | D | {' | '.join(names)} |"
    yield "|---|---|" + "---|" * len(names)
    for operator in (*OPERATORS, *STREAMED):
        for D in DIMS:
            cells = []
            for arch, gpu in GPUS.items():
                ms, bound = predicted(operator, D, arch, counts)
                seen = [
                    row["ms"]["p50"]
                    for row in rows
                    if row["operator"] == operator and row["shape"] == [1, HEADS, LENGTH, D] and row["ms"]
                    and row["peer"] == "causalattn" and same_gpu(gpu.name, row["device"])
                ]  # fmt: skip
                cells.append(f"{ms:.3g} {bound}" + "".join(f", measured {x:.3g}" for x in seen))
            yield f"| {operator} | {D} | {' | '.join(cells)} |"


def same_gpu(name: str, device: str) -> bool:
    """Whether a device is that GPU, not one of its smaller or larger kin."""
    words = re.split(r"[\s-]+", device)
    return set(name.split()) <= set(words) and not {"Laptop", "40GB", "PCIe", "PCIE", "D"} & set(words)


def _rates() -> Iterator[str]:
    yield "| | multiprocessors | GHz | bfloat16 TFLOP/s | TB/s |"
    yield "|---|---|---|---|---|"
    for gpu in GPUS.values():
        peak = gpu.multiprocessors * gpu.clock * gpu.flops / 1e12
        rates = f"{gpu.clock / 1e9:.3g} | {peak:.0f} | {gpu.bandwidth / 1e12:.3g}"
        yield f"| {gpu.name} | {gpu.multiprocessors} | {rates} |"


def stored() -> dict[str, Count]:
    return {name: Count(*count) for name, count in json.loads(COUNTS.read_text("utf-8"))["counts"].items()}


def compiled() -> dict[str, Count]:
    """The counts, from the machine code."""
    import torch
    from kernel_sheet import sheet
    from launchers import Case

    steps = {(step.launcher, step.options): step for steps in OPERATORS.values() for step in steps}
    cases = [
        Case(launcher, D, torch.bfloat16, frozenset(options.split()), arch)
        for launcher, options in steps
        for D in DIMS
        for arch in GPUS
    ]
    found = {}
    for row in sheet(cases):
        size, _, *options = row.config.split()
        for (_, wanted), step in steps.items():
            if row.function in step.products and options == sorted(wanted.split()):
                # the first pass: a second one exists where probabilities are written
                found[key(step, row.function, int(size[2:]), row.arch)] = Count(row.loop[0], row.mufu[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the counts differ")
    check = parser.parse_args().check
    counts = compiled()
    if check:
        wrong = sorted(name for name, count in counts.items() if stored().get(name) != count)
        print(*(f"{name} differs from bench/counts.json" for name in wrong), sep="\n", file=sys.stderr)
        return 1 if wrong else 0
    import triton

    COUNTS.write_text(json.dumps({"triton": triton.__version__, "counts": counts}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

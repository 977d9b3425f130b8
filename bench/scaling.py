"""What a sequence shared by ranks costs each of them: bytes sent and held, and time on many GPUs; docs/scaling.md.

    python bench/scaling.py    print the page

The formulas are those that tests/test_distributed.py holds to the counters of 2 to 8 processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import predict

from causalattn.distributed.ring import HEADER

# bytes that one number of a block's out moves: its own, a product, and the sum so far, read and written twice
PUT = 52
# of sums and of factors of rows: float64
WIDE = 8
NVLINK, INFINIBAND, NODE = 450e9, 50e9, 8
TOKENS, RANKS = 2**20, (8, 32, 128, 1024)


class Size(NamedTuple):
    """One sequence of T tokens on W ranks, t = T / W each; b bytes an element of q, k and v."""

    T: int
    W: int
    H: int
    H_kv: int
    D: int
    V: int
    b: int
    B: int = 1

    @property
    def t(self) -> int:
        return self.T // self.W


def ring_bytes(operator: str, s: Size) -> int:
    """What one rank sends to its neighbour."""
    keys, values = s.B * s.H_kv * s.t * s.D * s.b, s.B * s.H_kv * s.t * s.V * s.b
    sums = s.B * s.H * s.t * WIDE
    factors = 2 * s.B * s.H * s.t * max(4, s.b)
    hops = s.W - 1
    home = s.W if s.W > 1 else 0
    received = 2 * hops * keys + home * sums
    return {
        "attention": hops * (keys + values),
        "row statistics": hops * keys,
        "dag_score": hops * keys,
        "received": received,
        "asymmetry": received + s.W // 2 * (s.B * s.H * s.t * s.D * s.b + keys + factors),
        "top-k": hops * keys,
        "edge effects": 3 * hops * (keys + values) + home * sums,
        "covariances": hops * (s.B * s.H * s.t * s.D * s.b + factors),
        "correlations": hops * (s.B * s.H * s.t * s.D * s.b + factors),
    }.get(operator, 0)


def gathered_bytes(operator: str, s: Size) -> int:
    """Of what every rank sends to all others, this one's; of a selective scan D and V are its channels and states."""
    keys = s.H_kv * s.t * s.D * s.b
    each = {
        "dag_score": 2 * s.H * WIDE,
        "asymmetry": 4 * s.H * WIDE,
        "covariances": keys,
        "correlations": keys + s.H * s.t * WIDE,
        "linear attention": s.H * (s.D * (s.V + 1) + 1) * WIDE,
        "linear attention, a decay a feature": s.H * (s.D * (s.V + 1) + s.D) * WIDE,
        "selective scan": 2 * s.D * s.V * WIDE,
    }
    return (s.W - 1) * (HEADER * 8 + s.B * each.get(operator, 0))


def held_bytes(s: Size) -> int:
    """What one rank holds at most in attention beside its own q, k, v and its results."""
    visit = 2 * s.B * s.H_kv * s.t * (s.D + s.V) * s.b
    # resolved in int64
    mask = (3 * 4 + 64) * s.T
    return visit + mask + s.B * s.H * s.t * WIDE * (5 * s.V // 2 + 9)


def page() -> str:
    """docs/scaling.md."""
    return "\n\n".join(part.strip() for part in (HEAD, "\n".join(_times()), TAIL)) + "\n"


def seconds(s: Size, rate: float, volume: float) -> tuple[float, float]:
    """Of causal attention the work of a rank, and what it sends at the slower of the links it crosses.

    Putting a block together reads and writes its sums: PUT bytes a number, W times a rank's share, so never less.
    """
    put = s.B * s.H * s.T * s.V * PUT / predict.GPUS["sm_90"].bandwidth
    return s.B * s.H * s.T**2 / 2 / s.W / rate + put, volume / (NVLINK if s.W <= NODE else INFINIBAND)


def _times() -> Iterator[str]:
    counts = predict.stored()
    yield "| H200s | work | ring, H_kv = 32 | ring, H_kv = 8 | 32 groups of heads | memory of a rank |"
    yield "|---|---|---|---|---|---|"
    one = predict.predicted("attention", 128, "sm_90", counts).ms / 1e3
    rate = predict.HEADS * predict.LENGTH**2 / one
    for W in RANKS:
        cells = []
        for H_kv in (32, 8):
            size = Size(TOKENS, W, 32, H_kv, 128, 128, 2)
            work, sent = seconds(size, rate, ring_bytes("attention", size))
            cells.append(_ms(max(work, sent)))
        split = Size(TOKENS, max(1, W // 32), 1, 1, 128, 128, 2)
        # to a rank's own heads and back: q, k, v and out
        exchanged = 4 * 32 * (TOKENS // W) * 128 * 2
        sent = exchanged + ring_bytes("attention", split)
        # of a group's ring W / 32 blocks are put together
        own = seconds(split, rate, 0)[0]
        grouped = _ms(max(own, sent / INFINIBAND)) if W >= 32 else ""
        held = held_bytes(Size(TOKENS, W, 32, 8, 128, 128, 2)) / 2**30
        yield f"| {W} | {_ms(work)} | {cells[0]} | {cells[1]} | {grouped} | {held:.2g} GiB |"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


HEAD = f"""
# Past one device

`causalattn.distributed` has the operators on a sequence of T tokens that W ranks share, t = T / W each, on PyTorch's
own process groups. Keys and values go around a ring, the next ones under way while a block is worked on; what is put
together are (out, lse) and sums relative to a row's maximum, in float64. Linear attention exchanges its states alone.

## What a rank sends

B = 1; H query and H_kv key heads, D and V numbers of b bytes. Sums travel as 8 bytes. `distributed.traffic()` counts
what is really sent; tests/test_distributed.py holds it to these formulas on 1, 2, 3, 4 and 8 processes, to the byte.

| operator | around the ring | gathered by all |
|---|---|---|
| attention | (W − 1)·H_kv·t·(D + V)·b | |
| row statistics, top-k | (W − 1)·H_kv·t·D·b | 16·(W − 1)·H with dag_score |
| received, net flow | 2·(W − 1)·H_kv·t·D·b + 8·W·H·t | |
| asymmetry, beside those | ⌊W / 2⌋·t·((H + H_kv)·D·b + 2·f·H) | 32·(W − 1)·H |
| edge effects | 3·(W − 1)·H_kv·t·(D + V)·b + 8·W·H·t | |
| correlations A Aᵀ | (W − 1)·H·t·(D·b + 2·f) | (W − 1)·(H_kv·t·D·b + 8·H·t) |
| covariances | the same | (W − 1)·H_kv·t·D·b |
| linear attention | 0 | 8·(W − 1)·H·(D·(V + 1) + 1) |
| selective scan, E channels of N states | 0 | 16·(W − 1)·E·N |

f is 4, 8 for float64. Every call begins with {8 * HEADER} bytes from each rank to all: how many tokens it
holds, whether its arguments are sound, and what they are, so that ranks that disagree are told so. W = 1 sends nothing.
Decays a feature send D numbers of what is left of a state in place of one; without values (measure="kl") edge effects
send none.

## What a rank holds

Beside its own q, k, v and its results: two visiting blocks, 2·H_kv·t·(D + V)·b; sums of rows in float64,
8·H·t·(2.5·V + 9) for attention; and the mask, 12·T, 76·T while it is resolved, the only part that does not shrink with
W. Correlations hold all keys, H_kv·T·D·b, twice while they are put in order, two panels of 1,024 rows, 16 KiB·T, and
their result, H·t·T·8; linear attention the states of all ranks, 16·W·H·D·(V + 1). A test measures attention's peak.

## One million tokens

T = {TOKENS:,}, 32 heads, D = V = 128, bfloat16, causal, zig-zag, one attention. The work of a rank is at the rate
[predicted](predicted.md) for an H200, of which nothing has been measured yet, and with it goes putting blocks together
in float64, {PUT} bytes a number and block; the time is the longer of its work and of its exchange, at
{NVLINK / 1e9:.0f} GB/s within {NODE} GPUs and {INFINIBAND / 1e9:.0f} GB/s beyond, published figures.
"""
TAIL = """
A ring costs nothing while a block's work, H·t²/(2·rate) under a causal mask, is longer than its exchange,
H_kv·t·(D + V)·b / bandwidth: t ≥ 2·H_kv·(D + V)·b·rate / (H·bandwidth), half of it without the mask. Grouped keys move
that border by H / H_kv. Putting W blocks together takes a rank as long whatever W is, so with many ranks it is what is
left: a kernel that takes the sums so far along would save most of it, and does not exist here yet.

- **Ring** wins where t is large or heads are few: memory falls with W, and any W will do.
- **Heads** (every rank some heads of all tokens, as in DeepSpeed-Ulysses) wins for W ≤ H_kv over slow links: it sends
  4·H·t·D·b once, W / 2 times less than a ring where H_kv = H, but holds whole heads, T·D each. Everything here is
  independent a head, so it needs no operator of ours: exchange heads for tokens, call `causalattn.attention`, exchange
  back. Beyond W = H_kv rings inside groups of heads are the only ones whose exchange still shrinks (the column before
  the last: 32 groups, rings of W / 32 ranks).
- **All-gather** sends what a ring sends, hides nothing and holds all keys; it wins for short sequences, whose many
  small steps cost more than their bytes, and where all keys are wanted anyway: correlations gather theirs.
- **States** (linear attention, scans) cost the same for any T.

A corpus needs none of this: documents are shared out whole, and ranks exchange nothing.
"""


if __name__ == "__main__":
    print(page(), end="")

"""What each operator costs on this machine beside the same numbers by plain torch, which forms the matrix."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention, attention_map, attention_rows, attention_topk
from .complexity import device_name, make_inputs, milliseconds
from .covariance import attention_correlation
from .edge_effects import edge_effects
from .hopfield import hopfield_retrieve
from .linear_attention import linear_attention, linear_attention_matrix
from .partial_corr import partial_correlation
from .statistics import attention_stats, dag_score, score_asymmetry

ROWS, TOP, CELLS, TESTS = 64, 16, 128, 100_000
# the bytes of one head's matrix beyond which plain torch is not run
ROOM = 2**30

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Timed(NamedTuple):
    """One operator: milliseconds of a call of ours and of plain torch, None where it would not fit."""

    name: str
    ours: float
    plain: float | None

    @property
    def ratio(self) -> float | None:
        """How many times as long plain torch takes."""
        return self.plain / self.ours if self.plain else None


class OperatorTimes(NamedTuple):
    """What `measure_operators` saw."""

    rows: tuple[Timed, ...]
    shape: str
    device: str

    def to_json(self) -> str:
        rows = [{**row._asdict(), "ratio": row.ratio} for row in self.rows]
        return json.dumps({**self._asdict(), "rows": rows, "torch": torch.__version__}, indent=1)


def measure_operators(
    T: int = 2048,
    *,
    heads: int = 4,
    dim: int = 64,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> OperatorTimes:
    """Time every operator on T random tokens beside plain torch, float32, one sequence, after both agree.

    Args:
        T: tokens, at least 256.
        heads, dim: H and D of every call.
        device: where; by default CUDA where there is one.
        progress: called with (done, total) operators.

    Returns:
        OperatorTimes: medians of calls repeated for half a second.

    Raises:
        ValueError: T < 256, or heads or dim < 1.

    Example:
        >>> measure_operators(256, heads=1).rows[0].name
        'attention, causal'
    """
    for name, value, least in (("T", T, 2 * CELLS), ("heads", heads, 1), ("dim", dim, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = make_inputs(1, heads, T, dim, device, torch.float32)
    fits = 4 * heads * T * T <= ROOM
    rows = []
    for done, (name, ours, plain, whole) in enumerate(CASES):
        progress(done, len(CASES))
        runs = fits or not whole
        if runs:
            _check(name, ours(*inputs), plain(*inputs))
        rows.append(Timed(name, milliseconds(ours, inputs), milliseconds(plain, inputs) if runs else None))
    progress(len(CASES), len(CASES))
    return OperatorTimes(tuple(rows), f"T = {T}, {heads} heads, D = {dim}, float32", device_name(device))


def table(result: OperatorTimes) -> Iterator[str]:
    """The lines that `causalattn bench operators` prints."""
    yield f"{result.device}, torch {torch.__version__}; {result.shape}"
    yield f"{'':<34}  {'ms':>10}  {'plain torch ms':>14}  {'plain / ours':>12}"
    for row in result.rows:
        plain = "not run" if row.plain is None else f"{row.plain:.2f}"
        yield f"{row.name:<34}  {row.ours:>10.2f}  {plain:>14}  {f'{row.ratio:.2f}' if row.ratio else '':>12}"
    yield "plain torch forms the T × T matrix; for attention it is torch's own kernel, which forms none"


def _probs(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    x = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        x = x.masked_fill_(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1), -torch.inf)
    return x.softmax(-1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _plain_row_statistics(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    A = _probs(q, k)
    return torch.stack([A.amax(-1), torch.special.entr(A).sum(-1), A.square().sum(-1), A.tril(-1).sum(-1)])


def _row_statistics(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    stats = attention_stats(q, k, want=("max", "entropy", "sum_sq", "below"))
    return torch.stack([stats.max, stats.entropy, stats.sum_sq, stats.below])


def _plain_dag_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    A = _probs(q, k)
    return A.tril(-1).sum((-1, -2)) / A.sum((-1, -2))


def _plain_asymmetry(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q @ k.mT
    return (x - x.mT).flatten(-2).norm(dim=-1) / (x + x.mT).flatten(-2).norm(dim=-1)


def _plain_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    A, T = _probs(q, k), q.shape[2]
    edges = torch.arange(CELLS + 1, device=q.device) * T // CELLS
    sums = F.pad(A.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0))[..., edges, :][..., edges]
    size = edges.diff()
    return sums.diff(dim=-1).diff(dim=-2) / (size[:, None] * size)


def _plain_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    A = _probs(q, k)
    return torch.cdist(A @ v, v).mul_(A).div_(1 - A).sum(-1)


def _plain_correlation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    A = _probs(q, k).double()
    C = A @ A.mT
    deviation = C.diagonal(dim1=-2, dim2=-1).sqrt()
    return C / deviation[..., :, None] / deviation[..., None, :]


def _linear_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention_matrix(q, k) @ v


@functools.lru_cache(1)
def _tests(device: torch.device) -> tuple[Tensor, Tensor]:
    """Correlations of ROWS variables, and TESTS tests of two of them given two others."""
    generator = torch.Generator(device).manual_seed(0)
    R = torch.corrcoef(torch.randn(ROWS, 4 * ROWS, generator=generator, device=device, dtype=torch.float64))
    return (R + R.mT) / 2, torch.rand(TESTS, ROWS, generator=generator, device=device).topk(4).indices


def _partial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    R, tokens = _tests(q.device)
    return partial_correlation(R, tokens[:, 0], tokens[:, 1], tokens[:, 2:]).r


def _plain_partial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    R, tokens = _tests(q.device)
    K = torch.linalg.inv(R[tokens[:, :, None], tokens[:, None]])
    return -K[:, 0, 1] / (K[:, 0, 0] * K[:, 1, 1]).sqrt()


# name, ours, plain torch, whether that forms T × T
CASES: tuple[tuple[str, Call, Call, bool], ...] = (
    ("attention, causal", lambda q, k, v: attention(q, k, v, causal=True).out, _sdpa, False),
    ("row statistics", _row_statistics, _plain_row_statistics, True),
    ("dag_score", lambda q, k, v: dag_score(q, k), _plain_dag_score, True),
    ("score_asymmetry", lambda q, k, v: score_asymmetry(q, k), _plain_asymmetry, True),
    (f"{ROWS} rows", lambda q, k, v: attention_rows(q, k, range(ROWS)),
     lambda q, k, v: _probs(q, k)[:, :, :ROWS], True),
    (f"top {TOP} of every row", lambda q, k, v: attention_topk(q, k, TOP).values,
     lambda q, k, v: _probs(q, k).topk(TOP).values, True),
    (f"map of {CELLS} × {CELLS} cells", lambda q, k, v: attention_map(q, k, CELLS).mean, _plain_map, True),
    ("cut of every edge", lambda q, k, v: edge_effects(q, k, v, kind="cut", want=("row",)).row, _plain_cut, True),
    ("correlation of A Aᵀ, float64", lambda q, k, v: attention_correlation(q, k), _plain_correlation, True),
    ("linear attention, causal", lambda q, k, v: linear_attention(q, k, v).out, _linear_again, True),
    ("Hopfield retrieval, T patterns", lambda q, k, v: hopfield_retrieve(q, k).state,
     lambda q, k, v: _probs(q, k) @ k, True),
    (f"{TESTS:,} tests given 2 tokens", _partial, _plain_partial, False),
)  # fmt: skip


def _check(name: str, got: Tensor, expected: Tensor) -> None:
    """Both in float32 against one another: a wrong operator is off by far more than roundings."""
    error = (got.double() - expected.double()).abs().max()
    if not error <= 1e-4 * expected.abs().max():
        raise RuntimeError(f"{name} differs from plain torch by {float(error):.3g}")

"""How the time of softmax and of linear attention grows with T on this machine: measured, fitted, and where they cross.

exponent: the slope of log(time) over log(T) by least squares, over the lengths within a factor 16 of the longest
crossover: the T from which linear attention stays the faster, by interpolation of both logs
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import linear_attention, linear_attention_matrix

LENGTHS = tuple(2**n for n in range(8, 17))
SOFTMAX, LINEAR = "softmax", "linear"
FIT = 16
# a point is measured for so long, or once if one call takes longer
SECONDS = 0.5


class Point(NamedTuple):
    """One length: milliseconds of a call, None where it was not run because it would have taken too long."""

    T: int
    softmax: float | None
    linear: float | None

    @property
    def ratio(self) -> float | None:
        """How many times as long softmax attention takes."""
        return self.softmax / self.linear if self.softmax and self.linear else None


class Complexity(NamedTuple):
    """What `measure_complexity` saw; exponents and crossover are None where there are too few points."""

    points: tuple[Point, ...]
    exponents: dict[str, float | None]
    crossover: float | None
    shape: str
    device: str

    def to_json(self) -> str:
        points = [{**point._asdict(), "ratio": point.ratio} for point in self.points]
        return json.dumps({**self._asdict(), "points": points, "torch": torch.__version__}, indent=1)


def measure_complexity(
    lengths: Sequence[int] = LENGTHS,
    *,
    heads: int = 4,
    dim: int = 64,
    tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    longest: float = 20.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Complexity:
    """Time causal softmax attention (torch's fastest) against causal linear attention (elu + 1, normalised).

    Args:
        lengths: T of each point, increasing.
        heads, dim: H and D = V of every call.
        tokens: B·T to keep constant, B = max(1, tokens // T); by default B = 1.
        device, dtype: where and in what; by default CUDA where there is one, bfloat16 there and float32 on a CPU.
        longest: the seconds beyond which a call is not made; the last one of its kind tells how long it would take.
        progress: called with (done, total) points.

    Returns:
        Complexity: medians of calls repeated for half a second, after a check of both against their O(T²) formulas.

    Raises:
        ValueError: lengths that are empty, not positive or not increasing.

    Example:
        >>> measure_complexity([64, 128, 256]).points[0].T
        64
    """
    lengths = list(lengths)
    if not lengths or lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths)):
        raise ValueError(f"lengths must be positive and increasing, got {lengths}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    _check(*make_inputs(1, 1, min(lengths[0], 256), dim, device, dtype))
    points = []
    for done, T in enumerate(lengths):
        progress(done, len(lengths))
        qkv = make_inputs(1 if tokens is None else max(1, tokens // T), heads, T, dim, device, dtype)
        before = points[-1] if points else None
        times = {
            name: None if _expected(before, name, power, T, tokens) > longest else milliseconds(function, qkv)
            for name, power, function in ((SOFTMAX, 2, _softmax), (LINEAR, 1, _linear))
        }
        points.append(Point(T, **times))
    progress(len(lengths), len(lengths))
    each = "B = 1" if tokens is None else f"B·T = {tokens}"
    return Complexity(
        tuple(points),
        {name: fitted_exponent(points, name) for name in (SOFTMAX, LINEAR)},
        crossover(points),
        f"{each}, {heads} heads, D = {dim}, {str(dtype).removeprefix('torch.')}",
        device_name(device),
    )


def fitted_exponent(points: Sequence[Point], name: str) -> float | None:
    """The slope of log(time) over log(T), of the lengths within a factor 16 of the longest that was run."""
    timed = [(point.T, getattr(point, name)) for point in points if getattr(point, name)]
    timed = [(math.log(T), math.log(ms)) for T, ms in timed if T * FIT >= timed[-1][0]]
    if len(timed) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*timed, strict=True))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def crossover(points: Sequence[Point]) -> float | None:
    """The T from which linear attention stays the faster; 0 where it is at every length, None where it never is."""
    both = [(point.T, math.log(point.ratio)) for point in points if point.ratio]
    slower = [n for n, (_, ratio) in enumerate(both) if ratio <= 0]
    if not both or both[-1][1] <= 0:
        return None
    if not slower:
        return 0.0
    (T0, low), (T1, high) = both[slower[-1]], both[slower[-1] + 1]
    return T0 * (T1 / T0) ** (-low / (high - low))


def table(result: Complexity) -> Iterator[str]:
    """The lines that `causalattn bench complexity` prints."""
    yield f"{result.device}, torch {torch.__version__}; {result.shape}"
    yield f"{'T':>8}  {'softmax ms':>12}  {'linear ms':>12}  {'softmax / linear':>16}"
    for point in result.points:
        softmax, linear = (f"{ms:.3f}" if ms else "not run" for ms in point[1:])
        yield f"{point.T:>8}  {softmax:>12}  {linear:>12}  {f'{point.ratio:.2f}' if point.ratio else '':>16}"
    grown = ", ".join(f"{name} as T^{power:.2f}" for name, power in result.exponents.items() if power is not None)
    yield f"time grows, over the last factor {FIT} of T: {grown or 'too few points'}"
    yield verdict(result)


def verdict(result: Complexity) -> str:
    """Which of the two to choose here, in a sentence."""
    if result.crossover is None:
        return "Softmax attention is the faster choice at every length measured here."
    if result.crossover == 0:
        return "Linear attention is the faster at every length measured here."
    return f"Below T ≈ {result.crossover:.0f} softmax attention is the faster choice, above it linear attention."


def make_inputs(B: int, H: int, T: int, D: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(T)
    return [torch.randn(B, H, T, D, generator=generator, device=device, dtype=dtype) for _ in range(3)]


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v).out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    wide = [x.double() for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT * q.shape[3] ** -0.5
    seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    softmax = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[2]
    linear = linear_attention_matrix(*wide[:2]) @ wide[2]
    for got, exact in ((_softmax(q, k, v), softmax), (_linear(q, k, v), linear)):
        assert (got - exact).abs().max() <= 16 * torch.finfo(q.dtype).eps * exact.abs().max()


def _expected(before: Point | None, name: str, power: int, T: int, tokens: int | None) -> float:
    """The seconds that a call will take if it grows as it should; ∞ once one was not made."""
    if before is None:
        return 0.0
    ms = getattr(before, name)
    return math.inf if ms is None else ms / 1e3 * (T / before.T) ** (power - (tokens is not None))


def milliseconds(function: Callable[..., Tensor], args: list[Tensor]) -> float:
    def once() -> float:
        start = time.perf_counter()
        function(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # the first call compiles and warms up
    times = [once()]
    if times[0] < SECONDS:
        times = [once() for _ in range(max(3, min(200, int(SECONDS / max(times[0], 1e-6)))))]
    return 1e3 * sorted(times)[len(times) // 2]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_devicedevice_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

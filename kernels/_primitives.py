"""What two or more kernels share: tile loads, masked base-2 scores, the online softmax, and who launches how."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# finite stand-ins for −inf: a running maximum starts above every forbidden score, so no difference is ever NaN
FLOOR = tl.constexpr(-1e30)
FORBIDDEN = tl.constexpr(-2e30)
# the interpreter multiplies bfloat16 tiles as if their bits were integers, so there they are widened first
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Launch(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def architecture(x: torch.Tensor) -> int:
    """Compute capability × 10 of x's GPU, 0 for AMD and for the interpreter."""
    if not x.is_cuda or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@triton.jit
def load_rows(ptr, offs, count, stride_row, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows offs of a [count, D] matrix, 0 beyond it: [len(offs), BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=(offs[:, None] < count) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def load_intervals(start_ptr, stop_ptr, offs, T):
    """start and stop of rows offs; rows past T are empty."""
    start = tl.load(start_ptr + offs, mask=offs < T, other=0)
    stop = tl.load(stop_ptr + offs, mask=offs < T, other=0)
    return start, stop


@triton.jit
def interval_bounds(start, stop, exists):
    """First and last key that some row may attend, then those that every existing row may attend."""
    low = tl.min(tl.where(stop > start, start, 2147483647), 0)
    inner_low = tl.max(tl.where(exists, start, 0), 0)
    inner_high = tl.min(tl.where(exists, stop, 2147483647), 0)
    return low, tl.max(stop, 0), inner_low, inner_high


@triton.jit
def dot(a, b):
    """a @ b in float32, exact products: TF32 would cost float32 inputs 13 bits."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh in float32, good to a rounding near 0 too, where 1 − e^{−2x} would cancel (Cephes' polynomial)."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    return tl.where(z < 0.390625, near, tl.where(x < 0, -far, far))


@triton.jit
def base2_scores(dots, scale, softcap):
    """scale · dots, capped if softcap is given, in units of log 2."""
    if softcap is None:
        x = dots * (scale * LOG2E)
    else:
        x = tanh(dots * (scale / softcap)) * (softcap * LOG2E)
    return x


@triton.jit
def add_bias(x, bias_ptr, offs_row, offs_key, T, S, stride_t, stride_s):
    """x plus the bias of a tile of rows and keys, never below FORBIDDEN; offs_row and offs_key broadcast to x."""
    ptrs = bias_ptr + offs_row.to(tl.int64) * stride_t + offs_key.to(tl.int64) * stride_s
    bias = tl.load(ptrs, mask=(offs_row < T) & (offs_key < S), other=0.0)
    x += bias.to(tl.float32) * LOG2E
    return tl.where(x < FORBIDDEN, FORBIDDEN, x)


@triton.jit
def normalizer(m_i, l_i, sink):
    """From a row's maximum and sum, with a learned sink logit or None: lse in base 2 and exp2(m_i − lse)."""
    if sink is None:
        lse = m_i + tl.log2(l_i)
        unit = 1.0 / l_i
    else:
        pivot = tl.maximum(m_i, sink)
        total = l_i * tl.exp2(m_i - pivot) + tl.exp2(sink - pivot)
        lse = pivot + tl.log2(total)
        unit = tl.exp2(m_i - pivot) / total
    return tl.where(l_i == 0, float("-inf"), lse), tl.where(l_i == 0, 0.0, unit)

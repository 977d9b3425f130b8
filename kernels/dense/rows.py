"""Row statistics of an attention matrix at hand, and what each key receives, from one reading of it.

    max_j A_ij;  mass Σ_j A_ij;  entropy −Σ_j A_ij log A_ij;  sum_sq Σ_j A_ij²;  below Σ_{j < p_i} A_ij;
    distance Σ_j A_ij |p_i − j|;  received Σ_i A_ij

Shapes: A [B, H, T, S], entries ≥ 0, any strides, read by 16 bytes where rows are contiguous and aligned; rows
[wanted, B, H, T] and received [B, H, S], float64. A statistic's slot is a constexpr, −1 where it is not wanted and
not computed.
Precision: float32 in a tile (a row's tile is SPAN keys), float64 across tiles, in one order.
Cost: A once, so [1, 32, 4096, 4096] in bfloat16 takes 0.22 ms at 4.8 TB/s and 0.45 ms in float32. Partial sums add 1 %
and received 6 % in 16 bits (3 % in float32). Hopper issues 12 instructions an entry in the time that 16 bits take and
25 in that of float32; the entropy takes 16, all row statistics 25: in 16 bits they are the bound.
"""

import torch
import triton
import triton.language as tl

from .._primitives import LN2, Launch, architecture

ROWS = ("max", "mass", "entropy", "sum_sq", "below", "distance")
# keys that one program sums in float32: a constant, or bits would depend on the shape
SPAN = 2048


def launch(itemsize: int, arch: int) -> Launch:
    """A thread holds 16 bytes of each of its rows, four rows where a warp has 32 lanes; arch is `architecture`'s."""
    return Launch(64, 512 // itemsize, 8 if arch in (0, 80) else 16, 1)


@triton.jit
def _log2(x):
    """log2 of a positive float32, good to a rounding near 1 too; finite, so that 0 · log2(0) = 0."""
    bits = x.to(tl.int32, bitcast=True)
    # x = 2^e · (1 + f) with 1 + f from √½ to √2
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = 0.12583689 * f - 0.20726968
    p = (p * f + 0.21571562) * f - 0.23894483
    p = (p * f + 0.28791624) * f - 0.36070368
    p = (p * f + 0.48091063) * f - 0.72134733
    p = p * f + 1.44269502
    return f * p + exponent.to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def _lanes(x, LANES: tl.constexpr):
    """Sums over the neighbours that one thread holds: [BLOCK_M, LANES] of x [BLOCK_M, BLOCK_N]."""
    return tl.sum(tl.reshape(x, [x.shape[0], LANES, x.shape[1] // LANES]), 2)


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _dense_rows_kernel(
    A_ptr, rows_ptr, received_ptr,
    stride_ab, stride_ah, stride_at, stride_as,
    stride_rs, stride_rn,
    stride_cm,
    H, T, S, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr,
    MAX: tl.constexpr, MASS: tl.constexpr, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr,
    BELOW: tl.constexpr, DISTANCE: tl.constexpr,
):
    spans, blocks = tl.cdiv(S, SPAN), tl.cdiv(T, BLOCK_M)
    pid_s = tl.program_id(0) % spans
    pid_m = tl.program_id(0) // spans % blocks
    pid_bh = (tl.program_id(0) // spans // blocks).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    first = pid_m * BLOCK_M + offset  # the position of the first row
    position = offs_m[:, None] + offset
    A_ptr += pid_bh // H * stride_ab + pid_bh % H * stride_ah
    row_ptrs = A_ptr + offs_m[:, None].to(tl.int64) * stride_at

    largest = tl.zeros([BLOCK_M, LANES], tl.float32)
    mass, entropy, sum_sq, below, distance = largest, largest, largest, largest, largest
    for n in range(pid_s * SPAN, tl.minimum(pid_s * SPAN + SPAN, S), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)[None, :]
        ptrs = row_ptrs + offs_n.to(tl.int64) * stride_as
        if (pid_m * BLOCK_M + BLOCK_M <= T) & (n + BLOCK_N <= S):
            a = tl.load(ptrs).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        else:
            a = tl.load(ptrs, mask=mask_m[:, None] & (offs_n < S), other=0.0).to(tl.float32)
        if (MASS >= 0) | (BELOW >= 0):
            part = _lanes(a, LANES)
            mass += part
        if BELOW >= 0:
            if n + BLOCK_N <= first:
                below += part
            elif n < first + BLOCK_M:
                below += _lanes(tl.where(offs_n < position, a, 0.0), LANES)
        if MAX >= 0:
            largest = tl.maximum(largest, tl.max(tl.reshape(a, [BLOCK_M, LANES, BLOCK_N // LANES]), 2))
        if ENTROPY >= 0:
            entropy -= _lanes(a * _log2(a), LANES)
        if SUM_SQ >= 0:
            sum_sq += _lanes(a * a, LANES)
        if DISTANCE >= 0:
            distance += _lanes(a * tl.abs(position.to(tl.float32) - offs_n.to(tl.float32)), LANES)
        if received_ptr is not None:
            # a few rows at a time; padded to whole tiles, so no store needs a mask
            column = tl.sum(tl.sum(tl.reshape(a, [BLOCK_M // 8, 8, BLOCK_N]), 0), 0)
            tl.store(received_ptr + (pid_bh * blocks + pid_m) * stride_cm + n + tl.arange(0, BLOCK_N), column)

    rows_ptr += pid_s * stride_rs + pid_bh * T + offs_m
    if MAX >= 0:
        tl.store(rows_ptr + MAX * stride_rn, tl.max(largest, 1), mask=mask_m)
    if MASS >= 0:
        tl.store(rows_ptr + MASS * stride_rn, tl.sum(mass, 1), mask=mask_m)
    if ENTROPY >= 0:
        tl.store(rows_ptr + ENTROPY * stride_rn, tl.sum(entropy, 1) * LN2, mask=mask_m)
    if SUM_SQ >= 0:
        tl.store(rows_ptr + SUM_SQ * stride_rn, tl.sum(sum_sq, 1), mask=mask_m)
    if BELOW >= 0:
        tl.store(rows_ptr + BELOW * stride_rn, tl.sum(below, 1), mask=mask_m)
    if DISTANCE >= 0:
        tl.store(rows_ptr + DISTANCE * stride_rn, tl.sum(distance, 1), mask=mask_m)


def dense_rows_fwd(A: torch.Tensor, offset: int, want: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistics among ROWS and "received" that want names; received is [B, H, 0] where it is not wanted."""
    B, H, T, S = A.shape
    names = [name for name in want if name != "received"]
    tiles = launch(A.element_size(), architecture(A))
    spans, blocks = triton.cdiv(S, SPAN), triton.cdiv(T, tiles.BLOCK_M)
    rows = torch.empty(spans, len(names), B, H, T, dtype=torch.float32, device=A.device)
    received = None
    if "received" in want:
        width = triton.cdiv(S, tiles.BLOCK_N) * tiles.BLOCK_N
        received = torch.empty(B, H, blocks, width, dtype=torch.float32, device=A.device)
    if A.numel() > 0:
        _dense_rows_kernel[(spans * blocks * B * H,)](
            A, rows, received,
            *A.stride(), *rows.stride()[:2], 0 if received is None else received.stride(2),
            H, T, S, offset,
            LANES=tiles.BLOCK_N * A.element_size() // 16, SPAN=SPAN,
            **{name.upper(): names.index(name) if name in names else -1 for name in ROWS},
            **tiles._asdict(), enable_fp_fusion=True,
        )
    sums = rows.sum(0, dtype=torch.float64)
    if "max" in names and spans > 1:
        sums[names.index("max")] = rows[:, names.index("max")].amax(0)
    if received is None:
        return sums, sums.new_empty(B, H, 0)
    return sums, received[..., :S].sum(2, dtype=torch.float64)

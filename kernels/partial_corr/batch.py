"""Partial correlations of many pairs, each given a small set of its own.

    r(i, j | S) = h_ij / √(h_ii h_jj),  h_ab = R_ab − w_a·w_b,  w_a = L⁻¹ R_Sa,  L Lᵀ = R_SS

Shapes: R [G, T, T] contiguous, float32 or float64; members [G or 1, N, M + 2] int64, of each test its set (−1 pads it),
then i and j; rows [G, T, S] float32, any strides; r [G, N] in R's dtype, status [G, N] int8.
Precision: R's dtype. A test of which a pivot (of R_SS, h_ii, h_jj) is not above floor, or that names a token out of
range, is SINGULAR and its r NaN; where |r| is 1 but for 16 roundings over the smallest pivot it is CLIPPED to ±1. A
test that rows form again is summed and solved in float64, whose products of float32 numbers are exact.
Cost: (M + 2)(M + 1)/2 gathered entries, about (M + 2)³/6 multiply-adds and M + 1 roots a test; 8(M + 2) bytes in and
at most 9 out. At M = 3 that is 10 entries, 21 multiply-adds and 49 bytes: 10⁸ tests move 4.9 GB, 1.0 ms at 4.8 TB/s.
"""

import torch
import triton
import triton.language as tl

from ._factor import SINGULAR, decide, factorize, solve, unexplained

# with more members a factor does not fit a thread's registers: a warp takes a test
LANE = 8
BLOCK_N = 128
# float64 products of rows that a warp holds
PRODUCTS = 1024


@triton.jit(do_not_specialize=["N", "T", "floor"])
def _partial_corr_kernel(
    R_ptr, members_ptr, r_ptr, status_ptr,
    stride_mg,
    N, T, floor,
    M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A test a lane."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid_g = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    R_ptr += pid_g * T * T
    members_ptr += pid_g * stride_mg + offs_n * (M + 2)

    members, inside = (), mask_n
    for m in tl.static_range(M + 2):
        token = tl.load(members_ptr + m, mask=mask_n, other=0)
        inside &= (token >= (-1 if m < M else 0)) & (token < T)
        members = members + (token,)
    entries = ()
    for a in tl.static_range(1, M + 2):
        for b in tl.static_range(a):
            known = inside & (members[a] >= 0) & (members[b] >= 0)
            entries = entries + (tl.load(R_ptr + members[a] * T + members[b], mask=known, other=0.0),)

    one = tl.full([BLOCK_N], 1.0, R_ptr.dtype.element_ty)
    factor, pivot = factorize(entries, M, one)
    w_i = solve(factor, entries, M * (M - 1) // 2, M)
    w_j = solve(factor, entries, (M + 1) * M // 2, M)
    covariance = entries[(M + 1) * M // 2 + M]
    for m in tl.static_range(M):
        covariance -= w_i[m] * w_j[m]
    r, status = decide(covariance, unexplained(w_i, M, one), unexplained(w_j, M, one), pivot, floor)
    tl.store(r_ptr + pid_g * N + offs_n, tl.where(inside, r, float("nan")), mask=mask_n)
    tl.store(status_ptr + pid_g * N + offs_n, tl.where(inside, status, SINGULAR).to(tl.int8), mask=mask_n)


@triton.jit
def _gram(rows_ptr, token, known, stride_t, stride_s, S, BLOCK_S: tl.constexpr):
    """Correlations of the rows of some tokens, summed in float64: [len(token), len(token)]."""
    total = tl.zeros([token.shape[0], token.shape[0]], tl.float64)
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        ptrs = rows_ptr + token[:, None] * stride_t + offs_s[None, :].to(tl.int64) * stride_s
        x = tl.load(ptrs, mask=known[:, None] & (offs_s[None, :] < S), other=0.0).to(tl.float64)
        total += tl.sum(x[:, None, :] * x[None, :, :], 2)
    slot = tl.arange(0, token.shape[0])
    norm = tl.sqrt(tl.sum(tl.where(slot[:, None] == slot[None, :], total, 0.0), 1))
    return total / (norm[:, None] * norm[None, :])


@triton.jit(do_not_specialize=["N", "T", "S", "floor"])
def _partial_corr_wide_kernel(
    R_ptr, rows_ptr, members_ptr, r_ptr, status_ptr,
    stride_ag, stride_at, stride_as, stride_mg,
    N, T, S, floor,
    M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """A test a program, its matrix a tile; with rows only a test that R could not decide."""
    pid_g, pid_n = (tl.program_id(0) // N).to(tl.int64), (tl.program_id(0) % N).to(tl.int64)
    status_ptr += pid_g * N + pid_n
    wanted = True
    if rows_ptr is not None:
        wanted = tl.load(status_ptr) == SINGULAR
    if wanted:
        slot = tl.arange(0, BLOCK_K)
        token = tl.load(members_ptr + pid_g * stride_mg + pid_n * (M + 2) + slot, mask=slot < M + 2, other=-1)
        least = tl.where((slot == M) | (slot == M + 1), 0, -1)
        foreign = tl.sum(((token < least) | (token >= T)).to(tl.int32), 0)
        token = tl.where(foreign > 0, -1, token)
        known = token >= 0
        if rows_ptr is not None:
            matrix = _gram(rows_ptr + pid_g * stride_ag, token, known, stride_at, stride_as, S, BLOCK_S)
        else:
            ptrs = R_ptr + pid_g * T * T + token[:, None] * T + token[None, :]
            matrix = tl.load(ptrs, mask=known[:, None] & known[None, :], other=0.0)
        diagonal = slot[:, None] == slot[None, :]
        matrix = tl.where(diagonal, 1.0, tl.where(known[:, None] & known[None, :], matrix, 0.0))

        pivot = tl.sum(tl.sum(tl.where(diagonal & (slot[:, None] == 0), matrix, 0.0), 1), 0)
        for m in range(M):
            column = tl.sum(tl.where(slot[None, :] == m, matrix, 0.0), 1)
            left = tl.sum(tl.where(slot == m, column, 0.0), 0)
            pivot = tl.minimum(pivot, left)
            column = tl.where(slot > m, column, 0.0)
            matrix -= column[:, None] * (column / left)[None, :]
        last = tl.sum(tl.where(slot[None, :] == M + 1, matrix, 0.0), 1)
        left_i = tl.sum(tl.sum(tl.where(diagonal & (slot[:, None] == M), matrix, 0.0), 1), 0)
        covariance, left_j = tl.sum(tl.where(slot == M, last, 0.0), 0), tl.sum(tl.where(slot == M + 1, last, 0.0), 0)
        r, status = decide(covariance, left_i, left_j, pivot, floor)
        tl.store(r_ptr + pid_g * N + pid_n, tl.where(foreign > 0, float("nan"), r))
        tl.store(status_ptr, tl.where(foreign > 0, SINGULAR, status).to(tl.int8))


def partial_corr_fwd(
    R: torch.Tensor, members: torch.Tensor, rows: torch.Tensor | None, floor: float, rows_floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """r and status, [G, N]; rows decide again, with rows_floor, what R leaves SINGULAR."""
    G, T, _ = R.shape
    N, M = members.shape[1], members.shape[2] - 2
    r = torch.empty(G, N, dtype=R.dtype, device=R.device)
    status = torch.empty(G, N, dtype=torch.int8, device=R.device)
    if r.numel() == 0:
        return r, status
    stride_mg = members.stride(0) if members.shape[0] > 1 else 0
    BLOCK_K = triton.next_power_of_2(M + 2)
    wide = {"M": M, "BLOCK_K": BLOCK_K, "BLOCK_S": min(32, PRODUCTS // BLOCK_K**2), "num_warps": 1}
    if M <= LANE:
        _partial_corr_kernel[(triton.cdiv(N, BLOCK_N) * G,)](
            R, members, r, status, stride_mg, N, T, floor,
            M=M, BLOCK_N=BLOCK_N, num_warps=BLOCK_N // 32, enable_fp_fusion=True,
        )
    else:
        _partial_corr_wide_kernel[(N * G,)](
            R, None, members, r, status, 0, 0, 0, stride_mg, N, T, 0, floor,
            **wide, enable_fp_fusion=True,
        )
    if rows is not None:
        _partial_corr_wide_kernel[(N * G,)](
            R, rows, members, r, status, *rows.stride(), stride_mg, N, T, rows.shape[2], rows_floor,
            **wide, enable_fp_fusion=True,
        )
    return r, status

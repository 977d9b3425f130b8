"""Every test of a level, each pair's least |r| and the set that gave it: no test is written out.

    order 1     r(i, j | k) = (R_ij − R_ik R_jk) / √((1 − R_ik²)(1 − R_jk²)) for every k next to i or to j
    by sets     r(node, j | S) of `batch` for every j next to the node, one factor of R_SS serving them all

Shapes: R [G, T, T] contiguous, float32 or float64, the same across the diagonal; adjacency, ancestors [G, T, T] bool;
inverse [G, T, T], 1 / √(1 − R²) or NaN where 1 − R² is not above the floor; first [G, T + 1] int32, where a node's sets
begin in given [G, N, M] int64, −1 padding a set. r [G, T, T] and the place of its set [G, T, T] int32, −1 for none;
counts [G, T, 2], tests and SINGULAR ones of each node.
Precision: R's dtype. Equal |r| fall to the smaller k, or to the set that comes first. A program takes every SPLITS-th
set of a node and their results are joined in order: no atomics, one answer.
Cost: at order 1 a test takes six float64 instructions and the T³/2 of them at T = 512 are 67 M, so an H200's 3.4·10¹³
flops a second allow 0.02 ms; a head has 136 tiles, fewer than half its SMs hold. By sets a test takes M² + 3M
multiply-adds and a root, a set M³/6, and what is read, (M + 1)·T entries a set, is shared by T tests.
"""

import torch
import triton
import triton.language as tl

from ._factor import SINGULAR, decide, factorize, solve, unexplained

BLOCK = 32
BLOCK_J = 128
SPLITS = 8


@triton.jit(do_not_specialize=["T"])
def _level_one_kernel(
    R_ptr, inverse_ptr, adjacency_ptr, r_ptr, place_ptr,
    T,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK)
    pid_n = tl.program_id(0) % blocks
    pid_m = tl.program_id(0) // blocks % blocks
    head = (tl.program_id(0) // blocks // blocks).to(tl.int64) * T * T
    if pid_n >= pid_m:
        offs_i, offs_j = pid_m * BLOCK + tl.arange(0, BLOCK), pid_n * BLOCK + tl.arange(0, BLOCK)
        mask_i, mask_j = offs_i < T, offs_j < T
        pairs = head + offs_i[:, None] * T + offs_j[None, :]
        mask = mask_i[:, None] & mask_j[None, :]
        R = tl.load(R_ptr + pairs, mask=mask, other=0.0)  # [BLOCK, BLOCK]
        least = tl.full([BLOCK, BLOCK], float("inf"), R.dtype)
        place = tl.full([BLOCK, BLOCK], -1, tl.int32)
        for k in range(T):
            row = head + k * T
            a = tl.load(R_ptr + row + offs_i, mask=mask_i, other=0.0)
            b = tl.load(R_ptr + row + offs_j, mask=mask_j, other=0.0)
            # NaN where k cannot be given, k = i and k = j among them
            a_inverse = tl.load(inverse_ptr + row + offs_i, mask=mask_i, other=0.0)
            b_inverse = tl.load(inverse_ptr + row + offs_j, mask=mask_j, other=0.0)
            near = tl.load(adjacency_ptr + row + offs_i, mask=mask_i, other=0)[:, None]
            near |= tl.load(adjacency_ptr + row + offs_j, mask=mask_j, other=0)[None, :]
            r = (R - a[:, None] * b[None, :]) * a_inverse[:, None] * b_inverse[None, :]
            better = (tl.abs(r) < tl.abs(least)) & (near != 0)
            least = tl.where(better, r, least)
            place = tl.where(better, k, place)
        tl.store(r_ptr + pairs, least, mask=mask)
        tl.store(place_ptr + pairs, place, mask=mask)


@triton.jit(do_not_specialize=["T", "N", "floor"])
def _level_sets_kernel(
    R_ptr, adjacency_ptr, ancestors_ptr, first_ptr, given_ptr, r_ptr, place_ptr, counts_ptr,
    T, N, floor,
    M: tl.constexpr, SPLITS: tl.constexpr, BLOCK_J: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_J)
    pid_j, pid_s = tl.program_id(0) % blocks, tl.program_id(0) // blocks % SPLITS
    node = tl.program_id(0) // blocks // SPLITS % T
    pid_g = (tl.program_id(0) // blocks // SPLITS // T).to(tl.int64)
    head = pid_g * T * T
    offs_j = pid_j * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_j = offs_j < T
    next_to = mask_j & (tl.load(adjacency_ptr + head + node * T + offs_j, mask=mask_j, other=0) != 0)
    direct = tl.load(R_ptr + head + node * T + offs_j, mask=mask_j, other=0.0)
    one = tl.full([BLOCK_J], 1.0, R_ptr.dtype.element_ty)
    unit = tl.full([], 1.0, R_ptr.dtype.element_ty)

    least = tl.full([BLOCK_J], float("inf"), R_ptr.dtype.element_ty)
    place = tl.full([BLOCK_J], -1, tl.int32)
    tests, singular = tl.zeros([BLOCK_J], tl.int32), tl.zeros([BLOCK_J], tl.int32)
    first, last = tl.load(first_ptr + pid_g * (T + 1) + node), tl.load(first_ptr + pid_g * (T + 1) + node + 1)
    for n in range(first + pid_s, last, SPLITS):
        S, entries, to_node, to_j, admitted = (), (), (), (), next_to
        for m in tl.static_range(M):
            token = tl.load(given_ptr + (pid_g * N + n) * M + m)
            there = (token >= 0) & (token < T)
            mask = offs_j < tl.where(there, T, 0)
            for c in tl.static_range(m):
                entries = entries + (tl.load(R_ptr + head + token * T + S[c], mask=there & (S[c] >= 0), other=0.0),)
            to_node = to_node + (tl.load(R_ptr + head + token * T + node, mask=there, other=0.0),)
            to_j = to_j + (tl.load(R_ptr + head + token * T + offs_j, mask=mask, other=0.0),)
            admitted &= (offs_j != token) & (node != token)
            if ancestors_ptr is not None:
                may = tl.load(ancestors_ptr + head + token * T + node, mask=there, other=1)
                may |= tl.load(ancestors_ptr + head + token * T + offs_j, mask=mask, other=1)
                admitted &= may != 0
            S = S + (tl.where(there, token, -1),)
        factor, pivot = factorize(entries, M, unit)
        w_i, w_j = solve(factor, to_node, 0, M), solve(factor, to_j, 0, M)
        covariance = direct
        for m in tl.static_range(M):
            covariance -= w_i[m] * w_j[m]
        r, status = decide(covariance, unexplained(w_i, M, unit), unexplained(w_j, M, one), pivot, floor)
        tests += admitted.to(tl.int32)
        singular += (admitted & (status == SINGULAR)).to(tl.int32)
        # a NaN is never less
        better = admitted & (tl.abs(r) < tl.abs(least))
        least = tl.where(better, r, least)
        place = tl.where(better, n, place)
    out = ((pid_g * SPLITS + pid_s) * T + node) * T + offs_j
    tl.store(r_ptr + out, least, mask=mask_j)
    tl.store(place_ptr + out, place, mask=mask_j)
    counts_ptr += (((pid_g * T + node) * SPLITS + pid_s) * blocks + pid_j) * 2
    tl.store(counts_ptr, tl.sum(tests, 0))
    tl.store(counts_ptr + 1, tl.sum(singular, 0))


def level_one_fwd(
    R: torch.Tensor, inverse: torch.Tensor, adjacency: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """r and place above the diagonal; ∞ and −1 where no test was made, anything on it and below."""
    G, T, _ = R.shape
    r, place = torch.empty_like(R), torch.empty(R.shape, dtype=torch.int32, device=R.device)
    if R.numel() > 0:
        _level_one_kernel[(triton.cdiv(T, BLOCK) ** 2 * G,)](
            R, inverse, adjacency.view(torch.int8), r, place, T, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return r, place


def level_sets_fwd(
    R: torch.Tensor,
    adjacency: torch.Tensor,
    ancestors: torch.Tensor | None,
    first: torch.Tensor,
    given: torch.Tensor,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """r, place and counts; r is ∞ where no test of a node with its neighbour could be decided."""
    G, T, _ = R.shape
    N, M = given.shape[1:]
    blocks = triton.cdiv(T, BLOCK_J)
    r = torch.empty(G, SPLITS, T, T, dtype=R.dtype, device=R.device)
    place = torch.empty(r.shape, dtype=torch.int32, device=R.device)
    counts = torch.empty(G, T, SPLITS * blocks, 2, dtype=torch.int32, device=R.device)
    if R.numel() > 0:
        _level_sets_kernel[(blocks * SPLITS * T * G,)](
            R, adjacency.view(torch.int8), None if ancestors is None else ancestors.view(torch.int8), first, given,
            r, place, counts, T, N, floor,
            M=M, SPLITS=SPLITS, BLOCK_J=BLOCK_J, num_warps=BLOCK_J // 32, enable_fp_fusion=True,
        )
    # of equal ones the first set: places grow with the set
    size = r.abs()
    tied = torch.where(size == size.amin(1, keepdim=True), place, torch.iinfo(torch.int32).max)
    split = tied.argmin(1, keepdim=True)
    return r.gather(1, split)[:, 0], place.gather(1, split)[:, 0], counts.sum(2)

"""A_ij at a few chosen keys of each row, each row's maximum known.

    out[b, h, i, c] = A_ij = exp2(S_ij / log 2 − pivot_i)·largest_i at j = chosen[b, i, c], 0 where i may not attend j

Shapes: q [B, H, T, D], k [B, H_kv, S, D], start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H], pivot and largest [B, H, T],
chosen [B or 1, T, n] int32, out [B, H, T, n] float32.
Precision: float32 throughout. Cost: one row of k a chosen key; bound by reading k.
"""

import torch
import triton
import triton.language as tl

from .._primitives import head_bias, load_intervals, load_rows, masked_scores, score_strides, slope

BLOCK_M = 32


@triton.jit(do_not_specialize=["T", "S", "N", "offset", "scale", "softcap"])
def _chosen_probs_kernel(
    q_ptr, k_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, pivot_ptr, largest_ptr, chosen_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_cb, stride_ct, stride_cn,
    H, GROUP, T, S, N, offset, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    rows = offs_m.to(tl.int64)
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    pivot = tl.load(pivot_ptr + pid_bh * T + rows, mask=mask_m, other=0.0)
    largest = tl.load(largest_ptr + pid_bh * T + rows, mask=mask_m, other=0.0)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    for c in range(N):
        j = tl.load(chosen_ptr + pid_b * stride_cb + rows * stride_ct + c * stride_cn, mask=mask_m, other=0)
        seen = (j >= start) & (j < stop)
        j = tl.where(seen, j, 0)
        k = load_rows(k_ptr, j, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        x = masked_scores(
            tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), offs_m, j, start, stop, T, S, offset,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, False)
        p = tl.where(seen, tl.exp2(x - pivot) * largest, 0.0)
        tl.store(out_ptr + (pid_bh * T + rows) * N + c, p, mask=mask_m)


def chosen_probs_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    pivot: torch.Tensor,
    largest: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    B, H, T, D = q.shape
    S, N = k.shape[2], chosen.shape[2]
    out = torch.empty(B, H, T, N, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or S == 0:
        return out.zero_()
    _chosen_probs_kernel[(triton.cdiv(T, BLOCK_M) * B * H,)](
        q, k, start, stop, bias, slopes, pivot.contiguous(), largest.contiguous(), chosen, out,
        *score_strides(q, k, start, bias, slopes),
        chosen.stride(0) if chosen.shape[0] > 1 else 0, *chosen.stride()[1:],
        H, H // k.shape[1], T, S, N, offset, scale, softcap or None,
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_M=BLOCK_M, enable_fp_fusion=True,
    )
    return out

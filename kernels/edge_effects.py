"""The effect of an intervention on every edge, each row's maximum known, reduced to rows, columns, the largest and cells.

    e_ij = w / (1 + w)·‖v_j − o_i‖,  λp' − log(1 + w)  or  w / (1 + w)·(g_i·v_j − g_i·o_i),  w = p·(e^λ − 1)
    row_i = Σ_j |e_ij|;  column_j = Σ_i |e_ij|;  the n largest |e_ij| of a row;  Σ |e_ij| over cells

Shapes: q [B, H, T, D], k [B, H_kv, S, D], v [B, H_kv, S, V] or None, start and stop [B or 1, T] int32,
bias [B or 1, H or 1, T or 1, S or 1], slopes [B or 1, H]; pivot, largest, ceiling, dominant, level [B, H, T] float32:
a row's maximum score in base 2 and probability, the score above which an edge is dominant and its effect, g_i·o_i;
left [B, H, T, V]: o, float32, or g; row [B, H, T], column [B, H, S], values and indices [B, H, T, n], cells [B, H, R, C].
gain, shift, lift, tilt, rest: an `Edit`, None for a hard do, and shift None where it is 0.
Precision: float32 scores in base 2 and exact products; ‖v − o‖² from ‖v‖² − 2·o·v + ‖o‖², and by its differences where
that cancels; sums float32 in a tile, float64 across tiles; no atomics, one order.
Cost: 2·(D + V) flops and one exp2 an edge, and a root or two logarithms; o·v in float32 is bound by its products. What
is wanted by column is a pass of its own, and so is the map.
"""

import torch
import triton
import triton.language as tl

from ._primitives import (
    FLOOR,
    LN2,
    Launch,
    architecture,
    block_bounds,
    cell_members,
    dot,
    empty_slots,
    head_bias,
    hold,
    key_tiles,
    load_intervals,
    load_rows,
    masked_scores,
    reached_cells,
    row_tiles,
    score_strides,
    slope,
    take_best,
)

HIGHEST = tl.constexpr(120.0)
CLOSE = tl.constexpr(1 / 16)


def launch(D: int, itemsize: int, arch: int) -> Launch:
    """Tiles by the larger of D and V and by the wider of q and left; arch is `architecture`'s."""
    if arch == 0:
        return Launch(32, 32, 4, 1)
    if itemsize == 4:
        return Launch(32, 16, 4, 1) if D <= 64 else Launch(16, 16, 4, 1)
    return Launch(64, 32, 4, 1) if D <= 128 else Launch(32, 32, 4, 1)


@triton.jit
def _load(ptr, offs, count, stride_row, stride_d, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Rows offs of a matrix, None where there is none."""
    if ptr is None:
        rows = None
    else:
        rows = load_rows(ptr, offs, count, stride_row, stride_d, V, BLOCK_V)
    return rows


@triton.jit
def _load_row_terms(rows_ptr, stride_rn, offs, T, along: tl.constexpr):
    """pivot, largest, ceiling, dominant and level of rows offs, along the axis of a tile."""
    stride_rn = tl.cast(stride_rn, tl.int64)
    pivot = tl.load(rows_ptr + offs, mask=offs < T, other=0.0)
    largest = tl.load(rows_ptr + stride_rn + offs, mask=offs < T, other=0.0)
    ceiling = tl.load(rows_ptr + 2 * stride_rn + offs, mask=offs < T, other=0.0)
    dominant = tl.load(rows_ptr + 3 * stride_rn + offs, mask=offs < T, other=0.0)
    level = tl.load(rows_ptr + 4 * stride_rn + offs, mask=offs < T, other=0.0)
    return (
        tl.expand_dims(pivot, 1 - along), tl.expand_dims(largest, 1 - along), tl.expand_dims(ceiling, 1 - along),
        tl.expand_dims(dominant, 1 - along), tl.expand_dims(level, 1 - along),
    )


@triton.jit
def _dot(left, v, KEYS_FIRST: tl.constexpr):
    """left·v in float32, exact products, keys first or rows."""
    return dot(v, tl.trans(left)) if KEYS_FIRST else dot(left, tl.trans(v))


@triton.jit
def _products(left, v, KEYS_FIRST: tl.constexpr):
    """`_dot` of float32 beside 16 bits too, as three products of 16 bits: tensor cores take no other exact ones."""
    if left.dtype == v.dtype:
        products = _dot(left, v, KEYS_FIRST)
    else:
        # what a part leaves is smaller by its bits, and would underflow in float16
        step: tl.constexpr = 256.0 if v.dtype == tl.bfloat16 else 2048.0
        high = left.to(v.dtype)
        remainder = (left - high.to(tl.float32)) * step
        middle = remainder.to(v.dtype)
        low = ((remainder - middle.to(tl.float32)) * step).to(v.dtype)
        products = _dot(low, v, KEYS_FIRST) * (1 / step) + _dot(middle, v, KEYS_FIRST)
        products = products * (1 / step) + _dot(high, v, KEYS_FIRST)
    return products


@triton.jit
def _squares(x, FIRST: tl.constexpr):
    """Σ x² of the rows of x, as a row of a tile or a column."""
    x = x.to(tl.float32)
    return tl.expand_dims(tl.sum(x * x, 1), 0 if FIRST else 1)


@triton.jit
def _distances(
    products, left_sq, v_sq, allowed, left_ptr, v_ptr, offs_row, offs_key, T, S,
    stride_ot, stride_od, stride_vs, stride_vd, V: tl.constexpr,
):
    """‖v_j − o_i‖ of a tile of products o·v."""
    square = left_sq + v_sq - 2 * products
    close = allowed & (square <= CLOSE * (left_sq + v_sq))
    if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
        exact = tl.zeros_like(square)
        for d in range(V):
            o = tl.load(left_ptr + offs_row.to(tl.int64) * stride_ot + d * stride_od, mask=offs_row < T, other=0.0)
            v = tl.load(v_ptr + offs_key.to(tl.int64) * stride_vs + d * stride_vd, mask=offs_key < S, other=0.0)
            difference = v.to(tl.float32) - o.to(tl.float32)
            exact += difference * difference
        square = tl.where(close, exact, square)
    return tl.sqrt(tl.where(square < 0, 0.0, square))


@triton.jit
def _divergence(y, log2_p, gain, lift, tilt, rest):
    """λp' − log(1 + w); both forms are exact where they are taken, and neither cancels there."""
    w = gain * y
    total = 1 + w
    u = w / (2 + w)
    z = u * u
    series = z * (1 / 17) + 1 / 15
    for i in tl.static_range(13, 1, -2):
        series = series * z + 1 / i
    small = y * (tilt - gain * w) / total + u * (w - 2 * z * series)
    new = lift * (y / total)
    large = new * (tl.log(new) - log2_p * LN2) - (1 - rest * y) / total * tl.log(total)
    return tl.where(w <= 1, small, large)


@triton.jit
def _effects(
    x, left, v, terms, left_ptr, v_ptr, offs_row, offs_key, T, S, stride_ot, stride_od, stride_vs, stride_vd,
    gain, shift, lift, tilt, rest, V: tl.constexpr, SIGNED: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    """Effects of a tile of base-2 scores, 0 where they are forbidden; left and v are tiles of rows and of keys."""
    pivot, largest, ceiling, dominant, level = terms
    t = x - pivot
    if gain is not None:
        s = t
        if shift is not None:
            s = tl.minimum(t + shift, HIGHEST)
        y = tl.exp2(s) * largest
    if v is None:
        if gain is None:
            effect = -LN2 * (t + tl.log2(largest))
        else:
            effect = _divergence(y, t + tl.log2(largest), gain, lift, tilt, rest)
    else:
        products = _products(left, v, KEYS_FIRST)
        if SIGNED:
            effect = products - level
        else:
            effect = _distances(
                products, _squares(left, KEYS_FIRST), _squares(v, not KEYS_FIRST), x > FLOOR, left_ptr, v_ptr,
                offs_row, offs_key, T, S, stride_ot, stride_od, stride_vs, stride_vd, V)
        if gain is not None:
            w = gain * y
            share = w / (1 + w)
            effect *= share if SIGNED else tl.abs(share)
    effect = tl.where(x > ceiling, dominant, effect)
    return tl.where(x > FLOOR, effect, 0.0)


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap", "gain", "shift", "lift", "tilt", "rest", "n_best"])
def _edge_rows_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    row_ptr, values_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn,
    H, GROUP, T, S, offset, scale, softcap, gain, shift, lift, tilt, rest, n_best,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SLOTS: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_M)
    # under a causal mask the last rows are the longest: they start first
    pid_m = blocks - 1 - tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
    low, high = key_tiles(start, stop, mask_m, BLOCK_N, 1)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    terms = _load_row_terms(terms_ptr + pid_bh * T, stride_rn, offs_m, T, 0)
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)
    left = _load(left_ptr, offs_m, T, stride_ot, stride_od, V, BLOCK_V)

    total = tl.zeros([BLOCK_M], tl.float64)
    best, index = empty_slots(n_best, BLOCK_M, SLOTS)
    for n in range(low, high, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        x = masked_scores(
            dot(q, tl.trans(k)), offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
        v = _load(v_ptr, offs_n, S, stride_vs, stride_vd, V, BLOCK_V)  # [BLOCK_N, BLOCK_V]
        effect = _effects(
            x, left, v, terms, left_ptr, v_ptr, offs_m[:, None], offs_n[None, :], T, S,
            stride_ot, stride_od, stride_vs, stride_vd, gain, shift, lift, tilt, rest, V, SIGNED, False)
        total += tl.sum(tl.abs(effect), 1)
        if values_ptr is not None:
            size = tl.where(x > FLOOR, tl.abs(effect), 2 * FLOOR)
            # the sign goes along in the key's last bit
            best, index = hold(best, index, size, 2 * offs_n[None, :] + (effect < 0).to(tl.int32), tl.max(size, 1))

    if row_ptr is not None:
        tl.store(row_ptr + pid_bh * T + offs_m, total.to(tl.float32), mask=mask_m)
    if values_ptr is not None:
        place = (pid_bh * T + offs_m) * n_best
        for _ in range(n_best):
            best, top, key = take_best(best, index, n_best)
            # a row that holds a NaN says so
            top = tl.where(total == total, top, float("nan"))
            value = tl.where(top > FLOOR, tl.where(key % 2 == 1, -top, top), 0.0 * top)
            tl.store(values_ptr + place, value, mask=mask_m)
            tl.store(indices_ptr + place, tl.where(top > FLOOR, key // 2, -1), mask=mask_m)
            place += 1


@triton.jit(do_not_specialize=["T", "S", "offset", "scale", "softcap", "gain", "shift", "lift", "tilt", "rest"])
def _edge_columns_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bounds_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    column_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn, stride_eb,
    H, GROUP, T, S, offset, scale, softcap, gain, shift, lift, tilt, rest,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_N)
    pid_n = tl.program_id(0) % blocks
    pid_bh = (tl.program_id(0) // blocks).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    first = pid_n * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + pid_b * stride_kb + pid_h // GROUP * stride_kh, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    terms_ptr += pid_bh * T
    start_ptr += pid_b * stride_ib
    stop_ptr += pid_b * stride_ib
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)
    v = _load(v_ptr, offs_n, S, stride_vs, stride_vd, V, BLOCK_V)  # [BLOCK_N, BLOCK_V]

    column = tl.zeros([BLOCK_N], tl.float64)
    low, high = row_tiles(bounds_ptr + pid_b * stride_eb, tl.cdiv(T, BLOCK_M), first, BLOCK_M, BLOCK_N, 1)
    for m in range(low, high, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        start, stop = load_intervals(start_ptr, stop_ptr, offs_m, T)
        q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        x = masked_scores(
            dot(k, tl.trans(q)), offs_m[None, :], offs_n[:, None], start[None, :], stop[None, :], T, S, offset,
            bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_N, BLOCK_M]
        left = _load(left_ptr, offs_m, T, stride_ot, stride_od, V, BLOCK_V)  # [BLOCK_M, BLOCK_V]
        effect = _effects(
            x, left, v, _load_row_terms(terms_ptr, stride_rn, offs_m, T, 1), left_ptr, v_ptr,
            offs_m[None, :], offs_n[:, None], T, S, stride_ot, stride_od, stride_vs, stride_vd,
            gain, shift, lift, tilt, rest, V, SIGNED, True)
        column += tl.sum(tl.abs(effect), 1)

    tl.store(column_ptr + pid_bh * S + offs_n, column.to(tl.float32), mask=offs_n < S)


@triton.jit(do_not_specialize=["T", "S", "R", "C", "offset", "scale", "softcap", "gain", "shift", "lift", "tilt", "rest"])
def _edge_map_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, stop_ptr, bias_ptr, slopes_ptr, terms_ptr, left_ptr,
    row_edges_ptr, key_edges_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_ib,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_lb, stride_lh,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_rn,
    H, GROUP, T, S, R, C, offset, scale, softcap, gain, shift, lift, tilt, rest,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SIGNED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    CELLS_M: tl.constexpr = BLOCK_M // HEIGHT
    CELLS_N: tl.constexpr = BLOCK_N // WIDTH
    groups = tl.cdiv(R, CELLS_M)
    # under a causal mask the last rows are the longest: they start first
    first = (groups - 1 - tl.program_id(0) % groups) * CELLS_M
    pid_bh = (tl.program_id(0) // groups).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    bias_ptr = head_bias(bias_ptr, pid_b, pid_h, stride_bb, stride_bh)
    alibi = slope(slopes_ptr, pid_b, pid_h, stride_lb, stride_lh)
    v_ptr = head_bias(v_ptr, pid_b, pid_h // GROUP, stride_vb, stride_vh)
    left_ptr = head_bias(left_ptr, pid_b, pid_h, stride_ob, stride_oh)
    r = first + tl.arange(0, CELLS_M)[:, None]
    place = (pid_bh * R + r) * C + tl.arange(0, CELLS_N)[None, :]  # [CELLS_M, CELLS_N]

    for step_m in range(0, tl.cdiv(T, R), HEIGHT):
        offs_m = cell_members(row_edges_ptr, first, step_m, T, R, BLOCK_M, HEIGHT)
        start, stop = load_intervals(start_ptr + pid_b * stride_ib, stop_ptr + pid_b * stride_ib, offs_m, T)
        left_c, right_c = reached_cells(start, stop, offs_m < T, S, C, CELLS_N)
        q = load_rows(q_ptr, offs_m, T, stride_qt, stride_qd, D, BLOCK_D)
        terms = _load_row_terms(terms_ptr + pid_bh * T, stride_rn, offs_m, T, 0)
        left = _load(left_ptr, offs_m, T, stride_ot, stride_od, V, BLOCK_V)
        for c in range(left_c, right_c, CELLS_N):
            mask = (r < R) & (c + tl.arange(0, CELLS_N)[None, :] < C)
            total = tl.load(sum_ptr + place + c, mask=mask, other=0.0)
            for step_n in range(0, tl.cdiv(S, C), WIDTH):
                offs_n = cell_members(key_edges_ptr, c, step_n, S, C, BLOCK_N, WIDTH)
                k = load_rows(k_ptr, offs_n, S, stride_ks, stride_kd, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                x = masked_scores(
                    dot(q, tl.trans(k)), offs_m[:, None], offs_n[None, :], start[:, None], stop[:, None], T, S, offset,
                    bias_ptr, stride_bt, stride_bs, alibi, scale, softcap, True)  # [BLOCK_M, BLOCK_N]
                v = _load(v_ptr, offs_n, S, stride_vs, stride_vd, V, BLOCK_V)  # [BLOCK_N, BLOCK_V]
                effect = _effects(
                    x, left, v, terms, left_ptr, v_ptr, offs_m[:, None], offs_n[None, :], T, S,
                    stride_ot, stride_od, stride_vs, stride_vd, gain, shift, lift, tilt, rest, V, SIGNED, False)
                part = tl.sum(tl.reshape(tl.abs(effect), [BLOCK_M, CELLS_N, WIDTH]), 2)
                total += tl.sum(tl.reshape(part, [CELLS_M, HEIGHT, CELLS_N]), 1)
            tl.store(sum_ptr + place + c, total, mask=mask)
        # the next rows of these cells read what these threads have written
        tl.debug_barrier()


def edge_effects_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    start: torch.Tensor,
    stop: torch.Tensor,
    offset: int,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    pivot: torch.Tensor,
    largest: torch.Tensor,
    ceiling: torch.Tensor,
    dominant: torch.Tensor,
    left: torch.Tensor | None,
    level: torch.Tensor | None,
    edit: tuple[float, ...] | None,
    want: list[str],
    n: int,
    cells: int,
) -> tuple[torch.Tensor, ...]:
    """row, column, values, indices and sums over cells, float64, each empty where want does not name it."""
    B, H, T, D = q.shape
    S, V = k.shape[2], D if v is None else v.shape[3]
    R, C = min(cells, T), min(cells, S)

    def zeros(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape if name in want else 0, dtype=dtype, device=q.device)

    row, column, values = zeros("row", B, H, T), zeros("column", B, H, S), zeros("topk", B, H, T, n)
    indices = zeros("topk", B, H, T, n, dtype=torch.int32) - 1
    total = zeros("map", B, H, R, C, dtype=torch.float64)
    results = row, column, values, indices, total
    if 0 in (B, T, S):
        return results
    gain, shift, lift, tilt, rest = (None,) * 5 if edit is None else edit
    terms = torch.stack((pivot, largest, ceiling, dominant, pivot if level is None else level))
    strides = (
        *score_strides(q, k, start, bias, slopes),
        *(x for y in (v, left) for x in ((0, 0, 0, 0) if y is None else y.stride())), terms.stride(0),
    )
    tiles = launch(max(D, V), q.element_size(), architecture(q))
    sizes = {
        "D": D, "V": V, "BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK_V": max(16, triton.next_power_of_2(V)),
        "SIGNED": level is not None, **tiles._asdict(), "enable_fp_fusion": True,
    }
    edited = (offset, scale, softcap or None, gain, shift or None, lift, tilt, rest)
    if "row" in want or "topk" in want:
        _edge_rows_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
            q, k, v, start, stop, bias, slopes, terms, left,
            row if "row" in want else None, *((values, indices) if "topk" in want else (None, None)),
            *strides, H, H // k.shape[1], T, S, *edited, n, SLOTS=max(16, triton.next_power_of_2(n)), **sizes,
        )
    if "column" in want:
        bounds = block_bounds(start, stop, tiles.BLOCK_M)
        _edge_columns_kernel[(triton.cdiv(S, tiles.BLOCK_N) * B * H,)](
            q, k, v, start, stop, bounds, bias, slopes, terms, left, column,
            *strides, bounds.stride(0) if start.shape[0] > 1 else 0, H, H // k.shape[1], T, S, *edited, **sizes,
        )
    if "map" in want:
        edges = (torch.arange(m + 1, device=q.device) * count // m for m, count in ((R, T), (C, S)))
        height = min(tiles.BLOCK_M, triton.next_power_of_2(triton.cdiv(T, R)))
        width = min(tiles.BLOCK_N, triton.next_power_of_2(triton.cdiv(S, C)))
        _edge_map_kernel[(triton.cdiv(R, tiles.BLOCK_M // height) * B * H,)](
            q, k, v, start, stop, bias, slopes, terms, left, *(x.int() for x in edges), total,
            *strides, H, H // k.shape[1], T, S, R, C, *edited, HEIGHT=height, WIDTH=width, **sizes,
        )
    return results

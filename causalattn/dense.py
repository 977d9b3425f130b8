"""The same numbers from an attention matrix at hand, read in blocks of rows and summed in float64."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import accumulator
from ._checks import FLOATS, resolve_mask
from .masks import Intervals, Mask
from .nulls import Null, Statistic, null_from_stats
from .statistics import (
    DEFAULT,
    Asymmetry,
    AttentionStats,
    _asymmetry,
    _chosen_keys,
    _columns,
    _diagonal,
    _share,
    _wanted,
)

# elements of A that are held in float64 at once
BLOCK_SIZE = 2**22
PAIR_BLOCK = 1024


def attention_stats(
    A: Tensor,
    *,
    want: str | Iterable[str] = DEFAULT,
    columns: Sequence[int | str] = ("sink",),
    mask: Mask | Intervals | None = None,
) -> AttentionStats:
    """Measure an attention map at hand: `causalattn.attention_stats` from A instead of q and k.

    The formulas are the same, with entropy −Σ_j A_ij log A_ij (0 log 0 = 0) and query i at p_i = i + S − T.

    Args:
        A: probabilities, [T, S], [H, T, S] or [B, H, T, S], any float dtype, any strides. Values are not checked.
        want, columns: as in `causalattn.attention_stats`.
        mask: who may attend whom, for the sink and for received_mean; None is everyone. Entries it forbids count as
            they stand: they should be 0.

    Returns:
        AttentionStats in float32 (float64 for float64 A), with the leading axes of A. lse is None always: A does not
        hold it.

    Raises:
        ValueError: A has another rank; an unknown want or column; a mask that does not fit; net_flow or asymmetry with
            T ≠ S.
        TypeError: A is not a floating point tensor.

    Example:
        >>> attention_stats(torch.eye(4)).diag
        tensor([1., 1., 1., 1.])
    """
    heads = _heads(A)
    want = _wanted(want) - {"lse"}
    if want & {"net_flow", "asymmetry"}:
        _check_square("net_flow and asymmetry", A)
    intervals = resolve_mask(heads, heads.mT, mask, False)
    stats = _statistics(heads, intervals, columns, "asymmetry" in want)
    return AttentionStats(**{name: _like(A, stats[name]) for name in stats if name in want})


def dag_score(A: Tensor) -> Tensor:
    """Share of the attention mass that lies strictly below the diagonal: Σ_{j < p_i} A_ij / Σ_ij A_ij.

    Args:
        A: as in `attention_stats`.

    Returns:
        [], [H] or [B, H]; 0 where A sums to 0. See `permutation_null` for what a causal mask makes of it.

    Raises:
        ValueError, TypeError: as in `attention_stats`.

    Source: the mass of tril(A, −1) over the mass of A.

    Example:
        >>> dag_score(torch.full((4, 4), 0.25))
        tensor(0.3750)
    """
    return attention_stats(A, want=("dag_score",)).dag_score


def asymmetry(A: Tensor) -> Asymmetry:
    """Distance of A from its transpose, summed from the differences themselves: see `causalattn.asymmetry`.

    Args:
        A: as in `attention_stats`, with T = S.

    Returns:
        Asymmetry: a number a head each, net_flow a number a token.

    Raises:
        ValueError: T ≠ S; else as in `attention_stats`.

    Example:
        >>> asymmetry(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).l1
        tensor(1.)
    """
    return attention_stats(A, want=("asymmetry",)).asymmetry


def asymmetry_matrix(A: Tensor) -> Tensor:
    """A − Aᵀ: positive where i attends j more than j attends i.

    Args:
        A: as in `attention_stats`, with T = S.

    Returns:
        A's shape and dtype.

    Raises:
        ValueError: T ≠ S; else as in `attention_stats`.

    Example:
        >>> asymmetry_matrix(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([[ 0.0000, -0.5000],
                [ 0.5000,  0.0000]])
    """
    _heads(A)
    _check_square("asymmetry_matrix", A)
    return A - A.mT


def permutation_null(
    A: Tensor,
    *,
    statistic: Statistic = "dag_score",
    column: int | str = "sink",
    mask: Mask | Intervals | None = None,
) -> Null:
    """Compare a statistic of A with its exact null under permutations of each row: see `causalattn.permutation_null`.

    Args:
        A: as in `attention_stats`.
        statistic, column: as in `causalattn.permutation_null`.
        mask: who may attend whom: the keys each row's weights are shuffled over. Pass `causal()` for a causal map.

    Returns:
        Null: a number a head each.

    Raises:
        ValueError: an unknown statistic or column; else as in `attention_stats`.

    Example:
        >>> permutation_null(torch.full((4, 4), 0.25)).mean
        tensor(0.3750)
    """
    heads = _heads(A)
    intervals = resolve_mask(heads, heads.mT, mask, False)
    stats = AttentionStats(**_statistics(heads, intervals, (column,)))
    null = null_from_stats(stats, intervals, A.shape[-1], statistic, column=column)
    return Null(*(_like(A, value) for value in null))


def offset_null(A: Tensor, *, mask: Mask | Intervals | None = None) -> Tensor:
    """What A_ij would be if it depended on the distance alone: its mean over the allowed entries with the same p_i − j.

    A less it is an edge's lift over its offset. Σ_ij, dag_score and distance of it are those of A, so it is a null for
    edges and columns only.

    Args:
        A: as in `attention_stats`.
        mask: who may attend whom; entries it forbids are no part of a mean. None is everyone.

    Returns:
        A's shape, float32 (float64 for float64 A); 0 where the mask forbids. It is T×S by nature.

    Raises:
        ValueError, TypeError: as in `attention_stats`.

    Example:
        >>> offset_null(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([[0.7500, 0.0000],
                [0.5000, 0.7500]])
    """
    heads = _heads(A)
    T, S = A.shape[-2:]
    intervals = resolve_mask(heads, heads.mT, mask, False)
    result = heads.new_zeros(heads.shape, dtype=accumulator(A))
    if A.numel() == 0:
        return result.reshape(A.shape)
    for b, h in _pairs(heads):
        # row i, key j holds the mean of diagonal j − i: window T − 1 − i of the means
        windows = _offset_means(heads[b, h], intervals, b).unfold(0, S, 1)
        for rows in _row_blocks(T, S):
            expected = windows[T - rows.stop : T - rows.start].flip(0)
            result[b, h, rows] = expected.masked_fill(~_seen(intervals, b, rows, S), 0).to(result.dtype)
    return result.reshape(A.shape)


def _heads(A: Tensor) -> Tensor:
    """A as [B, H, T, S]."""
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a torch.Tensor, got {type(A).__name__}")
    if not 2 <= A.ndim <= 4:
        raise ValueError(f"A must have shape [T, S], [H, T, S] or [B, H, T, S], got {list(A.shape)}")
    if A.dtype not in FLOATS:
        raise TypeError(f"A must be float16, bfloat16, float32 or float64, got {str(A.dtype).removeprefix('torch.')}")
    return A[(None,) * (4 - A.ndim)]


def _check_square(name: str, A: Tensor) -> None:
    if A.shape[-2] != A.shape[-1]:
        raise ValueError(f"{name} needs as many queries as keys, got T = {A.shape[-2]} and S = {A.shape[-1]}")


def _like(A: Tensor, value: Tensor | Asymmetry) -> Tensor | Asymmetry:
    """value [B, H, ...] with the leading axes and in the precision of A."""
    if isinstance(value, Asymmetry):
        return Asymmetry(*(_like(A, part) for part in value))
    return value.reshape(A.shape[:-2] + value.shape[2:]).to(accumulator(A))


def _pairs(heads: Tensor) -> Iterator[tuple[int, int]]:
    for b in range(heads.shape[0]):
        for h in range(heads.shape[1]):
            yield b, h


def _row_blocks(T: int, S: int) -> Iterator[slice]:
    step = max(1, BLOCK_SIZE // max(1, S))
    for m in range(0, T, step):
        yield slice(m, min(m + step, T))


def _seen(intervals: Intervals, b: int, rows: slice, S: int) -> Tensor:
    """bool [rows, S]: who may attend whom."""
    row = b if len(intervals.start) > 1 else 0
    keys = torch.arange(S, device=intervals.start.device)
    return (keys >= intervals.start[row, rows, None]) & (keys < intervals.stop[row, rows, None])


def _statistics(
    heads: Tensor, intervals: Intervals, columns: Sequence[int | str], pairs: bool = False
) -> dict[str, Tensor | Asymmetry]:
    """Every statistic but lse, in float64; those of a pass over pairs only on request."""
    B, H, T, S = heads.shape
    chosen = torch.cat([_diagonal(intervals), _chosen_keys(columns, intervals, S)], -1).expand(B, -1, -1)
    names = ("max", "mass", "entropy", "sum_sq", "below", "distance")
    stats = {name: heads.new_zeros(B, H, T, dtype=torch.float64) for name in names}
    picked = heads.new_zeros(B, H, T, chosen.shape[2], dtype=torch.float64)
    received = heads.new_zeros(B, H, S, dtype=torch.float64)
    for b, h in _pairs(heads):
        for rows in _row_blocks(T, S):
            tile = heads[b, h, rows].double()
            for name, value in _row_statistics(tile, rows.start + intervals.offset).items():
                stats[name][b, h, rows] = value
            picked[b, h, rows] = _picked(tile, chosen[b, rows].long())
            received[b, h] += tile.sum(0)
    stats |= {"diag": picked[..., 0], "columns": picked[..., 1:]}
    stats |= _columns(received, stats["mass"], intervals)
    stats["dag_score"] = _share(stats["below"], stats["mass"])
    if pairs:
        stats["asymmetry"] = _asymmetry(*_differences(heads), stats["sum_sq"], stats["net_flow"])
    return stats


def _row_statistics(tile: Tensor, position: int) -> dict[str, Tensor]:
    """Of a tile [rows, S] whose first row sits at position."""
    keys = torch.arange(tile.shape[1], device=tile.device)
    positions = torch.arange(position, position + len(tile), device=tile.device)
    return {
        "max": tile.amax(1) if tile.shape[1] else tile.new_zeros(len(tile)),
        "mass": tile.sum(1),
        "entropy": torch.special.entr(tile).sum(1),
        "sum_sq": torch.linalg.vecdot(tile, tile),
        "below": tile.tril(position - 1).sum(1),
        "distance": torch.linalg.vecdot(tile, (positions[:, None] - keys).abs().to(tile.dtype)),
    }


def _picked(tile: Tensor, keys: Tensor) -> Tensor:
    """tile at keys [rows, n], 0 where there is no such key."""
    inside = (keys >= 0) & (keys < tile.shape[1])
    if tile.shape[1] == 0:
        return tile.new_zeros(keys.shape)
    return tile.gather(1, keys.masked_fill(~inside, 0)).masked_fill(~inside, 0)


def _differences(heads: Tensor) -> Tensor:
    """Σ(A_ij − A_ji)², Σ|A_ij − A_ji| and max|A_ij − A_ji|, [3, B, H], by pairs of tiles."""
    T = heads.shape[2]
    result = heads.new_zeros(3, *heads.shape[:2], dtype=torch.float64)
    for b, h in _pairs(heads):
        A = heads[b, h]
        for m in range(0, T, PAIR_BLOCK):
            for n in range(m, T, PAIR_BLOCK):
                upper, lower = A[m : m + PAIR_BLOCK, n : n + PAIR_BLOCK], A[n : n + PAIR_BLOCK, m : m + PAIR_BLOCK]
                difference = (upper.double() - lower.T.double()).abs()
                sums = torch.stack([difference.square().sum(), difference.sum()])
                result[:2, b, h] += sums * (1 if m == n else 2)
                result[2, b, h] = torch.maximum(result[2, b, h], difference.max())
    return result


def _offset_means(A: Tensor, intervals: Intervals, b: int) -> Tensor:
    """The mean of A over the allowed entries of each diagonal j − i = 1 − T … S − 1: [T + S − 1]."""
    T, S = A.shape
    sums, counts = A.new_zeros(2, T + S - 1, dtype=torch.float64)
    for rows in _row_blocks(T, S):
        seen = _seen(intervals, b, rows, S)
        span = slice(T - rows.stop, T - rows.start + S - 1)
        sums[span] += _diagonal_sums(A[rows].double().masked_fill(~seen, 0))
        counts[span] += _diagonal_sums(seen.double())
    return sums / counts.clamp(min=1)


def _diagonal_sums(tile: Tensor) -> Tensor:
    """Sums along the diagonals of tile [R, S], lowest first, [R + S − 1]: rows shifted until diagonals are columns."""
    R, S = tile.shape
    return F.pad(tile.flip(0), (0, R)).flatten()[: R * (R + S - 1)].view(R, R + S - 1).sum(0)

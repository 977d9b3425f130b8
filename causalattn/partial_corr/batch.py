"""Tests with sets of their own: the pass behind `partial_correlation`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import use_triton
from .factor import Status, decide, factorize, pivot_floor, solve, unexplained

TESTS_AT_ONCE = 2**15
# float64 numbers of rows that are gathered at once
ROWS_AT_ONCE = 2**22


@torch.library.custom_op("causalattn::partial_correlation", mutates_args=())
def test_batch(R: Tensor, members: Tensor, rows: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """r and status [G, N] of R [G, T, T] and members [G or 1, N, M + 2]: a set padded with −1, then i and j.

    rows [G, T, S] decide again, in float64, what R leaves SINGULAR.
    """
    if use_triton(backend, R, float64=True):
        from ..kernels.partial_corr.batch import partial_corr_fwd

        return partial_corr_fwd(R, members, rows, pivot_floor(R.dtype), pivot_floor(torch.float64))
    G, N = R.shape[0], members.shape[1]
    r, status = R.new_empty(G, N), R.new_empty(G, N, dtype=torch.int8)
    for g in range(G):
        tests = members[g if members.shape[0] > 1 else 0]
        for n in range(0, N, TESTS_AT_ONCE):
            some = slice(n, n + TESTS_AT_ONCE)
            r[g, some], status[g, some] = _test(R[g], tests[some])
        if rows is not None:
            _test_again(rows[g], tests, r[g], status[g])
    return r, status


@test_batch.register_fake
def _(R, members, rows, backend):
    size = R.shape[0], members.shape[1]
    return R.new_empty(size), R.new_empty(size, dtype=torch.int8)


def _test(R: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    T = R.shape[0]
    foreign = (members < 0) | (members >= T)
    # on a GPU nothing is waited for
    padded = R.is_cuda or foreign.any()
    if padded:
        # one row and column of zeros more: what pads a set is correlated with nothing
        R, members = F.pad(R, (0, 1, 0, 1)), members.masked_fill(foreign, T)
    tokens = members.T.contiguous().unbind()
    starts, flat = [x * R.shape[1] for x in tokens], R.flatten()
    r, status = _decided(lambda a, b: flat.take(starts[a] + tokens[b]), len(tokens) - 2, flat.new_empty(len(members)))
    if R.is_cuda:
        wrong = foreign[:, -2:].any(1) | (foreign & (members != -1)).any(1)
        r.masked_fill_(wrong, torch.nan), status.masked_fill_(wrong, Status.SINGULAR)
    return r, status


def _test_again(rows: Tensor, members: Tensor, r: Tensor, status: Tensor) -> None:
    """Decide from rows what is SINGULAR in r and status, in place."""
    singular = status == Status.SINGULAR
    step = max(1, ROWS_AT_ONCE // max(1, members.shape[1] * rows.shape[1]))
    for some in (torch.arange(len(r), device=r.device) if r.is_cuda else singular.nonzero()[:, 0]).split(step):
        better, known = _test_rows(rows, members[some])
        r[some] = torch.where(singular[some], better.to(r.dtype), r[some])
        status[some] = torch.where(singular[some], known, status[some])


def _test_rows(rows: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The same from correlations of rows, in float64."""
    x = rows[members.clamp(min=0)].double().masked_fill_((members < 0)[..., None], 0)
    gram = x @ x.mT
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()
    R = (gram / (norm[:, :, None] * norm[:, None])).masked_fill_((members < 0)[:, :, None] | (members < 0)[:, None], 0)
    return _decided(lambda a, b: R[:, a, b].contiguous(), members.shape[1] - 2, R.new_empty(len(members)))


def _decided(entry: Callable[[int, int], Tensor], M: int, like: Tensor) -> tuple[Tensor, Tensor]:
    factor = factorize(entry, M, like)
    w_i, w_j = ([entry(a, b) for b in range(M)] for a in (M, M + 1))
    solve(factor, w_i)
    solve(factor, w_j)
    covariance = entry(M + 1, M)
    for x, y in zip(w_i, w_j, strict=True):
        covariance.addcmul_(x, y, value=-1)
    floor = pivot_floor(like.dtype)
    return decide(covariance, unexplained(w_i, like), unexplained(w_j, like), factor.pivot, floor)

"""Every pair given one set: a factor of it serves them all, or the inverse of the whole matrix does."""

import torch
from torch import Tensor

from .factor import Status, decide, factorize, pivot_floor, solve


def partial_correlations_given(R: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """r and status [G, M, T, T] of R [G, T, T] and given [G or 1, M, m] int64, −1 for none."""
    G, T, _ = R.shape
    M, m = given.shape[1:]
    given = given.expand(G, -1, -1)
    there, members = (given >= 0) & (given < T), given.clamp(0, T - 1)
    # the rows of R of each set, [G, M, m, T]
    rows = R.gather(1, members.reshape(G, M * m, 1).expand(-1, -1, T)).reshape(G, M, m, T) * there[..., None]
    block = rows.gather(3, members[:, :, None].expand(-1, -1, m, -1)) * there[:, :, None]
    factor = factorize(lambda a, b: block[..., a, b, None].clone(), m, R.new_empty(G, M, 1))
    H = R[:, None].expand(-1, M, -1, -1)
    if m:
        W = torch.stack(solve(factor, [x.clone() for x in rows.unbind(2)]), 2)
        H = H - W.mT @ W
    H = (H + H.mT) / 2
    left = H.diagonal(dim1=-2, dim2=-1)
    inside = (torch.arange(T, device=R.device)[:, None] == members[..., None, :]) & there[..., None, :]
    return _decided(H, left.masked_fill(inside.any(-1), 0), factor.pivot)


def precision_correlations(R: Tensor) -> tuple[Tensor, Tensor]:
    """r and status [G, T, T], each pair given all others."""
    factor, info = torch.linalg.cholesky_ex(R)
    known = (info == 0) & (factor.diagonal(dim1=1, dim2=2).square() > pivot_floor(R.dtype)).all(1)
    # a matrix without a factor is put aside, not repaired: its results are SINGULAR
    identity = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
    K = torch.cholesky_inverse(torch.where(known[:, None, None], factor, identity))
    left = 1 / K.diagonal(dim1=1, dim2=2)
    pivot = torch.where(known, left.amin(1), 0) if R.shape[1] else left.sum(1)
    return _decided(-K * left[:, :, None] * left[:, None], left, pivot[:, None])


def _decided(H: Tensor, left: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """r and status of covariances [..., T, T], variances [..., T] and the rest's pivot [..., 1]; 1 on the diagonal."""
    floor = pivot_floor(H.dtype)
    r, status = decide(H, left[..., :, None], left[..., None, :], pivot[..., None], floor)
    itself = torch.eye(H.shape[-1], dtype=torch.bool, device=H.device) & (status != Status.SINGULAR)
    return r.masked_fill_(itself, 1.0), status.masked_fill_(itself, Status.OK)

"""What a correlation matrix, a test and a level must be."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

# sums over many rows miss symmetry and the unit diagonal by a rounding or so for every few terms
SLACK = 1024
MOST = 16

Indices = Tensor | Sequence | int


def readable(x: Tensor) -> bool:
    """Whether values may be looked at: not on a GPU, which would wait, nor while a graph is traced."""
    return not (x.is_cuda or torch.compiler.is_compiling())


def check_correlation(R: Tensor) -> Tensor:
    """R as [G, T, T], contiguous, and the same on both sides of its diagonal."""
    if not isinstance(R, Tensor):
        raise TypeError(f"R must be a torch.Tensor, got {type(R).__name__}")
    if R.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"R must be float32 or float64, got {_name(R.dtype)}")
    if R.ndim < 2 or R.shape[-1] != R.shape[-2]:
        raise ValueError(f"R must be square, [..., T, T], got {list(R.shape)}")
    R = R.detach()
    if readable(R) and R.numel() > 0:
        _check_values(R)
    flat = _flat(R)
    return ((flat + flat.mT) / 2).contiguous()


def _check_values(R: Tensor) -> None:
    if not R.isfinite().all():
        raise ValueError(f"R must hold no NaN or inf, got {int((~R.isfinite()).sum())} of them")
    slack = SLACK * torch.finfo(R.dtype).eps
    apart = float((R - R.mT).abs().max())
    if not apart <= slack:
        raise ValueError(f"R must be symmetric, got entries {apart:.3g} from their mirror's; (R + R.mT) / 2 is")
    diagonal = R.diagonal(dim1=-2, dim2=-1).flatten()
    off = (diagonal - 1).abs()
    if not float(off.max()) <= slack:
        token, value = int(off.argmax()) % R.shape[-1], float(diagonal[off.argmax()])
        why = ", whose row of the attention is empty: leave it out" if value == 0 else ""
        raise ValueError(f"R must have 1 on its diagonal, got {value:.6g} at token {token}{why}")
    largest = float(R.abs().max())
    if largest > 1 + slack:
        raise ValueError(f"R must lie in −1…1, got {largest:.6g}")


def check_tests(R: Tensor, i: Indices, j: Indices, given: Indices | None) -> tuple[Tensor, torch.Size]:
    """members [G or 1, N, M + 2] of R's tests, each its set and then i and j, and the shape that results have."""
    i, j = (_integers(name, x, R.device) for name, x in (("i", i), ("j", j)))
    given = torch.empty(0, dtype=torch.int64, device=R.device) if given is None else _integers("given", given, R.device)
    if given.ndim == 0:
        raise ValueError("given must be [N, m], the set of each test, got a number")
    try:
        shape = torch.broadcast_shapes(i.shape, j.shape, given.shape[:-1])
    except RuntimeError:
        shapes = ", ".join(str(list(x.shape)) for x in (i, j, given))
        raise ValueError(f"i [N], j [N] and given [N, m] must have one N, got {shapes}") from None
    if given.ndim == 1 and given.numel() > 0 and shape and shape[-1] > 1:
        raise ValueError(f"given must be [N, m], the set of each test, got one set for {shape[-1]} tests")
    _check_width(given)
    lead = R.shape[:-2]
    if len(shape) > 1 and shape[:-1] != lead:
        raise ValueError(f"i, j and given must have R's leading axes {list(lead)} or none, got {list(shape[:-1])}")
    members = torch.cat([given.expand(*shape, -1), i.expand(shape)[..., None], j.expand(shape)[..., None]], -1)
    members = _flat(members if shape else members[None]).contiguous()
    if readable(R):
        _check_members(members, R.shape[-1])
    return members, shape if len(shape) > 1 else lead + shape


def _check_members(members: Tensor, T: int) -> None:
    given, pair = members[..., :-2], members[..., -2:]
    _check_tokens("i and j", pair, 0, T)
    _check_tokens("given", given, -1, T)
    if (pair[..., 0] == pair[..., 1]).any():
        raise ValueError("i and j must be two tokens, got a test of one with itself")
    check_sets(given)
    if (given[..., None] == pair[..., None, :]).any():
        raise ValueError("given must hold neither i nor j, got a test whose set holds one of them")


def check_sets(given: Tensor) -> None:
    """Refuse a set [..., m] with a token twice; −1 may stand in it many times."""
    ordered = given.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("given must hold a token once, got a set that repeats one")


def check_cut(cut: float) -> float:
    if not isinstance(cut, Real):
        raise TypeError(f"cut must be a number, got {type(cut).__name__}")
    if not 0 < cut < 1:
        raise ValueError(f"cut must lie between 0 and 1, got {cut}")
    return float(cut)


def check_rows(rows: Tensor | None, R: Tensor) -> Tensor | None:
    """rows as [G, T, S]."""
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"rows must be a floating point tensor, got {_kind(rows)}")
    if rows.ndim != R.ndim or rows.shape[:-1] != R.shape[:-1]:
        raise ValueError(f"rows must have shape {[*R.shape[:-1], 'S']}, got {list(rows.shape)}")
    if rows.device != R.device:
        raise ValueError(f"rows must be on R's device {R.device}, got {rows.device}")
    return _flat(rows.detach())


def check_given(R: Tensor, given: Indices) -> tuple[Tensor, torch.Size]:
    """given as [G or 1, M, m], and the leading axes that results have."""
    given = _integers("given", given, R.device)
    lead = R.shape[:-2]
    if given.ndim == 0 or (given.ndim > 2 and given.shape[:-2] != lead):
        raise ValueError(f"given must be [m], [M, m] or {[*lead, 'M', 'm']}, got {list(given.shape)}")
    _check_width(given)
    if readable(R):
        _check_tokens("given", given, -1, R.shape[-1])
        check_sets(given)
    return _flat(given if given.ndim > 1 else given[None]), lead + given.shape[-2:-1]


def check_adjacency(adjacency: Tensor, R: Tensor) -> Tensor:
    """adjacency as [G, T, T]."""
    _check_bool("adjacency", adjacency, R)
    if readable(R):
        if (adjacency != adjacency.mT).any():
            raise ValueError("adjacency must be symmetric, got a pair that is adjacent one way only")
        if adjacency.diagonal(dim1=-2, dim2=-1).any():
            raise ValueError("adjacency must have no loops, got a token adjacent to itself")
    return _flat(adjacency).contiguous()


def check_candidates(
    candidates: tuple[Tensor, Tensor, Tensor | None, Tensor | None], R: Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """node [G or 1, M], given [G or 1, M, order], ancestors and others [G, T, T] of Candidates."""
    if not isinstance(candidates, tuple) or len(candidates) != 4:
        raise TypeError(f"candidates must be Candidates, got {type(candidates).__name__}")
    node, given, *masks = candidates
    node, given = _integers("candidates.node", node, R.device), _integers("candidates.given", given, R.device)
    if node.ndim < 1 or given.shape != (*node.shape, order) or (node.ndim > 1 and node.shape[:-1] != R.shape[:-2]):
        lead = [*R.shape[:-2], "M"]
        raise ValueError(
            f"candidates must have node [M] or {lead} and given one axis more, of order = {order}, "
            f"got {list(node.shape)} and {list(given.shape)}"
        )
    if readable(R):
        _check_tokens("candidates.node", node, -1, R.shape[-1])
        _check_tokens("candidates.given", given, -1, R.shape[-1])
        check_sets(given)
        if ((given == node[..., None]) & (given >= 0)).any():
            raise ValueError("candidates.given must not hold its own node, got a set that does")
    for name, mask in zip(("ancestors", "others"), masks, strict=True):
        if mask is not None:
            _check_bool(f"candidates.{name}", mask, R)
    ancestors, others = (None if mask is None else _flat(mask).contiguous() for mask in masks)
    return _flat(node[..., None])[..., 0], _flat(given), ancestors, others


def _check_bool(name: str, x: Tensor, R: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_kind(x)}")
    if x.shape != R.shape:
        raise ValueError(f"{name} must have R's shape {list(R.shape)}, got {list(x.shape)}")
    if x.device != R.device:
        raise ValueError(f"{name} must be on R's device {R.device}, got {x.device}")


def _check_width(given: Tensor) -> None:
    if given.shape[-1] > MOST:
        raise ValueError(f"given must have at most {MOST} columns, got {given.shape[-1]}")


def _check_tokens(name: str, x: Tensor, least: int, T: int) -> None:
    if x.numel() and (int(x.min()) < least or int(x.max()) >= T):
        raise ValueError(f"{name} must lie in {least}…{T - 1}, got {int(x.min())}…{int(x.max())}")


def _integers(name: str, x: Indices, device: torch.device) -> Tensor:
    try:
        x = torch.as_tensor(x, device=device)
    except ValueError as error:
        raise ValueError(f"{name} must be rows of one length, −1 filling them up, got {error}") from None
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must hold integers, got {_kind(x)}: {error}") from None
    if x.numel() == 0:
        return x.long()
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {_name(x.dtype)}")
    return x.long()


def _flat(x: Tensor) -> Tensor:
    """x [..., n, m] as [G, n, m]."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _kind(x: object) -> str:
    return _name(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

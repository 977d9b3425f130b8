"""One wording for the errors every operator shares: name, expected, got."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import Intervals, Mask, causal, normal

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Logits(NamedTuple):
    """What turns q and k into masked scores, checked and resolved: the common head of every operator's arguments."""

    start: Tensor
    stop: Tensor
    offset: int
    bias: Tensor | None
    slopes: Tensor | None
    scale: float
    softcap: float
    sink: Tensor | None

    def of_head(self, b: int, h: int) -> "Logits":
        """Those of one head of one sequence, as a batch of one."""

        def one(x: Tensor, *at: int) -> Tensor:
            for axis, n in enumerate(at):
                x = x.narrow(axis, n if x.shape[axis] > 1 else 0, 1)
            return x

        start, stop = one(self.start, b), one(self.stop, b)
        bias, slopes = (None if x is None else one(x, b, h) for x in (self.bias, self.slopes))
        sink = None if self.sink is None else one(self.sink, h)
        return self._replace(start=start, stop=stop, bias=bias, slopes=slopes, sink=sink)

    def of_rows(self, rows: Tensor, S: int, dtype: torch.dtype) -> "Logits":
        """Those of some rows over S keys, ALiBi as a dense bias in dtype: chosen rows have no common offset."""
        bias = self.bias
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, rows]
        if self.slopes is not None:
            distance = (rows[:, None] + self.offset - torch.arange(S, device=rows.device)).abs()
            alibi = -self.slopes.to(dtype)[:, :, None, None] * distance
            bias = alibi if bias is None else bias + alibi
        start, stop = (bound.index_select(1, rows) for bound in (self.start, self.stop))
        return self._replace(start=start, stop=stop, bias=bias, slopes=None)


def check_qk(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, H, T, D], got {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {_dtype(x)}")
    same("k", k, "q", q)
    B, H, _, D = q.shape
    if D == 0:
        raise ValueError("q must have a head dim of at least 1, got 0")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k must have shape [{B}, H_kv, S, {D}], got {list(k.shape)}")
    if H == 0 or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(f"k must have a head count that divides q's {H}, got {k.shape[1]}")


def check_v(v: Tensor, k: Tensor) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a torch.Tensor, got {type(v).__name__}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v must have shape [{', '.join(map(str, k.shape[:3]))}, V], V ≥ 1, got {list(v.shape)}")
    same("v", v, "k", k)


def check_probs_dtype(dtype: torch.dtype | None, q: Tensor) -> torch.dtype:
    """The dtype of returned probabilities, q's by default."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if dtype not in (None, q.dtype, wide):
        allowed = " or ".join(dict.fromkeys((_name(q.dtype), _name(wide))))
        raise TypeError(f"probs_dtype must be {allowed}, got {dtype if dtype is None else _name(dtype)}")
    return q.dtype if dtype is None else dtype


def check_square(name: str, q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{name} needs as many queries as keys, got T = {q.shape[2]} and S = {k.shape[2]}")


def same(name: str, x: Tensor, like: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have {like}'s dtype {_dtype(y)}, got {_dtype(x)}")
    if x.device != y.device:
        raise ValueError(f"{name} must be on {like}'s device {y.device}, got {x.device}")


def resolve_mask(q: Tensor, k: Tensor, mask: Mask | Intervals | None, is_causal: bool) -> Intervals:
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = Mask()
    if isinstance(mask, Mask):
        mask = (causal() & mask if is_causal else mask).resolve(T, S, device=q.device)
        _check_rows(mask, q)
        return mask
    if not isinstance(mask, Intervals):
        raise TypeError(f"mask must be a causalattn Mask or Intervals, got {type(mask).__name__}")
    _check_rows(mask, q)
    start, stop, first, offset = mask
    if not (start.is_cuda or torch.compiler.is_compiling()) and ((start < 0) | (stop > S)).any():
        raise ValueError(f"mask must lie in 0…{S}, got {int(start.min())}…{int(stop.max())}")
    # where its values cannot be read, it is cut to the keys
    start, stop = start.clamp(0, S), stop.clamp(0, S)
    if is_causal:
        stop = torch.minimum(stop, torch.arange(offset + 1, offset + T + 1, device=q.device))
    return normal(start, stop, first, offset)


def _check_rows(mask: Intervals, q: Tensor) -> None:
    B, T = q.shape[0], q.shape[2]
    for bound in mask[:3]:
        if bound.ndim != 2 or bound.shape[0] not in (1, B) or bound.shape[1] != T:
            raise ValueError(f"mask must be for [{B} or 1, {T}] rows, got {list(bound.shape)}")
        if bound.device != q.device:
            raise ValueError(f"mask must be on q's device {q.device}, got {bound.device}")
        if bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool:
            raise TypeError(f"mask must hold integers, got {_dtype(bound)}")


def resolve_rows(name: str, rows: Tensor | Sequence[int], q: Tensor) -> Tensor:
    """rows, an argument called so, as positions 0 … T − 1 on q's device, [R] int64."""
    T = q.shape[2]
    if isinstance(rows, Tensor) and rows.is_cuda and not q.is_cuda:
        raise ValueError(f"{name} must be on q's device {q.device}, got {rows.device}")
    try:
        chosen = torch.as_tensor(rows)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of integers, got {type(rows).__name__}") from None
    if chosen.numel() == 0:
        chosen = chosen.long()
    if chosen.ndim != 1:
        raise ValueError(f"{name} must have shape [R], got {list(chosen.shape)}")
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {_dtype(chosen)}")
    if isinstance(rows, Tensor):
        values = [] if rows.is_cuda or torch.compiler.is_compiling() else rows.tolist()
    else:
        values = rows
    wrong = [i for i in values if not -T <= i < T]
    if wrong or (T == 0 and chosen.numel()):
        raise ValueError(f"{name} must lie in {-T}…{T - 1}, got {wrong[0] if wrong else 'some of an empty q'}")
    chosen = chosen.to(q.device, torch.int64)
    return torch.where(chosen < 0, chosen + T, chosen).clamp(0, max(T - 1, 0))


def resolve_logits(
    q: Tensor,
    k: Tensor,
    mask: Intervals,
    *,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Logits:
    B, H, T, D = q.shape
    if bias is not None:
        bias = _check_bias(bias, (B, H, T, k.shape[2]), q.device)
    if alibi_slopes is not None:
        alibi_slopes = _check_slopes(alibi_slopes, B, H, q.device)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if sink is not None:
        sink = _check_sink(sink, H, q.device)
    scale = D**-0.5 if scale is None else float(scale)
    return Logits(mask.start, mask.stop, mask.offset, bias, alibi_slopes, scale, softcap or 0.0, sink)


def _check_sink(sink: Tensor, H: int, device: torch.device) -> Tensor:
    _check_tensor("sink", sink)
    if sink.shape != (H,):
        raise ValueError(f"sink must have shape [{H}], got {list(sink.shape)}")
    if sink.device != device:
        raise ValueError(f"sink must be on q's device {device}, got {sink.device}")
    if not sink.is_floating_point():
        raise TypeError(f"sink must be floating point, got {_dtype(sink)}")
    return sink.contiguous()


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_bias(bias: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """bias with 4 axes, of length 1 where it broadcasts."""
    _check_tensor("bias", bias)
    if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"bias must broadcast to {list(shape)}, got {list(bias.shape)}")
    if bias.device != device or not bias.is_floating_point():
        raise TypeError(f"bias must be floating point on {device}, got {_dtype(bias)} on {bias.device}")
    return bias[(None,) * (4 - bias.ndim)]


def _check_slopes(slopes: Tensor, B: int, H: int, device: torch.device) -> Tensor:
    """slopes as [B or 1, H]."""
    _check_tensor("alibi_slopes", slopes)
    if slopes.ndim not in (1, 2) or slopes.shape[-1] != H or (slopes.ndim == 2 and slopes.shape[0] not in (1, B)):
        raise ValueError(f"alibi_slopes must have shape [{H}] or [{B}, {H}], got {list(slopes.shape)}")
    if slopes.device != device or not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be floating point on {device}, got {_dtype(slopes)} on {slopes.device}")
    if slopes.requires_grad:
        raise NotImplementedError("alibi_slopes have no gradient: pass alibi_slopes.detach()")
    return slopes.reshape(-1, H)


def _dtype(x: Tensor) -> str:
    return _name(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

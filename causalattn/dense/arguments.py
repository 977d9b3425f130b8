"""What every operator on a matrix at hand takes."""

from torch import Tensor

from .._checks import FLOATS


def heads_of(A: Tensor) -> Tensor:
    """A as [B, H, T, S]."""
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a torch.Tensor, got {type(A).__name__}")
    if not 2 <= A.ndim <= 4:
        raise ValueError(f"A must have shape [T, S], [H, T, S] or [B, H, T, S], got {list(A.shape)}")
    if A.dtype not in FLOATS:
        raise TypeError(f"A must be float16, bfloat16, float32 or float64, got {str(A.dtype).removeprefix('torch.')}")
    return A[(None,) * (4 - A.ndim)]

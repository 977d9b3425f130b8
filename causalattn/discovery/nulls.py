"""What a search finds where there is nothing to find: attention with the rows' entropies and no structure."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..dense import correlation
from .discover import Discovery, discover

NullKind = Literal["random_logits", "permute"]
NULLS = ("random_logits", "permute")
# halvings of an interval of logarithms: to the last bit of a float64
STEPS = 60


def null_attention(
    A: Tensor,
    *,
    null: NullKind = "random_logits",
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw an attention map that has the entropies of another and nothing else of it.

        "permute"          each row's weights in a random order over the keys it may attend
        "random_logits"    the softmax of s_i·g_ij, g standard normal, s_i such that row i has the entropy of A's row

    Args:
        A: probabilities, [T, S]; a row that sums to less, beside a learned sink, is scaled to 1, an empty one stays.
        null: which.
        allowed: the keys each row may attend, [T, S] bool; those of positive weight by default.
        generator: makes the draw repeatable.

    Returns:
        [T, S], float64, on A's device.

    Raises:
        ValueError: an unknown null, or an A or allowed that does not fit.

    Example:
        >>> null_attention(torch.tensor([[1.0, 0.0], [0.3, 0.7]]), null="permute")[0]
        tensor([1., 0.], dtype=torch.float64)
    """
    if null not in NULLS:
        raise ValueError(f"null must be one of {', '.join(NULLS)}, got {null!r}")
    if A.ndim != 2:
        raise ValueError(f"A must be one map [T, S], got {list(A.shape)}")
    A = A.detach().double()
    if not A.is_cuda and not (A >= 0).all():
        raise ValueError("A must hold probabilities, got a negative number or NaN")
    # what a learned sink takes is no key's: correlations do not see the scale of a row
    mass = A.sum(-1, keepdim=True)
    A = torch.where(mass > 0, A / mass, 0.0)
    allowed = A > 0 if allowed is None else allowed
    if allowed.shape != A.shape or allowed.dtype != torch.bool:
        raise ValueError(f"allowed must be bool, of A's shape {list(A.shape)}, got {list(allowed.shape)}")
    noise = torch.randn(A.shape, generator=generator, dtype=torch.float64).to(A.device)
    if null == "random_logits":
        return _of_entropy(noise, allowed, torch.special.entr(A).sum(-1))
    if not A.is_cuda and A[~allowed].any():
        raise ValueError("allowed must hold every key of positive weight, got a weight outside it")
    # allowed keys in a random order, then the weights of allowed keys in theirs
    order = noise.masked_fill(~allowed, torch.inf).argsort(-1)
    places = (~allowed).to(torch.int8).argsort(dim=-1, stable=True)
    return torch.zeros_like(A).scatter(-1, order, A.gather(-1, places))


def null_discoveries(
    A: Tensor,
    *,
    null: NullKind = "random_logits",
    draws: int = 20,
    allowed: Tensor | None = None,
    correlate: Callable[[Tensor], Tensor] = correlation,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> list[Discovery]:
    """Search the graphs of as many null maps of A: what `discover` makes of attention without structure.

    A graph whose edges are no more, no fewer and no stronger than theirs says nothing of the model.

    Args:
        A, null, allowed, generator: as in `null_attention`.
        draws: how many.
        correlate: makes R of a drawn map, as it was made of A: `dense.correlation`, or that with center=True.
        progress: called with how many are done and draws.
        options: of `discover`, such as cut, n, alpha, order, max_order.

    Raises:
        ValueError: draws < 1; else as in `null_attention` and `discover`.

    Example:
        >>> A = torch.rand(6, 6).softmax(-1)
        >>> [x.pag.skeleton.shape for x in null_discoveries(A, draws=2, cut=0.3)]
        [(6, 6), (6, 6)]
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    found = []
    for done in range(draws):
        drawn = null_attention(A, null=null, allowed=allowed, generator=generator)
        found.append(discover(correlate(drawn), **options))
        if progress is not None:
            progress(done + 1, draws)
    return found


def _of_entropy(noise: Tensor, allowed: Tensor, entropy: Tensor) -> Tensor:
    """softmax(s·noise) of each row with s such that it has that entropy, which falls with s."""
    low, high = entropy.new_full(entropy.shape, -20.0), entropy.new_full(entropy.shape, 20.0)

    def softmax(log2_s: Tensor) -> Tensor:
        x = (noise * torch.exp2(log2_s)[:, None]).masked_fill(~allowed, -torch.inf)
        return x.softmax(-1).nan_to_num(0)

    for _ in range(STEPS):
        middle = (low + high) / 2
        flat = torch.special.entr(softmax(middle)).sum(-1) > entropy
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return softmax((low + high) / 2)

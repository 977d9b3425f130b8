"""One causal pass over the tokens: out, its denominator, and the state behind the last token."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .backward import linear_attend_backward
from .prefix import prefix_product
from .sequences import inverse, sequences

# tokens of a head that are made ready at once: what a cache holds
PART = 4096


@torch.library.custom_op("causalattn::linear_attention", mutates_args=())
def linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    cu_seqlens: Tensor | None,
    feature: str,
    normalize: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, H, T, V], den [B, H, T] (empty if not normalize), s [B or segments, H, D, V] and z [B or segments, H, D].

    decay is [B, H, T] or [B, H, T, D]; feature is the name of an elementwise map.
    """
    if use_triton(backend, q):
        from ..kernels.linear_attention.forward import linear_attention_fwd

        return linear_attention_fwd(q, k, v, decay, s0, z0, cu_seqlens, feature, normalize, scale)
    return _linear_attend_torch(q, k, v, decay, s0, z0, cu_seqlens, feature, normalize, scale)


@linear_attend.register_fake
def _(q, k, v, decay, s0, z0, cu_seqlens, feature, normalize, scale, backend):
    return _empty_results(q, v, cu_seqlens, normalize)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.feature, ctx.normalize, ctx.scale, ctx.backend = inputs
    _, den, _, _ = output
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(den)


def _backward(ctx, dout, _den, ds, dz):
    q, k, v, decay, s0, z0, cu_seqlens, *results = ctx.saved_tensors
    dq, dk, dv, ddecay, ds0, dz0 = linear_attend_backward(
        q, k, v, decay, s0, z0, cu_seqlens, ctx.feature, ctx.normalize, ctx.scale,
        *results, dout, ds, dz, ctx.needs_input_grad[3], ctx.backend,
    )  # fmt: skip
    ddecay = ddecay.to(decay.dtype) if ctx.needs_input_grad[3] else None
    ds0, dz0 = (None, None) if s0 is None else (ds0, dz0)
    return dq, dk, dv, ddecay, ds0, dz0, None, None, None, None, None


linear_attend.register_autograd(_backward, setup_context=_setup_context)


def _empty_results(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool) -> tuple[Tensor, ...]:
    B, H, T, D = q.shape
    V, dtype = v.shape[3], accumulator(q)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        q.new_empty(B, H, T, V),
        q.new_empty((B, H, T) if normalize else 0, dtype=dtype),
        q.new_empty(N, H, D, V, dtype=dtype),
        q.new_empty(N, H, D, dtype=dtype),
    )


def _linear_attend_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    cu_seqlens: Tensor | None,
    feature: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    out, den, s, z = _empty_results(q, v, cu_seqlens, normalize)
    if cu_seqlens is not None:
        # rows beyond the last segment
        out.zero_(), den.zero_()
    state = None
    for x in sequences(q, k, v, decay, s0, z0, cu_seqlens, feature, PART):
        y, state = prefix_product(x.q, x.k, x.v, x.decay, x.state if x.begins else state, "contracted")
        num, weight = y[:, : x.T].split((x.V, 1), 2)
        if normalize:
            den[x.b, x.h, x.tokens] = weight[..., 0]
            num.mul_(inverse(weight))
        else:
            num.mul_(scale)
        out[x.b, x.h, x.tokens] = num
        s[x.n, x.h], z[x.n, x.h] = state[..., : x.V], state[..., x.V]
    return out, den, s, z

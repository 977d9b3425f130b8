"""The gradient of `forward.linear_attend`: three more prefix products, two of them from the last token to the first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulator, use_triton
from ..feature_maps import elementwise_gradient
from .prefix import padded, prefix_product
from .sequences import Heads, inverse, sequences


@torch.library.custom_op("causalattn::linear_attention_backward", mutates_args=())
def linear_attend_backward(
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
    out: Tensor,
    den: Tensor,
    s: Tensor,
    z: Tensor,
    dout: Tensor,
    ds: Tensor,
    dz: Tensor,
    decay_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay (in the accumulation dtype), s0 and z0, empty where there is none."""
    tensors = (q, k, v, decay, s0, z0, cu_seqlens)
    results = (out, den, s, z, dout, ds, dz)
    if use_triton(backend, q):
        from ..kernels.linear_attention.backward import linear_attention_bwd

        return linear_attention_bwd(*tensors, feature, normalize, scale, *results, decay_grad)
    return _linear_attend_backward_torch(tensors, feature, normalize, scale, results, decay_grad)


@linear_attend_backward.register_fake
def _(q, k, v, decay, s0, z0, cu_seqlens, feature, normalize, scale, out, den, s, z, dout, ds, dz, decay_grad, backend):
    return _empty_gradients(q, k, v, decay, s0, z0, decay_grad)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s0: Tensor | None, z0: Tensor | None, decay_grad: bool
) -> tuple[Tensor, ...]:
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(decay.shape if decay_grad else 0, dtype=accumulator(q)),
        *(q.new_empty(0 if x is None else x.shape, dtype=accumulator(q)) for x in (s0, z0)),
    )


def _linear_attend_backward_torch(
    tensors: tuple[Tensor | None, ...],
    feature: str,
    normalize: bool,
    scale: float,
    results: tuple[Tensor, ...],
    decay_grad: bool,
) -> tuple[Tensor, ...]:
    q, k, v, decay, s0, z0, _ = tensors
    _, _, s, z, *_ = results
    dq, _, _, ddecay, ds0, dz0 = _empty_gradients(q, k, v, decay, s0, z0, decay_grad)
    # rows beyond the last segment, and the sums over a group of query heads
    dq.zero_(), ddecay.zero_()
    dk, dv = (x.new_zeros(x.shape, dtype=accumulator(q)) for x in (k, v))
    for x in sequences(*tensors, feature):
        dnum, dstate = _upstream(x, normalize, scale, *results)
        dq_x, dk_x, dv_x, dstate_0 = _features_gradients(x, dnum, dstate)
        if decay_grad:
            ddecay[x.b, x.h, x.tokens] = _decay_gradient(x, dq_x, dk_x, dstate, s, z).view_as(
                ddecay[x.b, x.h, x.tokens]
            )
        for grad, phi in ((dq_x, x.q), (dk_x, x.k)):
            slope = elementwise_gradient(feature, phi)
            if slope is not None:
                grad.mul_(slope)
        dq[x.b, x.h, x.tokens] = dq_x[:, : x.T]
        for i, h in enumerate(x.kv_heads):
            dk[x.b, h, x.tokens] += dk_x[i, : x.T]
            dv[x.b, h, x.tokens] += dv_x[i, : x.T, : x.V]
        if s0 is not None:
            ds0[x.n, x.h], dz0[x.n, x.h] = dstate_0[..., : x.V], dstate_0[..., x.V]
    return dq, dk.to(k.dtype), dv.to(v.dtype), ddecay, ds0, dz0


def _upstream(
    x: Heads, normalize: bool, scale: float, out: Tensor, den: Tensor, s: Tensor, z: Tensor, dout: Tensor,
    ds: Tensor, dz: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of [num, den], in whole chunks, and of the last state [s, z]."""
    dnum = dout[x.b, x.h, x.tokens].to(x.dtype)
    if normalize:
        unit = inverse(den[x.b, x.h, x.tokens, None])
        dden = -torch.linalg.vecdot(dnum, out[x.b, x.h, x.tokens].to(x.dtype))[..., None]
        dnum, dden = dnum * unit, dden * unit
    else:
        dnum, dden = dnum * scale, dnum.new_zeros(len(dnum), x.T, 1)
    return padded(torch.cat([dnum, dden], 2)), _state(x, ds, dz)


def _features_gradients(x: Heads, dnum: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of φ(q), φ(k), [v, 1] and the initial state."""
    dq, _ = prefix_product(dnum, x.v, x.k, x.decay, x.state.mT, "output")
    q, k, v, dnum = (y.flip(1) for y in (x.q, x.k, x.v, dnum))
    decay = None if x.decay is None else F.pad(x.decay[:, 1:], (0, 0, 0, 1)).flip(1)
    dk, _ = prefix_product(v, dnum, q, decay, dstate.mT, "output")
    dv, dstate_0 = prefix_product(k, q, dnum, decay, dstate, "contracted")
    if x.decay is not None:
        # with no token there is nothing to decay by
        dstate_0 = dstate_0 * x.decay[:, :1].to(x.dtype).exp().mT if x.T else dstate_0
    return dq, dk.flip(1), dv.flip(1), dstate_0


def _decay_gradient(x: Heads, dq: Tensor, dk: Tensor, dstate: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """dg_r = Σ_{t ≥ r} dG_t with dG = φ(q) dφ(q) − φ(k) dφ(k), and ⟨dS, S⟩ in the last, [heads, T, 1 or D]."""
    dG = x.q[:, : x.T].double() * dq[:, : x.T] - x.k[:, : x.T].double() * dk[:, : x.T]
    last = (dstate.double() * _state(x, s, z)).sum(2)
    if x.decay.shape[2] == 1:
        dG, last = dG.sum(2, keepdim=True), last.sum(1, keepdim=True)
    return (dG.flip(1).cumsum(1) + last[:, None]).flip(1)


def _state(x: Heads, s: Tensor, z: Tensor) -> Tensor:
    """[s, z] of these heads: [heads, D, V + 1]."""
    return torch.cat([s[x.n, x.h], z[x.n, x.h, :, None]], 2)

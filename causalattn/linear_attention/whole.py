"""The form that is not causal: every query reads the state behind the last token."""

import torch
from torch import Tensor

from .._backend import Backend, accumulator, use_triton
from ..feature_maps import elementwise
from .arguments import LinearState
from .sequences import inverse


def attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, feature: str, normalize: bool, scale: float, state: LinearState | None,
    backend: Backend,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """out and the state, in plain torch on every backend: two products of whole matrices."""
    # an explicit request is refused where it could not be met
    use_triton(backend, q)
    B, H, _, D = q.shape
    H_kv, V = k.shape[1], v.shape[3]
    wide = accumulator(q)
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = (elementwise(feature, x.to(wide)) for x in (q, k))
        v = v.to(wide)
        ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        total = (phi_k.mT @ ones)[:, :, None].expand(B, H_kv, H // H_kv, D, V + 1).reshape(B, H, D, V + 1)
        s, z = total[..., :V], total[..., V]
        if state is not None:
            s, z = s + state[0], z + state[1]
        num = phi_q @ torch.cat([s, z[..., None]], -1)
        out = num[..., :V] * (inverse(num[..., V:]) if normalize else scale)
    return out.to(q.dtype), LinearState(s.contiguous(), z.contiguous())

"""Linear attention: a prefix sum of key-value products read by every query, decayed or not, normalised or not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import Backend
from ..feature_maps import ELEMENTWISE, FeatureMap
from .arguments import (
    LinearAttentionOutput,
    LinearState,
    check_feature_map,
    check_scale,
    check_state,
    check_tokens,
    mapped,
    resolve_cu_seqlens,
    resolve_decay,
)
from .forward import linear_attend
from .matrix import linear_attention_matrix
from .step import linear_attention_step
from .whole import attend_to_all

__all__ = [
    "LinearAttentionOutput", "LinearState",
    "linear_attention", "linear_attention_matrix", "linear_attention_step",
]  # fmt: skip


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    decay: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: Backend = "auto",
) -> LinearAttentionOutput:
    """Attend through features, in O(T) time and memory: each token is written to a state, then the state is read.

        S_t = e^{g_t} S_{t−1} + φ(k_t) v_tᵀ,  z_t = e^{g_t} z_{t−1} + φ(k_t)
        out_t = φ(q_t)·S_t / φ(q_t)·z_t  with normalize, else scale·φ(q_t)·S_t

    Args:
        q: queries, [B, H, T, D], any strides; float16, bfloat16, float32 or float64.
        k: keys, [B, H_kv, T, D]; H_kv divides H, and each key head serves H / H_kv query heads in turn.
        v: values, [B, H_kv, T, V].
        feature_map: φ, from [..., D] to [..., F]: "elu" (elu + 1), "relu", "exp", "identity", "taylor2", "favor", or a
            callable, which is given float32 (float64 for float64). What is not elementwise is summed in q's dtype.
        decay: the logarithms g ≤ 0 of what a step keeps: None for 0, [H] for one a head (RetNet), [B, H, T] for one a
            step (Mamba-2), [B, H, T, F] for one a step and feature (GLA), in any floating dtype; float32 is best. Its
            values are checked on the CPU; on CUDA g > 0 is growth, possibly to inf. Where a sequence must start anew,
            use cu_seqlens: −∞ is no decay.
        causal: False lets every query read the last state, without decay and cu_seqlens.
        normalize: divide by φ(q_t)·z_t, which must not change its sign: φ ≥ 0, checked for callables on the CPU. A
            denominator of 0 gives 0.
        scale: multiplies out; 1 with normalize.
        initial_state: S_0 and z_0, zeros by default; what another call returned, so that the tokens go on.
        cu_seqlens: where segments of one packed sequence (B = 1) begin, and the last ends: [segments + 1] integers from
            0, never decreasing, to at most T. Each is a sequence by itself with a state of its own, empty ones too.
            Rows beyond give 0 and are not read. Values are checked on the CPU; on CUDA wrong ones give wrong numbers,
            never an access out of bounds, and backend="torch" waits for them there.
        backend: "auto" takes Triton for CUDA tensors and torch otherwise.

    Returns:
        LinearAttentionOutput; the state holds s and z whether out is normalised or not. Both are differentiable in q,
        k, v, decay and initial_state. A NaN or inf in a token reaches no sequence but its own.

    Raises:
        ValueError: a shape, device, decay, scale, state or cu_seqlens that does not fit, or a negative φ to normalise.
        TypeError: a dtype that does not fit, or float64 with backend="triton".
        NotImplementedError: backend="triton" without the triton package.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236); in chunks as in Yang et al. 2024 (arXiv:2312.06635).

    Example:
        >>> q = k = v = torch.eye(2).view(1, 1, 2, 2)
        >>> linear_attention(q, k, v).out
        tensor([[[[1.0000, 0.0000],
                  [0.4444, 0.5556]]]])
    """
    check_tokens(q, k, v, "linear_attention")
    check_feature_map(feature_map, normalize)
    scale = check_scale(normalize, scale)
    feature, dtype = "identity", q.dtype
    if isinstance(feature_map, str) and feature_map in ELEMENTWISE:
        feature = feature_map
    else:
        with torch.autocast(q.device.type, enabled=False):
            q, k = (x.to(dtype) for x in mapped(feature_map, q, k, normalize))
    cu_seqlens = resolve_cu_seqlens(cu_seqlens, q)
    decay = resolve_decay(decay, q)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_state(initial_state, "initial_state", N, q, v.shape[3])
    if not causal:
        if decay is not None or cu_seqlens is not None:
            raise ValueError("causal=False takes no decay and no cu_seqlens, got one")
        return LinearAttentionOutput(*attend_to_all(q, k, v, feature, normalize, scale, initial_state, backend))
    s0, z0 = (None, None) if initial_state is None else initial_state
    out, _, s, z = linear_attend(q, k, v, decay, s0, z0, cu_seqlens, feature, normalize, scale, backend)
    return LinearAttentionOutput(out, LinearState(s, z))

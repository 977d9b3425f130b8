"""The scan and the states its groups of tokens begin with, which the gradient begins from again."""

import torch
from torch import Tensor

from .._backend import accumulator, use_triton
from .backward import scan_backward
from .groups import GROUP, Blocks, Steps, sigmoid


@torch.library.custom_op("causalattn::selective_scan", mutates_args=())
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    zoh: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, the last state and the states before tokens 0, GROUP, 2·GROUP …: [B, groups, N, E]."""
    if use_triton(backend, u):
        from ..kernels.selective_scan.forward import selective_scan_fwd

        return selective_scan_fwd(u, delta, A, B, C, D, z, initial_state, zoh, GROUP)
    return _scan_torch(u, delta, A, B, C, D, z, initial_state, zoh)


@scan.register_fake
def _(u, delta, A, B, C, D, z, initial_state, zoh, backend):
    return _empty_results(u, A)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.zoh, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:-1], output[2])
    ctx.stateful = tensors[-1] is not None
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dstate, _starts):
    u, delta, A, B, C, D, z, starts = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(u)
    gradients = list(scan_backward(u, delta, A, B, C, D, z, starts, dout, dstate, ctx.zoh, ctx.backend))
    for n, given in ((5, D is not None), (6, z is not None), (7, ctx.stateful)):
        if not given:
            gradients[n] = None
    return *gradients, None, None


scan.register_autograd(_backward, setup_context=_setup_context)


def _empty_results(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, T, E = u.shape
    N, dtype = A.shape[1], accumulator(u)
    return (
        u.new_empty(u.shape),
        u.new_empty(batch, E, N, dtype=dtype),
        u.new_empty(batch, (T + GROUP - 1) // GROUP, N, E, dtype=dtype),
    )


def _scan_torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, initial_state: Tensor | None, zoh: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, state, starts = _empty_results(u, A)
    blocks = Blocks(u, A)
    state.copy_(torch.zeros_like(state) if initial_state is None else initial_state)
    for block in blocks.forwards():
        steps = Steps(block, delta, A, zoh)
        inputs, b, c = (block.tokens(x) for x in (u, B, C))
        y, end = _scan_from_zero(steps, inputs, b, c)
        h = state[block.batch].mT
        for n in range(block.groups):
            starts[block.batch, block.first + n] = h
            h = h * steps.across[:, n] + end[:, n]
        state[block.batch] = h.mT
        _add_what_came_before(y, steps, starts[block.batch, block.first : block.first + block.groups], c)
        if D is not None:
            y += inputs * D.to(y.dtype)
        if z is not None:
            gate = block.tokens(z)
            y *= gate * sigmoid(gate)
        block.store(out, y)
    return out, state, starts


def _scan_from_zero(steps: Steps, u: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n C_tn h_tn and the last h of every group, from h = 0 before its first token."""
    y, h = torch.empty_like(u), steps.zeros()
    w, product = torch.empty_like(h), torch.empty_like(h)
    for t in range(GROUP):
        steps.inputs(t, u[t], b[t], out=w)
        torch.addcmul(w, h, steps.decay[t], out=h)
        torch.mul(h, c[t, ..., None], out=product)
        torch.sum(product, -2, out=y[t])
    return y, h


def _add_what_came_before(y: Tensor, steps: Steps, h: Tensor, c: Tensor) -> None:
    """Add to y what is left of the state h that each group begins with."""
    h, product = h.clone(), torch.empty_like(h)
    for t in range(GROUP):
        h.mul_(steps.decay[t])
        torch.mul(h, c[t, ..., None], out=product)
        y[t] += product.sum(-2)

"""The gradient of `forward.scan`: states formed again group by group, their gradients scanned from the end."""

import torch
from torch import Tensor

from .._backend import use_triton
from .groups import GROUP, Block, Blocks, Steps, sigmoid


@torch.library.custom_op("causalattn::selective_scan_backward", mutates_args=())
def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    starts: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
    zoh: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z (those empty where there is none) and the initial state."""
    if use_triton(backend, u):
        from ..kernels.selective_scan.backward import selective_scan_bwd

        return selective_scan_bwd(u, delta, A, B, C, D, z, starts, dout, dstate, zoh, GROUP)
    return _scan_backward_torch(u, delta, A, B, C, D, z, starts, dout, dstate, zoh)


@scan_backward.register_fake
def _(u, delta, A, B, C, D, z, starts, dout, dstate, zoh, backend):
    state = starts.new_empty(u.shape[0], *A.shape)
    return *(x.new_empty(x.shape) for x in (u, delta, A, B, C)), *_empty_options(u, D, z), state


def _empty_options(u: Tensor, D: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (D, z))


def _scan_backward_torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    starts: Tensor, dout: Tensor, dstate: Tensor | None, zoh: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    du, ddelta, dB, dC = (x.new_empty(x.shape) for x in (u, delta, B, C))
    dz = _empty_options(u, D, z)[1]
    # over all tokens in float64: blocks are many
    dA = torch.zeros(A.shape[::-1], dtype=torch.float64, device=A.device)
    dD = torch.zeros(u.shape[2] if D is not None else 0, dtype=torch.float64, device=A.device)
    carried = starts.new_zeros(u.shape[0], *A.shape) if dstate is None else dstate.clone()
    for block in Blocks(u, A).backwards():
        steps = Steps(block, delta, A, zoh)
        inputs, b, c, dy = (block.tokens(x) for x in (u, B, C, dout))
        h = _states(steps, inputs, b, starts[block.batch, block.first : block.first + block.groups])
        if z is not None:
            gate = block.tokens(z)
            share = sigmoid(gate)
            block.store(dz, dy * _ungated(h, c, inputs, D) * (share * (1 + gate * (1 - share))))
            dy *= gate * share
        ends = _carry(steps, c, dy, carried, block)
        grads = _Gradients(steps, h, inputs, b, c, dy)
        for t in reversed(range(GROUP)):
            grads.take(t, ends)
        dA += grads.A.sum((0, 1), dtype=torch.float64)
        if D is not None:
            grads.u.addcmul_(dy, D.to(dy.dtype))
            dD += (dy * inputs).sum((0, 1, 2), dtype=torch.float64)
        for out, x in ((du, grads.u), (ddelta, grads.delta), (dB, grads.B), (dC, grads.C)):
            block.store(out, x)
    dD = dD.to(u.dtype if D is None else D.dtype)
    return du, ddelta, dA.mT.to(A.dtype).contiguous(), dB, dC, dD, dz, carried


def _states(steps: Steps, u: Tensor, b: Tensor, starts: Tensor) -> Tensor:
    """h before every token of a block and after its last: [GROUP + 1, sequences, groups, N, E]."""
    h = starts.new_empty(GROUP + 1, *starts.shape)
    h[0] = starts
    w = torch.empty_like(starts)
    for t in range(GROUP):
        steps.inputs(t, u[t], b[t], out=w)
        torch.addcmul(w, h[t], steps.decay[t], out=h[t + 1])
    return h


def _ungated(h: Tensor, c: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    """What forward multiplied by silu(z)."""
    y = torch.empty_like(u)
    for t in range(GROUP):
        torch.sum(h[t + 1] * c[t, ..., None], -2, out=y[t])
    return y if D is None else y.addcmul_(u, D.to(y.dtype))


def _carry(steps: Steps, c: Tensor, dy: Tensor, carried: Tensor, block: Block) -> Tensor:
    """The gradient of the state after each group; carried, that after the block, becomes that before it."""
    r = steps.zeros()
    w = torch.empty_like(r)
    for t in reversed(range(GROUP)):
        torch.mul(c[t, ..., None], dy[t, ..., None, :], out=w)
        r.add_(w).mul_(steps.decay[t])
    ends = torch.empty_like(r)
    after = carried[block.batch].mT
    for n in reversed(range(block.groups)):
        ends[:, n] = after
        after = after * steps.across[:, n] + r[:, n]
    carried[block.batch] = after.mT
    return ends


class _Gradients:
    """Of a block's u, delta, B and C, as its tokens lie, and of A, [sequences, groups, N, E], summed over a group."""

    def __init__(self, steps: Steps, h: Tensor, u: Tensor, b: Tensor, c: Tensor, dy: Tensor):
        self._steps, self._h, self._u, self._b, self._c, self._dy = steps, h, u, b, c, dy
        self.u, self.delta, self.B, self.C = (torch.empty_like(x) for x in (u, u, b, c))
        self.A = steps.zeros()

    def take(self, t: int, after: Tensor) -> None:
        """Add those of token t; after, the gradient of h_t from later tokens, becomes that of h_{t−1}."""
        steps, u, b, dy = self._steps, self._u[t][..., None, :], self._b[t][..., None], self._dy[t][..., None, :]
        g = after.addcmul_(self._c[t][..., None], dy)
        torch.sum(self._h[t + 1] * dy, -1, out=self.C[t])
        gb = g * b
        held = steps.held[t]
        torch.sum(gb * held, -2, out=self.u[t])
        torch.sum(g * (held * u), -1, out=self.B[t])
        # through h_{t−1}
        dx = (g * self._h[t]).mul_(steps.decay[t])
        gb.mul_(u)
        self.A.addcmul_(dx, steps.delta[t][..., None, :])
        dx.mul_(steps.A)
        if steps.zoh:
            self.A.addcmul_(gb, steps.held_by_rate(t))
            gb.mul_(steps.decay[t])
        torch.sum(dx.add_(gb), -2, out=self.delta[t])
        g.mul_(steps.decay[t])

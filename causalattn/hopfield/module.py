"""Hopfield retrieval as a layer."""

from torch import Tensor, nn

from .._backend import Backend
from .arguments import check_steps
from .modern import Retrieval, hopfield_retrieve


class Hopfield(nn.Module):
    """Retrieve from patterns given with each call, by several heads, between projections or none.

        ξ = W_q state, X = W_k patterns, V = W_v values; out = W_o · values that ξ retrieves after `steps` − 1 updates

    For users of `hflayers.Hopfield`: there is no layer norm here, on nothing. β is the same at every step, a head's
    width^−½ by default with projections or without, where theirs is 1 without. tol bounds the length of an update, and
    each query stops by itself; theirs bounds the change of softmax weights, of a whole batch. The association matrix is
    never formed, and `retrieve` gives energies. project=False is their three `*_as_static` with
    `disable_out_projection`.

    Args:
        dim: width of state and, with project, of out.
        pattern_dim, value_dim: widths of patterns and values, dim and pattern_dim by default.
        heads: how many; their states are dim // heads wide.
        beta: a number, or a tensor [heads] (an nn.Parameter is learned); the head's width^−½ by default.
        steps, tol: as in `hopfield_retrieve`; the last step reads values.
        project: False retrieves from what is given, as it is; then all widths are dim's, and values are optional.
        bias: give the projections biases.
        backend: as in `hopfield_retrieve`.

    Shapes: state [B, L, dim], patterns [B, N, pattern_dim], values [B, N, value_dim] (patterns by default), out
    [B, L, dim], or [B, L, value_dim] without projections.

    Raises:
        ValueError: heads that do not divide dim, widths that differ without projections, a beta, steps or tol that
            does not fit; in a call, a tensor of another shape.

    Source: Ramsauer et al. 2020 (arXiv:2008.02217).

    Example:
        >>> Hopfield(2, project=False, beta=20.0)(torch.tensor([[[0.9, 0.2]]]), torch.eye(2)[None])
        tensor([[[1.0000e+00, 8.3153e-07]]])
    """

    def __init__(
        self,
        dim: int,
        *,
        pattern_dim: int | None = None,
        value_dim: int | None = None,
        heads: int = 1,
        beta: float | Tensor | None = None,
        steps: int = 1,
        tol: float | None = None,
        project: bool = True,
        bias: bool = True,
        backend: Backend = "auto",
    ):
        super().__init__()
        pattern_dim = dim if pattern_dim is None else pattern_dim
        value_dim = pattern_dim if value_dim is None else value_dim
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        if not project and (pattern_dim != dim or value_dim % heads):
            raise ValueError(
                f"pattern_dim must be dim {dim} and value_dim a multiple of heads {heads} without projections, "
                f"got {pattern_dim} and {value_dim}"
            )
        if isinstance(beta, Tensor) and beta.shape != (heads,):
            raise ValueError(f"beta must have shape [{heads}], got {list(beta.shape)}")
        check_steps(steps, tol, project)
        self.heads, self.steps, self.tol, self.backend = heads, steps, tol, backend
        self.dims = {"state": dim, "patterns": pattern_dim, "values": value_dim}
        if isinstance(beta, Tensor) and not isinstance(beta, nn.Parameter):
            self.register_buffer("beta", beta)
        else:
            self.beta = beta
        if project:
            self.query = nn.Linear(dim, dim, bias)
            self.key = nn.Linear(pattern_dim, dim, bias)
            self.value = nn.Linear(value_dim, dim, bias)
            self.out = nn.Linear(dim, dim, bias)
        else:
            self.query = self.key = self.value = self.out = nn.Identity()
        self.project = project

    def forward(self, state: Tensor, patterns: Tensor, values: Tensor | None = None) -> Tensor:
        """What the states retrieve: [B, L, dim]."""
        retrieved = self.retrieve(state, patterns, values).state
        return self.out(retrieved.transpose(1, 2).flatten(2))

    def retrieve(self, state: Tensor, patterns: Tensor, values: Tensor | None = None) -> Retrieval:
        """The heads' retrieval before the last projection: state [B, heads, L, …], energies [B, heads, L]."""
        if self.project:
            values = patterns if values is None else values
        for (name, dim), x in zip(self.dims.items(), (state, patterns, values), strict=True):
            if x is not None and (x.ndim != 3 or x.shape[2] != dim):
                raise ValueError(f"{name} must have shape [B, …, {dim}], got {list(x.shape)}")
        q, k = self._split(self.query(state)), self._split(self.key(patterns))
        v = None if values is None else self._split(self.value(values))
        beta = self.beta[:, None] if isinstance(self.beta, Tensor) else self.beta
        return hopfield_retrieve(q, k, v, beta=beta, steps=self.steps, tol=self.tol, backend=self.backend)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

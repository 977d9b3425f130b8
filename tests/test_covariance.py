"""attention_covariance and attention_correlation on every path against the float64 specification."""

import numpy as np
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    EXTRAS,
    MASKS,
    PATHS,
    SEEDS,
    SQUARE_MASKS,
    assert_within_reference_error,
    grown_memory,
    make_mask,
    make_options,
    make_qkv,
    plain_attention,
    score_roundings,
    shapes,
    to_numpy,
)
from hypothesis import given
from hypothesis import strategies as st

from causalattn import attention, attention_correlation, attention_covariance, causal, dense, intervals, padding
from causalattn.covariance import gram, operators
from causalattn.reference.attention import attention as reference_attention
from causalattn.reference.covariance import attended_keys, correlation, covariance


class Choice:
    """What of a covariance is asked for, and the rows that it is of."""

    def __init__(self, **chosen):
        self.chosen = chosen

    def __repr__(self):
        return f"Choice({self.chosen})"

    def seen(self, mask, T, S):
        """bool [B or 1, T, S]: who may attend whom once the sink is given."""
        resolved = mask.resolve(T, S, device=DEVICE)
        seen = resolved.to_dense(S)
        if self.chosen.get("condition_on_sink"):
            seen &= torch.arange(S, device=DEVICE) != resolved.first[..., None]
        return seen

    def of_rows(self, rows, seen, values):
        """C and R of rows [B, H, T, W] by NumPy in float64."""
        center, keys = self.chosen.get("center", False), None if values else attended_keys(seen)
        C = covariance(rows, center=center, keys=keys)
        if self.chosen.get("heads") is not None:
            C = C[:, self.chosen["heads"]]
        if self.chosen.get("sum_heads"):
            C = C.sum(1)
        if self.chosen.get("tokens") is not None:
            C = C[..., self.chosen["tokens"], :][..., self.chosen["tokens"]]
        return C, correlation(C)


CHOICES = st.builds(
    Choice,
    heads=st.sampled_from([None, [0], [-1]]),
    sum_heads=st.booleans(),
    tokens=st.sampled_from([None, [0], [-1, 0, 0]]),
    center=st.booleans(),
    condition_on_sink=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


def check(backend, q, k, mask, choice, v=None, **options):
    """Both within twice the error of plain torch that holds A in float32, beside the lengths of the two rows."""
    T, S = q.shape[2], k.shape[2]
    seen = choice.seen(mask, T, S)
    arrays = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    values = k if v is None else v
    out, _, A = reference_attention(*map(to_numpy, (q, k, values)), to_numpy(seen), **arrays)
    offset = {"offset": S - T} if "alibi_slopes" in options else {}
    plain = plain_attention(*(x.float() for x in (q, k, values)), seen, **options, **offset)
    seen = np.broadcast_to(to_numpy(seen), (len(q), T, S))
    C, R = choice.of_rows(A if v is None else out, seen, v is not None)
    rival = choice.of_rows(to_numpy(plain[2] if v is None else plain[0]), seen, v is not None)

    lengths = np.sqrt(np.diagonal(C, axis1=-2, axis2=-1))
    lengths = np.where(lengths > 0, lengths, 1)
    unit = lengths[..., :, None] * lengths[..., None, :]
    # what a mean leaves of a row is of few digits, and so is a sum over v
    raw, _ = Choice(**choice.chosen | {"center": False}).of_rows(A if v is None else np.abs(out), seen, v is not None)
    lost = np.max(np.diagonal(raw, axis1=-2, axis2=-1) / lengths**2, initial=1)
    roundings = score_roundings(q, k, options.get("scale"))
    for function, exact, plain, scale in (
        (attention_covariance, C, rival[0], unit), (attention_correlation, R, rival[1], 1.0)
    ):  # fmt: skip
        result = function(q, k, v=v, mask=mask, backend=backend, **choice.chosen, **options)
        assert result.dtype == choice.chosen.get("dtype", torch.float64)
        assert torch.equal(result, result.mT)
        assert_within_reference_error(
            (result.double() / torch.as_tensor(scale, device=DEVICE)).float(), plain / scale, exact / scale,
            axis=None, roundings=2 * roundings, terms=lost,
        )  # fmt: skip
    diagonal = result.diagonal(dim1=-2, dim2=-1).cpu().numpy()
    assert np.array_equal(diagonal, np.diagonal(R, axis1=-2, axis2=-1))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=shapes(), name=st.sampled_from(sorted(MASKS)), choice=CHOICES, seed=SEEDS)
def test_matches_float64(backend, dtype, shape, name, choice, seed):
    q, k, _ = make_qkv(*shape, dtype=dtype, seed=seed)
    check(backend, q, k, make_mask(name, shape.B, shape.S), choice)

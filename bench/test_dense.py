"""dag_score, asymmetry and row statistics of a matrix at hand against eager torch, in GB/s and beside a copy."""

import peers
import pytest
import torch
from cases import DEVICE, add_bandwidth, matrix

import causalattn as ca

# what the CPU's memory and the time of an eager peer allow; on a GPU a layer of 32 heads
SHAPES = [(32, 4096, torch.bfloat16), (32, 4096, torch.float32)] if DEVICE == "cuda" else [(4, 4096, torch.float32)]


def row_statistics(A):
    return ca.dense.attention_stats(A)


CASES = {
    "dense dag_score": (ca.dense.dag_score, peers.dense_dag_score),
    "dense asymmetry": (ca.dense.asymmetry, peers.dense_asymmetry),
    "dense rows": (row_statistics, peers.dense_row_statistics),
}


def number(operator, result):
    """What both sides give: the score, ‖A − Aᵀ‖ or the entropies."""
    if operator == "dense asymmetry":
        return result.frobenius if isinstance(result, ca.Asymmetry) else result["frobenius"]
    if operator == "dense rows":
        return result["entropy"] if isinstance(result, dict) else result.entropy
    return result


# the copy first: the others are compared with it
@pytest.mark.parametrize("peer", ["copy", "causalattn", "eager torch"])
@pytest.mark.parametrize("operator", CASES)
@pytest.mark.parametrize(("heads", "T", "dtype"), SHAPES, ids=str)
def test_dense(measure, operator, heads, T, dtype, peer):
    A = matrix(heads, T, dtype)
    name = f"{operator} {str(dtype).removeprefix('torch.')}"
    moved = A.numel() * A.element_size()
    if peer == "copy":
        measure(name, peer, torch.empty_like(A).copy_, A, flops=0)
        add_bandwidth(2 * moved)
        return
    ours, eager = CASES[operator]
    expected = number(operator, eager(A[:, :1].double()))

    # torch's float32 norm of 16 million numbers loses three digits
    tolerance = 1e-5 if peer == "causalattn" else 1e-2

    def check(result):
        assert (number(operator, result)[:, :1] - expected).abs().max() < tolerance * expected.abs().max()

    measure(name, peer, ours if peer == "causalattn" else eager, A, flops=0, check=check)
    add_bandwidth(moved)

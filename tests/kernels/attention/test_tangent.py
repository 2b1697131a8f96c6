"""The kernel of the tangent against the reference in float64; its precisions and grids: test_second.py."""

import pytest
import torch

from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.tangent import attention_tangent
from sagan_fast.kernels.configs import LaunchConfig
from shared_by_tests import randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(shape, generator):
    """Return q, k, v and their tangents."""
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V)) * 2
    return [randn(*size, generator=generator).to(DEVICE, torch.float32) for size in sizes]


@pytest.mark.parametrize("tiles", [(16, 16), (64, 32)])
@pytest.mark.parametrize("shape", [(2, 33, 50, 8, 20), (1, 64, 16, 16, 48)])
def test_tangent_and_mean_match_float64(shape, tiles, generator):
    q, k, v, *tangents = tensors = inputs(shape, generator)
    q *= shape[3] ** -0.5
    config = LaunchConfig(BLOCK_N=tiles[0], BLOCK_M=tiles[1], num_warps=4)
    tangent, mean = attention_tangent(q, k, v, *attention_fwd(q, k, v), *tangents, config=config)
    exact = [t.double() for t in tensors]
    truth = reference.attention_tangent(*exact)
    q, k, _, t_q, t_k, _ = exact
    means = (reference.attention_map(q, k) * (t_q @ k.mT + q @ t_k.mT)).sum(-1)
    for found, right in ((tangent, truth), (mean, means)):
        assert (found.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("shape", [(1, 4, 0, 3, 5), (1, 0, 4, 3, 5), (0, 4, 4, 3, 5)])
def test_nothing_to_compute_gives_zeros(shape, generator):
    q, k, v, *tangents = inputs(shape, generator)
    tangent, mean = attention_tangent(q, k, v, *attention_fwd(q, k, v), *tangents)
    assert tangent.shape == (*q.shape[:2], v.shape[2]) and mean.shape == q.shape[:2]
    assert not tangent.any() and not mean.any()

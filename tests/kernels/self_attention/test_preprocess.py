"""delta, the gradient before W_o and d_gamma against float64."""

import pytest
import torch

from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.self_attention.preprocess import block_bwd_preprocess
from shared_by_tests import assert_close_to_truth, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D_V, C", [(5, 20), (48, 40), (96, 70)])
def test_matches_float64(D_V, C, dtype, generator):
    B, N = 3, 70
    d_y, w_o, b_o = (randn(*size, generator=generator).to(DEVICE, dtype) for size in ((B, C, N), (C, D_V), (C,)))
    whole = randn(B, N, D_V, generator=generator).to(DEVICE)
    o = whole.to(dtype)
    lost = None if dtype == torch.float32 else (whole - o.double()).to(dtype)
    w_o, gamma = w_o * C**-0.5, torch.tensor(0.7, device=DEVICE)
    config = LaunchConfig(BLOCK_N=32, BLOCK_C=16, num_warps=4, num_stages=1)
    d_o, delta, d_gamma = block_bwd_preprocess(d_y[..., None], w_o, b_o, o, lost, gamma, config=config)
    before = d_y.mT.double() @ w_o.double()
    assert_close_to_truth("d_o", d_o, 0.7 * before, 0.7 * (d_y.mT @ w_o))
    assert_close_to_truth("delta", delta, (d_o.double() * whole).sum(2), precision="fp32")  # of d_o as stored
    through_bias = (d_y.double() * b_o.double()[:, None]).sum()
    truth = (before * whole).sum() + through_bias
    assert abs(d_gamma.double() - truth) <= 2e-3 * (before * whole).norm() + 2e-3 * d_y.double().norm()

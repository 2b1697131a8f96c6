"""delta, the gradient before W_o and d_gamma against float64."""

import pytest
import torch

from sagan_fast.kernels.attention.configs import DeltaConfig
from sagan_fast.kernels.attention.delta import delta_bwd
from sagan_fast.testing import assert_close_to_truth, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D_V, C", [(5, 20), (48, 40), (96, 70)])
def test_of_the_block(D_V, C, dtype, generator):
    B, N = 3, 70
    d_y, w_o, b_o, o = (
        randn(*size, generator=generator).to(DEVICE, dtype) for size in ((B, C, N), (C, D_V), (C,), (B, N, D_V))
    )
    w_o, gamma = w_o * C**-0.5, torch.tensor(0.7, device=DEVICE)
    d_o, delta, d_gamma = delta_bwd(d_y, d_y.stride(), w_o, b_o, o, gamma, DeltaConfig(32, 16, 4, 1))
    before = d_y.mT.double() @ w_o.double()
    assert_close_to_truth("d_o", d_o, 0.7 * before, 0.7 * (d_y.mT @ w_o))
    assert_close_to_truth("delta", delta, 0.7 * (before * o.double()).sum(2), precision="fp16")
    through_bias = (d_y.double() * b_o.double()[:, None]).sum()
    truth = (before * o.double()).sum() + through_bias
    assert abs(d_gamma.double() - truth) <= 2e-3 * (before * o.double()).norm() + 2e-3 * d_y.double().norm()


@pytest.mark.parametrize("D_V", [3, 96])
def test_of_attention_alone_there_is_only_delta(D_V, generator):
    d_out, o = (randn(2, 33, D_V, generator=generator).to(DEVICE, torch.float32) for _ in range(2))
    d_o, delta, d_gamma = delta_bwd(d_out, (d_out.stride(0), 1, D_V), None, None, o, None, None)
    assert d_o is None and d_gamma is None
    assert_close_to_truth("delta", delta, (d_out.double() * o.double()).sum(2))

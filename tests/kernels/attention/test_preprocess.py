"""delta = rowsum(d_out * out) against float64."""

import pytest
import torch

from sagan_fast.kernels.attention.preprocess import attention_bwd_preprocess
from shared_by_tests import assert_close_to_truth, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D_V", [3, 96])
def test_matches_float64(D_V, dtype, generator):
    d_out, whole = (randn(2, 33, D_V, generator=generator).to(DEVICE) for _ in range(2))
    d_out, out = d_out.to(dtype), whole.to(dtype)
    lost = None if dtype == torch.float32 else (whole - out.double()).to(dtype)
    strided = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    delta = attention_bwd_preprocess(strided, out, lost)
    assert delta.dtype == torch.float32
    terms = d_out.double() * (out.double() if lost is None else out.double() + lost.double())
    assert_close_to_truth("delta", delta - terms.sum(2) + terms.abs().sum(2), terms.abs().sum(2), precision="fp32")

"""Each first gradient of the block is at most twice as far from float64 as eager's, in every dtype."""

import os

import pytest
import torch
from gradient_accuracy import errors, ratios

from benchmarks.accuracy import DTYPE_NAMES, RMS_TOLERANCE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_typical_errors_are_at_most_twice_eagers(dtype, generator):
    seeds = torch.randint(2**31, (2,), generator=generator).tolist()
    floor = 0.4 * RMS_TOLERANCE[DTYPE_NAMES[dtype]]  # two draws are few: the next test takes more, and no floor
    for name, found in ratios([errors(dtype, True, seed) for seed in seeds]).items():
        assert found["ours_median"] <= 2 * found["eager_median"] + floor, f"{name}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_of_thirty_draws_are_at_most_twice_eagers(dtype, pool):
    for name, found in ratios([errors(dtype, pool, seed) for seed in range(30)]).items():
        assert found["ours_median"] <= 2 * found["eager_median"], f"{name}: {found}"
        assert found["ours_p95"] <= 2 * found["eager_p95"], f"{name}: {found}"

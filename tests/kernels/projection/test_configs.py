"""Every width has a config, wider ones a clear error."""

import pytest

from sagan_fast.kernels.projection.configs import lookup_forward, table_arch, table_width


def test_architectures_without_rows_of_their_own_run_those_of_their_instructions():
    assert [table_arch(arch) for arch in (80, 86, 89, 90, 100, 103, 120)] == [80, 80, 80, 90, 100, 100, 80]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "tf32", "fp16", "bf16"])
def test_every_width_has_a_config(arch, precision):
    for D_QK in (1, 16, 32, 33, 64):
        for D_V in (1, 32, 64, 128, 129, 256):
            config = lookup_forward(arch, precision, D_QK, D_V)
            assert config.BLOCK_M >= 16 and config.BLOCK_C >= 16 and config.num_warps in (4, 8)


def test_wider_heads_are_refused_and_sdpa_is_named():
    message = r"op: D_QK and D_V must be at most = 64 and 256 \(backend 'sdpa' takes any\), got 65, 8"
    with pytest.raises(ValueError, match=message):
        table_width("op", 65, 8)
    with pytest.raises(ValueError, match="got 8, 257"):
        table_width("op", 8, 257)

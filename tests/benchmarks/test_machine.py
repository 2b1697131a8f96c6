"""The constants give the published peaks."""

import pytest

from benchmarks.machine import MACHINES, SHARED_BYTES, SMEM_RESERVED
from sagan_fast.kernels.configs import AMD, SERVED_BY


@pytest.mark.parametrize(
    "arch, tflops, exps",
    [(80, 312, None), (86, 71, None), (89, 165.2, None), (90, 989, 3.9e12), (100, 2250, None), (120, 209.5, None)],
)
def test_rates_times_clock_are_the_published_peaks(arch, tflops, exps):
    machine = MACHINES[arch]
    assert machine.flop_rate("bf16") * machine.sms * machine.clock_hz == pytest.approx(tflops * 1e12, rel=0.01)
    assert machine.flop_rate("tf32") * 2 == machine.flop_rate("fp16") == machine.flop_rate("bf16")
    if exps:
        assert machine.mufu_lanes * machine.sms * machine.clock_hz == pytest.approx(exps, rel=0.01)


def test_every_chip_that_the_kernels_are_compiled_for_has_a_limit_of_shared_memory():
    assert set(SHARED_BYTES) == {75, *SERVED_BY, *AMD}
    for arch, machine in MACHINES.items():
        assert SHARED_BYTES[arch] == machine.smem_sm - SMEM_RESERVED, "one program alone has all but CUDA's part"


def test_ieee_products_run_on_the_fp32_lanes():
    assert MACHINES[90].flop_rate("fp32") * 132 * 1.83e9 == pytest.approx(62e12, rel=0.1)  # 67 TFLOP/s at 1.98 GHz
    assert MACHINES[80].flop_rate("fp32") * 108 * 1.41e9 == pytest.approx(19.5e12, rel=0.01)


def test_the_limit_is_the_largest_need():
    machine = MACHINES[90]
    second = machine.sms * machine.clock_hz
    assert machine.limit_us(4096 * second, 0, 0, "bf16") == (pytest.approx(1e6), "tensor")
    assert machine.limit_us(4096 * second, 32 * second, 0, "bf16") == (pytest.approx(2e6), "mufu")
    assert machine.limit_us(256 * second, 0, 3 * 4.8e12, "fp32") == (pytest.approx(3e6), "hbm")
    assert machine.limit_us(256 * second, 0, 0, "fp32") == (pytest.approx(1e6), "fp32")


@pytest.mark.parametrize(
    "arch, registers, warps, shared, tmem, expected",
    [
        (90, 128, 8, 20000, 0, (2, "registers")),
        (90, 127, 8, 20000, 0, (2, "registers")),  # handed out by eight a thread
        (90, 129, 8, 20000, 0, (1, "registers")),
        (90, 168, 4, 20000, 0, (3, "registers")),
        (90, 255, 4, 120000, 0, (1, "smem")),
        (90, 32, 1, 0, 0, (32, "blocks")),
        (90, 32, 4, 0, 0, (16, "registers")),
        (80, 64, 4, 166912, 0, (1, "smem")),
        (90, 64, 4, 300000, 0, (0, "smem")),
        (100, 64, 4, 20000, 256, (2, "tmem")),
    ],
)
def test_resident_blocks(arch, registers, warps, shared, tmem, expected):
    assert MACHINES[arch].resident_blocks(registers, warps, shared, tmem) == expected

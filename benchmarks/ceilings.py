"""What this very device reaches on a copy and on matrix products, measured in the same run as the benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.harness import Case
from benchmarks.machine import MACHINES
from benchmarks.records import Record

TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def copy_bytes_per_s() -> float:
    """Return bytes read and written a second by a device-to-device copy of 2 GiB, the median of nine."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median_s(lambda: target.copy_(source))


@functools.cache
def matmul_flops(dtype: str) -> float:
    """Return FLOP/s of an 8192 x 8192 x 8192 product on random data, the median of nine."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(TORCH_DTYPES[dtype]) for _ in range(2))
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        return 2 * size**3 / _median_s(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed


def bound(case: Case) -> tuple[float, str]:
    """Return the least time of the case's needed work in microseconds at measured rates, and what sets it.

    Exponentials: 16 a clock and multiprocessor at the device's highest clock, which is not measured.
    """
    flops, exps, nbytes = case.needs
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or MACHINES[90].clock_hz
    times = {
        "flop": flops / matmul_flops(case.dtype),
        "exp": exps / (16 * properties.multi_processor_count * clock),
        "bytes": nbytes / copy_bytes_per_s(),
    }
    name = max(times, key=times.__getitem__)
    return times[name] * 1e6, name


def records() -> list[Record]:
    """Return the ceilings as records: microseconds of the copy and of each product, the rate in the note."""
    made = []
    gigabytes = copy_bytes_per_s() / 1e9
    made.append(
        Record("ceilings", "copy 2 GiB", "fp32", "forward", "torch", "eager",
               p50_us=2**32 / copy_bytes_per_s() * 1e6, note=f"{gigabytes:.0f} GB/s")
    )  # fmt: skip
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        rate = matmul_flops(dtype)
        made.append(
            Record("ceilings", "product 8192", dtype, "forward", "torch", "eager",
                   p50_us=2 * 8192**3 / rate * 1e6, note=f"{rate / 1e12:.0f} TFLOP/s")
        )  # fmt: skip
    return made


def _median_s(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[4]

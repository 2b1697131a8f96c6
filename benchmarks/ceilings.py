"""What this very device reaches on a copy, on matrix products and on exponentials, measured in the run it is for."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.harness import Case
from benchmarks.machine import MACHINES
from benchmarks.records import Record
from sagan_fast.ops.tf32 import tf32

TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**29}
"""Larger than any cache."""
PRODUCT = {"cuda": 8192, "cpu": 2048}
DTYPES = {"cuda": ("bf16", "fp16", "tf32", "fp32"), "cpu": ("fp32",)}


@functools.cache
def copy_bytes_per_s(device: str) -> float:
    """Return bytes read and written a second by a copy of `COPY_BYTES`, the fastest of nine."""
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / _fastest_s(lambda: target.copy_(source), device)


@functools.cache
def product_flops(dtype: str, device: str) -> float:
    """Return FLOP/s of a product of two random matrices of `PRODUCT` rows and columns, the fastest of nine."""
    size = PRODUCT[device]
    a, b = (torch.randn(size, size, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    with tf32(dtype == "tf32"):
        return 2 * size**3 / _fastest_s(lambda: a @ b, device)


@functools.cache
def exps_per_s(device: str) -> float:
    """Return exponentials a second: on the CPU one thread's on numbers that stay in its cache, times the threads.

    On CUDA 16 a clock and multiprocessor at the device's highest clock, which is not measured.
    """
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 0) * 1e3 or MACHINES[90].clock_hz
        return 16 * properties.multi_processor_count * clock
    numbers = torch.randn(2**16)
    out = torch.empty_like(numbers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work the threads wait for each other longer than for the work
    try:
        seconds = _fastest_s(lambda: [torch.exp2(numbers, out=out) for _ in range(100)], device)
    finally:
        torch.set_num_threads(threads)
    return threads * 100 * numbers.numel() / seconds


def bound(case: Case, device: str) -> tuple[float, str]:
    """Return the least time of the case's needed work in microseconds at this device's rates, and what sets it."""
    flops, exps, nbytes = case.needs
    times = {
        "flop": flops / product_flops(case.dtype, device),
        "exp": exps / exps_per_s(device),
        "bytes": nbytes / copy_bytes_per_s(device),
    }
    name = max(times, key=times.__getitem__)
    return times[name] * 1e6, name


def records(device: str) -> list[Record]:
    """Return the ceilings as records: microseconds of the fastest copy and products, the rates in the notes."""
    method = "eager" if device == "cuda" else "wall"
    size = COPY_BYTES[device]
    made = [
        Record("ceilings", f"copy {size >> 20} MiB", "fp32", "forward", "torch", method,
               p50_us=2 * size / copy_bytes_per_s(device) * 1e6, note=f"{copy_bytes_per_s(device) / 1e9:.1f} GB/s"),
        Record("ceilings", "2**20 exponentials", "fp32", "forward", "torch", method,
               p50_us=2**20 / exps_per_s(device) * 1e6, note=f"{exps_per_s(device) / 1e9:.2f} G/s"),
    ]  # fmt: skip
    for dtype in DTYPES[device]:
        rate = product_flops(dtype, device)
        made.append(
            Record("ceilings", f"product {PRODUCT[device]}", dtype, "forward", "torch", method,
                   p50_us=2 * PRODUCT[device] ** 3 / rate * 1e6, note=f"{rate / 1e12:.3g} TFLOP/s")
        )  # fmt: skip
    return made


def _fastest_s(work: Callable[[], object], device: str) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(9):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return min(times)

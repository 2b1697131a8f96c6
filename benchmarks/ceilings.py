"""The rates this very device reaches on a copy, on matrix products and on exponentials, measured in the same run."""

import functools
from collections.abc import Callable

import torch

from benchmarks.harness import Case, sample_us
from benchmarks.machine import MACHINES
from benchmarks.records import Record
from sagan_fast.kernels.launch import DTYPES
from sagan_fast.ops.tf32 import tf32

COPY_BYTES = {"cuda": 2**31, "cpu": 2**29}
"""Larger than any cache."""
PRODUCT = {"cuda": 8192, "cpu": 2048}
PRECISIONS = {"cuda": ("bf16", "fp16", "tf32", "fp32"), "cpu": ("fp32",)}


@functools.cache
def copy_bytes_per_s(device: str) -> float:
    """Return the bytes read and written in a second by a copy of `COPY_BYTES`, the fastest of nine."""
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / _fastest_s(lambda: target.copy_(source), device)


@functools.cache
def product_flops(dtype: str, device: str) -> float:
    """Return the FLOP/s of a product of two random square matrices of size `PRODUCT`, the fastest of nine."""
    size = PRODUCT[device]
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    with tf32(dtype == "tf32"):
        return 2 * size**3 / _fastest_s(lambda: a @ b, device)


@functools.cache
def exps_per_s(device: str) -> float:
    """Return exponentials a second.

    On the CPU: one thread's on numbers that stay in its cache, times the threads. On CUDA: 16 per clock and
    multiprocessor at the device's highest clock, which is not measured.
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
    """Return the least time of the case's needed work in microseconds at this device's rates, and what sets it.

    That is "flop", "exp" or "bytes".
    """
    flops, exps, nbytes = case.needs
    times = {
        "flop": flops / product_flops(case.dtype, device),
        "exp": exps / exps_per_s(device),
        "bytes": nbytes / copy_bytes_per_s(device),
    }
    return max((time * 1e6, name) for name, time in times.items())


def records(device: str) -> list[Record]:
    """Return the ceilings as records: the fastest times in microseconds, the rates in the notes."""
    size, side = COPY_BYTES[device], PRODUCT[device]
    copy, exps = copy_bytes_per_s(device), exps_per_s(device)
    method = "eager" if device == "cuda" else "wall"

    def record(shape: str, dtype: str, seconds: float, note: str) -> Record:
        return Record("ceilings", shape, dtype, "forward", "torch", method, p50_us=seconds * 1e6, note=note)

    rates = {dtype: product_flops(dtype, device) for dtype in PRECISIONS[device]}
    return [
        record(f"copy {size >> 20} MiB", "fp32", 2 * size / copy, f"{copy / 1e9:.1f} GB/s"),
        record("2**20 exponentials", "fp32", 2**20 / exps, f"{exps / 1e9:.2f} G/s"),
        *(record(f"product {side}", d, 2 * side**3 / rate, f"{rate / 1e12:.3g} TFLOP/s") for d, rate in rates.items()),
    ]


def _fastest_s(work: Callable[[], object], device: str) -> float:
    for _ in range(3):
        work()
    return min(sample_us(work, 1, device) for _ in range(9)) / 1e6

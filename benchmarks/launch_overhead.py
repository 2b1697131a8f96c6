"""Times the host's work for one call of the attention block, without a GPU.

    python -m benchmarks.launch_overhead [--cold]

Checks, autograd, custom op, launchers, Triton's `run` and its compiler run as on a GPU. Where Triton hands a launch to
its CUDA backend, a stub returns at once, so results are whatever memory held before. `--cold` also times compiling the
two forward kernels from an empty cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

import torch
from torch import Tensor

from benchmarks.text import table

NOT_IN_IT = (
    "Not in these times: Triton's CUDA launcher (it packs the arguments and calls cuLaunchKernelEx, some microseconds a"
    " kernel),\nthe look at which device is current, and CUDA's allocator, in whose place PyTorch's for the CPU stands."
)


class Driver:
    """As much of a Triton driver for one sm_90 device as a launch asks for."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.launches = 0
        properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (self, 0, 32, 0, 1024),  # without a module, Triton would load it at every launch
            unload_module=lambda _: None,
            get_device_properties=lambda _: properties,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            self.launches += 1

        return launch


def install() -> Driver:
    """Make launches end in a `Driver`, and "triton" run tensors of the CPU, in this process; return the driver."""
    from triton.runtime import driver

    from sagan_fast.ops import backends

    stub = Driver()
    driver.set_active(stub)
    backends.triton_refusal = lambda *_: None
    return stub


def microseconds(work: Callable[[], object], samples: int, calls: int = 50) -> list[float]:
    """Return the processor time of one call in each of `samples` runs of `calls`."""
    for _ in range(calls):
        work()
    found = []
    for _ in range(samples):
        began = time.process_time_ns()
        for _ in range(calls):
            work()
        found.append((time.process_time_ns() - began) / calls / 1e3)
    return found


def parts(dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name: whole calls, then what they are made of, from the outside in."""
    from sagan_fast.functional import self_attention_2d
    from sagan_fast.kernels import launch
    from sagan_fast.kernels.projection.forward import projection_fwd
    from sagan_fast.kernels.self_attention.forward import block_fwd
    from sagan_fast.kernels.self_attention.inputs import BlockInputs
    from sagan_fast.layers.self_attention import SelfAttention2d
    from sagan_fast.ops.self_attention import _matrix, check_block, choose_block

    C = 128
    block = SelfAttention2d(C, backend="triton").to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(1, C, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    weights = [conv.weight.detach() for conv in (block.theta, block.phi, block.g)]
    w_o, gamma = block.o.weight.detach(), block.gamma.detach()
    flat = [w.flatten(1) for w in weights]

    def without_grad(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    def backward() -> None:
        y: Tensor = block(leaf)
        torch.autograd.grad(y, [leaf, *block.parameters()], y)

    q, k, v, _ = projection_fwd(x, *flat, pool=True, save=False)
    flat_o = w_o.flatten(1)

    def project() -> None:
        projection_fwd(x, *flat, pool=True, save=False)

    def attend() -> None:
        block_fwd(x, q, k, v, flat_o, gamma, save=False)

    def checks_and_choice() -> None:
        inputs = BlockInputs(x, *weights, w_o, gamma)
        check_block(inputs, True)
        choose_block(inputs, True, "triton")

    def launchers() -> None:
        project()
        attend()

    def from_arguments() -> None:
        launch._ready.clear()  # nothing kept: Triton binds, specialises and hashes every argument
        launchers()

    def handed_on() -> None:
        for (run, rest), count in zip(kept, counts, strict=True):
            run(*[x] * count, *rest)

    launchers()
    kept = list(launch._ready.values())[-2:]
    counts = (11, 10)  # tensors of the projection's kernel and of the block's

    op = torch.ops.sagan_fast.self_attention_2d_inference.default
    return {
        "module, forward": without_grad(lambda: block(x)),
        "module, forward with grad": lambda: block(leaf),
        "module, forward+backward": backward,
        "function, forward": without_grad(lambda: self_attention_2d(x, *weights, w_o, gamma, backend="triton")),
        "  checks and choice": checks_and_choice,
        "  four weights as matrices": without_grad(lambda: [_matrix(w, dtype) for w in (*weights, w_o)]),
        "custom op, forward": without_grad(lambda: op(x, *flat, flat_o, gamma, None, None, None, None, True)),
        "two launchers, forward": without_grad(launchers),
        "  projection's": without_grad(project),
        "  block's": without_grad(attend),
        "  Triton's part, both": handed_on,
        "  both, nothing kept": without_grad(from_arguments),
    }


def processor_seconds() -> float:
    """Return the processor time of this process and of its finished children (ptxas is one)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cold(dtype: str = "bf16") -> tuple[float, float]:
    """Return seconds of the clock and of the processor for compiling the forward kernels of 64x64 C 128 for sm_90."""
    from benchmarks.compile import compile_plan
    from benchmarks.shipped import HOPPER, block_plans

    wanted = block_plans(64, 128, 64, 64, 16, 64, dtype=dtype, backward=False)
    with tempfile.TemporaryDirectory() as folder:
        before, os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR"), folder
        try:
            began = time.perf_counter(), processor_seconds()
            for plan in wanted:
                compile_plan(plan, HOPPER)
            return time.perf_counter() - began[0], processor_seconds() - began[1]
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=41, help="samples of 50 calls each (default 41)")
    parser.add_argument("--cold", action="store_true", help="also compile the forward kernels from an empty cache")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    driver = install()
    first = cold() if options.cold else None  # before anything else was compiled in this process
    rows = []
    for name, work in parts().items():
        work()
        before = driver.launches
        work()
        launches = driver.launches - before
        times = microseconds(work, options.samples)
        p20, p50, p80 = statistics.quantiles(times, n=10)[1::3] if len(times) > 1 else times * 3
        rows.append([name, launches, f"{p20:.1f}", f"{p50:.1f}", f"{p80:.1f}"])
    print(table(["what", "launches", "p20 us", "p50 us", "p80 us"], rows))
    print(f"\n{NOT_IN_IT}")
    if first is not None:
        wall, processor = first
        print(
            f"\nCompiling both forward kernels from an empty cache: {wall:.2f} s, {processor:.2f} s of processor time."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Prints the CPU time that one call of the attention block needs for its launches; needs no GPU.

    python -m benchmarks.launch_overhead

Checks, autograd, custom op, launchers, Triton's `run` and its compiler run as on a GPU. Where Triton hands a launch to
its CUDA backend, a stub returns at once, so results are whatever memory held before. Times are processor time.
"""

import argparse
import os
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

import numpy as np
import torch
from torch import Tensor

from benchmarks.text import table

CALLS = 50
"""Calls of one sample."""

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
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_current_target = lambda: self.target

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


def parts(dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name: whole calls, then what they are made of, from the outside in."""
    from sagan_fast.functional import self_attention_2d
    from sagan_fast.kernels import launch
    from sagan_fast.kernels.projection.forward import projection_fwd
    from sagan_fast.kernels.self_attention.forward import block_fwd
    from sagan_fast.layers.self_attention import SelfAttention2d

    C = 128
    block = SelfAttention2d(C, backend="triton").to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(1, C, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    weights = [conv.weight.detach() for conv in (block.theta, block.phi, block.g, block.o)]
    *qkv, w_o = [w.flatten(1) for w in weights]
    gamma = block.gamma.detach()

    def backward() -> None:
        y: Tensor = block(leaf)
        torch.autograd.grad(y, [leaf, *block.parameters()], y)

    def launchers() -> None:
        q, k, v, _ = projection_fwd(x, *qkv, pool=True, save=False)
        block_fwd(x, q, k, v, w_o, gamma, save=False)

    def from_arguments() -> None:
        launch._ready.clear()  # nothing kept: Triton binds, specialises and hashes every argument
        launchers()

    return {
        "module, forward": torch.no_grad()(lambda: block(x)),
        "module, forward with grad": lambda: block(leaf),
        "module, forward+backward": backward,
        "function, forward": torch.no_grad()(lambda: self_attention_2d(x, *weights, gamma, backend="triton")),
        "two launchers, forward": torch.no_grad()(launchers),
        "  nothing kept": torch.no_grad()(from_arguments),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=41, help=f"samples of {CALLS} calls each (default 41)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    driver = install()
    rows = []
    for name, work in parts().items():
        work()
        before = driver.launches
        work()
        launches = driver.launches - before
        times = timeit.repeat(work, timer=time.process_time, repeat=1 + options.samples, number=CALLS)[1:]
        quantiles = np.quantile(times, [0.2, 0.5, 0.8]) / CALLS * 1e6
        rows.append([name, launches, *(f"{us:.1f}" for us in quantiles)])
    print(table("what | launches | p20 us | p50 us | p80 us", rows))
    print(f"\n{NOT_IN_IT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What ttsem has to know to execute the kernels: no stream is captured, and which memory tables of addresses reach.

ttsem presents a CUDA device, runs the IR that Triton compiles on the CPU, and reports accesses outside the tensors of a
launch. Spectral norm's weights, u and v are no arguments of its launches: a table holds their addresses.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NOT_HERE = ("test_cpu", "test_chunks.py", "test_machine_code.py", "test_equal_keys_mean_equal_launches")
"""Parts of the names of tests that are about the CPU's own backend, about machine code, or about no tensors at all."""

executed: dict[tuple[str, str], set[str]] = defaultdict(set)
"""The launches that ran without a fault, by name and hash of the code, and the precision of their tensors."""

_library = torch.library.Library("aten", "IMPL")

_reached: dict[int, list[Tensor]] = {}
"""Tensors whose addresses a table holds, by the table's own address; the last table there counts."""


def install() -> None:
    """Teach the ttsem that runs this process; call it before the kernels are imported."""
    import ttsem.harness as harness
    from ttsem.memory import Memory

    from sagan_fast.kernels import launch

    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    for name in ("mm.dtype", "bmm.dtype"):  # PyTorch has products with another output dtype for CUDA alone
        product = getattr(torch, name.partition(".")[0])
        _library.impl(name, lambda a, b, dtype, product=product: product(a.to(dtype), b.to(dtype)), "CPU")

    launch_kernel, record_launch = launch.launch, harness.record_launch
    reached_now: list[Tensor] = []

    def noted(name: str, kernel: Any, tensors: Any, *rest: Any) -> None:
        launch_kernel(name, kernel, tensors, *rest)
        home = getattr(kernel, "fn", noted).__module__
        if home.startswith("sagan_fast.kernels.") and not home.endswith("planted"):
            from benchmarks.gates import source_of

            floats = (t.dtype for t in tensors.values() if t is not None and t.is_floating_point())
            executed[name, source_of(kernel)].add(launch.POINTERS[next(floats, torch.int64)][1:])

    launch.launch = noted  # before the modules below take it
    from sagan_fast.kernels.spectral_norm import addresses, stacks

    write_table = addresses.addresses_of

    def addresses_of(*lists: Any) -> Tensor:
        table = write_table(*lists)
        _reached[table.data_ptr()] = [tensor for some in lists for tensor in some if tensor is not None]
        return table

    write_stacks = stacks.stacked_addresses

    def stacked_addresses(stacked: Any, *lists: Any) -> Tensor:
        table = write_stacks(stacked, *lists)
        _reached[table.data_ptr()] = [tensor for some in lists for tensor in some if tensor is not None]
        return table

    def record(fn: Any, args: Any, kwargs: Any, *rest: Any) -> Any:
        tables = [value for value in kwargs.values() if isinstance(value, Tensor) and value.dtype == torch.int64]
        reached_now[:] = [tensor for table in tables for tensor in _reached.get(table.data_ptr(), ())]
        return record_launch(fn, args, kwargs, *rest)

    class Reaching(Memory):
        def __init__(self) -> None:
            super().__init__()
            for tensor in reached_now:
                base, _ = harness.storage_copy(tensor)
                if base not in self.buffers():
                    # Written in place: ttsem writes back the arguments of the launch alone.
                    self.register(base, _bytes_of(tensor))

    stacks.addresses_of = addresses.addresses_of = addresses_of
    stacks.stacked_addresses = stacked_addresses
    harness.record_launch, harness.Memory = record, Reaching


def _bytes_of(tensor: Tensor) -> Any:
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(tensor.detach().untyped_storage()).numpy()

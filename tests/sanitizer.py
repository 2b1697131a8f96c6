"""What ttsem has to know to execute the kernels: no stream is captured, and which memory tables of addresses reach.

ttsem presents a CUDA device, runs the IR that Triton compiles on the CPU, and reports accesses outside the tensors of a
launch. Spectral norm's weights, u and v are no arguments of its launches: a table holds their addresses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")

_reached: dict[int, list[Tensor]] = {}
"""Tensors whose addresses a table holds, by the table's own address; that is only kept while the table lives."""


def install() -> None:
    """Teach the ttsem that runs this process; call it before a kernel runs."""
    import ttsem.harness as harness
    from ttsem.memory import Memory

    from sagan_fast.kernels.spectral_norm import addresses, backward, forward

    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)

    for name in ("mm.dtype", "bmm.dtype"):  # PyTorch has products with another output dtype for CUDA alone
        product = getattr(torch, name.partition(".")[0])
        _library.impl(name, lambda a, b, dtype, product=product: product(a.to(dtype), b.to(dtype)), "CPU")

    def addresses_of(*lists: Any) -> Tensor:
        table = addresses.addresses_of(*lists)
        _reached[table.data_ptr()] = [tensor for some in lists for tensor in some if tensor is not None]
        return table

    forward.addresses_of = backward.addresses_of = addresses_of
    launched: list[Tensor] = []
    record_launch = harness.record_launch

    def record(fn: Any, args: Any, kwargs: Any, *rest: Any) -> Any:
        tables = [value for value in kwargs.values() if isinstance(value, Tensor) and value.dtype == torch.int64]
        launched[:] = [tensor for table in tables for tensor in _reached.get(table.data_ptr(), ())]
        return record_launch(fn, args, kwargs, *rest)

    class Reaching(Memory):
        def __init__(self) -> None:
            super().__init__()
            for tensor in launched:
                base, _ = harness.storage_copy(tensor)
                if base not in self.buffers():
                    # Written in place: ttsem writes back the arguments of the launch alone.
                    self.register(base, _bytes_of(tensor))

    harness.record_launch = record
    harness.Memory = Reaching


def _bytes_of(tensor: Tensor) -> Any:
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(tensor.detach().untyped_storage()).numpy()

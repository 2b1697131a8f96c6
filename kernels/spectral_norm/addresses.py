"""Tables of addresses in device memory, written by a kernel whose arguments they are.

Nothing is uploaded, so that a CUDA graph can capture it and the host never waits.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import LaunchConfig
from ..launch import Launch, Needs, launch
from .tables import is_capturing

NOWHERE = tl.constexpr(1 << 60)
"""The address of a tensor that there is not; as wide and as aligned as a real one."""

_A_LAUNCH = 16
_CONFIG = LaunchConfig(BLOCK=_A_LAUNCH, num_warps=1, num_stages=3)
_NUMBERS = ["count", *(f"a{i}" for i in range(_A_LAUNCH))]


@triton.jit(do_not_specialize=_NUMBERS)
def _write_kernel(
    table_ptr, count,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
):  # fmt: skip
    tl.store(table_ptr + 0, a0)
    tl.store(table_ptr + 1, a1, mask=count > 1)
    tl.store(table_ptr + 2, a2, mask=count > 2)
    tl.store(table_ptr + 3, a3, mask=count > 3)
    tl.store(table_ptr + 4, a4, mask=count > 4)
    tl.store(table_ptr + 5, a5, mask=count > 5)
    tl.store(table_ptr + 6, a6, mask=count > 6)
    tl.store(table_ptr + 7, a7, mask=count > 7)
    tl.store(table_ptr + 8, a8, mask=count > 8)
    tl.store(table_ptr + 9, a9, mask=count > 9)
    tl.store(table_ptr + 10, a10, mask=count > 10)
    tl.store(table_ptr + 11, a11, mask=count > 11)
    tl.store(table_ptr + 12, a12, mask=count > 12)
    tl.store(table_ptr + 13, a13, mask=count > 13)
    tl.store(table_ptr + 14, a14, mask=count > 14)
    tl.store(table_ptr + 15, a15, mask=count > 15)


_written: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
MAX_WRITTEN = 4096
"""So many tables are kept, half a kilobyte each: a model of a thousand separately normalised layers needs 2000."""


def addresses_of(*lists: Sequence[Tensor | None]) -> Tensor:
    """Return an int64 table (L, len(lists)) of the addresses of tensors; `NOWHERE` for None.

    The table of addresses that were asked for before, on the same stream, is found again. While a CUDA graph is
    captured a new one is written, since the graph has to write its own.
    """
    device = next(tensor.device for some in lists for tensor in some if tensor is not None)
    addresses = [_address(tensor) for one in zip(*lists, strict=True) for tensor in one]
    if device.type == "meta" or is_capturing(device):
        return _write(addresses, device).view(-1, len(lists))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, len(lists), *addresses)
    found = _written.get(key)
    if found is None:
        found = _written[key] = _write(addresses, device).view(-1, len(lists))
        if len(_written) > MAX_WRITTEN:
            _written.popitem(last=False)
    else:
        _written.move_to_end(key)
    return found


def _address(tensor: Tensor | None) -> int:
    return NOWHERE.value if tensor is None or tensor.is_meta else tensor.data_ptr()


def _write(addresses: list[int], device: torch.device) -> Tensor:
    table = torch.empty(len(addresses), device=device, dtype=torch.int64)
    for first in range(0, len(addresses), _A_LAUNCH):
        some = addresses[first : first + _A_LAUNCH]
        numbers = dict(zip(_NUMBERS, (len(some), *some, *[NOWHERE.value] * (_A_LAUNCH - len(some))), strict=True))
        _launch(table[first:], numbers)
    return table


def _launch(table: Tensor, numbers: dict[str, int]) -> None:
    needs = Needs(bytes_written=8 * numbers["count"])
    what = Launch((1,), _CONFIG, numbers, {}, lambda: needs)
    launch("spectral_norm addresses", _write_kernel, dict(table_ptr=table), None, lambda: what)

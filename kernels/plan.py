"""What a launch is, said without tensors: enough to compile it without a GPU and to know what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """One kernel launch.

    `signature` gives Triton's type of every argument that is not in `constexprs`; `divisible_by_16` names those that
    the launcher would specialise (aligned pointers, strides). `loops` holds, in the order of the source, how often
    one program runs each of the kernel's loops over run-time trip counts. `flops` (multiply and add are two), `exps`,
    `bytes_read` and `bytes_written` (each byte of global memory once) are what the launch needs, for the whole grid.
    """

    name: str
    kernel: Any
    dtype: str
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    divisible_by_16: tuple[str, ...] = ()
    loops: tuple[int, ...] = ()
    flops: int = 0
    exps: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        count = 1
        for axis in self.grid:
            count *= axis
        return count

"""Launch configs of the attention kernels: one for every architecture, precision and width; no autotuning.

Chosen by `benchmarks/tune.py` on a GPU where there was one, else from the machine code (benchmarks/kernel_report.py):
no spills, shared memory under the cap, the fewest clocks a score; of equals the one with more blocks a multiprocessor.
BLOCK_N of 128 and not 64 on large maps, as every block of queries reads all keys and values from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..projection.configs import MAX_D_QK, MAX_D_V, padded, table_arch

SMALL_N = 256
"""Up to this many queries an image has tiles of the "small" rows: half the size, so that they fill a GPU."""


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys a tile, channels of x a chunk (kernels that read x), warps a block, pipeline stages."""

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int

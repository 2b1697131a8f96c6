"""Launch configs of the projections, and what all kernels of the block have in common: widths, table keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..tuned import tuned

MAX_D_QK = 64
MAX_D_V = 256
"""The widest rows a config exists for; wider ones do not fit a tile in registers."""

WIDTHS = ((32, 32), (16, 64), (32, 64), (32, 96), (32, 128), (32, 256), (64, 128), (64, 256))
"""The rows of every table: D_QK up to, D_V up to."""


def table_arch(arch: int) -> int:
    """Return the architecture whose configs `arch` runs: 80 also for 86, 89 and 120, which have its instructions.

    The configs for 80 stay under the shared memory of the smallest of them (101376 bytes).
    """
    return 90 if arch == 90 else 100 if 100 <= arch < 120 else 80


def table_precision(precision: str) -> str:
    """Return the precision whose configs are run: bf16 for both 16-bit types, fp32 for fp64 (interpreter only)."""
    return {"fp16": "bf16", "fp64": "fp32"}.get(precision, precision)


def table_width(op: str, D_QK: int, D_V: int) -> tuple[int, int]:
    """Return the row of a table for these widths. Raises ValueError above `MAX_D_QK` and `MAX_D_V`."""
    for width in WIDTHS:
        if width[0] >= D_QK and width[1] >= D_V:
            return width
    raise ValueError(
        f"{op}: D_QK and D_V must be at most = {MAX_D_QK} and {MAX_D_V} (backend 'sdpa' takes any), got {D_QK}, {D_V}"
    )


@dataclass(frozen=True)
class ProjectionConfig:
    """Pooled positions a tile, channels a chunk, warps a block, pipeline stages, cap of the registers of a thread.

    A chunk is no wider than x; one that holds all channels has the weights read once. 255
    registers, all there are, keep the assembler from spilling a few of them for the sake of another block.
    """

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# Rows by architecture and precision, columns as WIDTHS: BLOCK_M, BLOCK_C, num_warps, num_stages.
_FORWARD = {
    (80, "bf16"): (
        (64, 32, 4, 2), (64, 128, 4, 2), (32, 32, 8, 2), (16, 32, 8, 2),
        (32, 32, 8, 2, 255), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
    ),
    (80, "tf32"): (
        (64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2),
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2),
    ),
    (80, "fp32"): (
        (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2),
        (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2),
    ),
    (90, "bf16"): (
        (64, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2),
        (64, 256, 8, 2), (32, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2),
    ),
    (90, "tf32"): (
        (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2),
        (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
    ),
    (90, "fp32"): (
        (32, 32, 8, 2, 255), (32, 32, 8, 2, 255), (32, 32, 8, 2), (16, 32, 8, 2),
        (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2, 255),
    ),
    (100, "bf16"): (
        (64, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2, 255),
        (64, 64, 8, 2, 255), (32, 32, 8, 2), (64, 64, 8, 2, 255), (32, 32, 8, 2),
    ),
    (100, "tf32"): (
        (64, 64, 4, 2), (64, 32, 4, 2, 255), (64, 32, 4, 2, 255), (64, 32, 8, 2, 255),
        (64, 32, 8, 2, 255), (32, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 2),
    ),
    (100, "fp32"): (
        (32, 32, 8, 2, 255), (16, 32, 8, 2, 255), (16, 32, 8, 2, 255), (32, 32, 8, 2),
        (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2),
    ),
}  # fmt: skip


@functools.cache
def lookup_forward(arch: int, precision: str, D_QK: int, D_V: int) -> ProjectionConfig:
    """Return the config of `projection_fwd`. Raises ValueError for widths no config exists for."""
    width, precision = table_width("projection_fwd", D_QK, D_V), table_precision(precision)
    measured = tuned("projection", arch, precision, width)
    return ProjectionConfig(*(measured or _FORWARD[table_arch(arch), precision][WIDTHS.index(width)]))

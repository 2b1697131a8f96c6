"""Launch configs of the spectral-norm kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTHS = (128, 1024, 2304, 4608, 9216, 16384)
"""Widths of the sweep's row tiles. The 3x3 convolutions of 64 to 1024 channels fill theirs: 2304 = 2048 + 256, ...

Each width is one branch of `sweep._sweep_kernel`; those wider than the widest matrix of the list are not compiled.
"""

MAX_SIZE = 16384
"""Most rows and most columns of a matrix."""


@dataclass(frozen=True)
class SpectralNormConfig:
    """Elements of a vector that a program takes at a time, elements of W in all (0 where it reads none), and warps."""

    BLOCK: int
    ELEMENTS: int
    num_warps: int = 8
    num_stages: int = 3
    maxnreg: int | None = None


class SpectralNormConfigs(NamedTuple):
    """The configs of one list of matrices; `scale` serves the gradient's kernels too."""

    sweep: SpectralNormConfig
    sweep_columns: SpectralNormConfig
    reduce: SpectralNormConfig
    scale: SpectralNormConfig


def configs_for(widest: int) -> SpectralNormConfigs:
    """Return the configs for a list whose widest matrix has `widest` columns."""
    # The more elements a sweep takes, the fewer partial sums there are; 2**18 gives SAGAN's 44 matrices 300 programs.
    # 128 registers let two programs share a multiprocessor: one loads while the other adds. A row of 16384 and its
    # sums are 48K registers, which only sixteen warps hold without spilling.
    wide = widest > 9216
    sweep = SpectralNormConfig(512, 2**18, 16) if wide else SpectralNormConfig(512, 2**18, maxnreg=128)
    return SpectralNormConfigs(
        sweep=sweep,
        sweep_columns=SpectralNormConfig(32, 0),  # 128 bytes of a row
        reduce=SpectralNormConfig(1024, 0),  # at least MAX_SIZE / 16
        scale=SpectralNormConfig(1024, 2**15),
    )


def width_of(K: int) -> int:
    """Return the width of the row tiles that hold K columns."""
    return next(width for width in WIDTHS if width >= K)


def vector(dtype_bytes: int) -> int:
    """Return how many elements 128 bits hold."""
    return 16 // dtype_bytes


def widest(sizes: Sequence[int]) -> int:
    """Return the width of the widest of `sizes` columns, 0 for none."""
    return width_of(max(sizes)) if sizes else 0

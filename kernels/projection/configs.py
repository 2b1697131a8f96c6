"""Launch configs of the projections."""

from __future__ import annotations

from dataclasses import dataclass


def padded(size: int) -> int:
    """Return the width of a tile for `size` channels: the next power of two, at least 16 (the least K of tl.dot)."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class ProjectionConfig:
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


def lookup_forward(arch, precision, D_QK, D_V):
    return ProjectionConfig(64, 64, 4, 3)

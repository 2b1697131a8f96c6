"""How a map is cut into tiles, and what all kernels of batch norm do with one: find it, load it, look up its gains.

A tile is BLOCK_C channels by BLOCK_N positions of one image, wide along the axis that is contiguous. Dense maps of both
memory formats are read where they lie. Everything here follows from shapes, never from the device: the order of all
sums, and so their bits, is the same everywhere.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..configs import LaunchConfig, lookup_size
from ..tiles import cdiv, is_channels_last

PROGRAMS = 1024
"""About so many programs share a sum over a map: enough to fill a GPU, and few enough partial sums to add up fast."""


class Tiling(NamedTuple):
    """The tiles of a dense map: `tiles` an image, of `images` images, and `columns` blocks of channels beside them."""

    config: LaunchConfig
    images: int
    C: int
    N: int
    strides: tuple[int, int, int]
    BLOCK_C: int
    BLOCK_N: int
    tiles: int
    columns: int

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers that every kernel on the map takes."""
        stride_b, stride_c, stride_n = self.strides
        return dict(stride_x_b=stride_b, stride_x_c=stride_c, stride_x_n=stride_n, C=self.C, N=self.N, tiles=self.tiles)

    @property
    def blocks(self) -> dict[str, int]:
        """The widths of a tile, compile-time values of every kernel on the map."""
        return dict(BLOCK_C=self.BLOCK_C, BLOCK_N=self.BLOCK_N)


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def tiling_of(x: Tensor, name: str, flat: bool = False) -> Tiling:
    """Return the tiles of a dense `x` (B, C, H, W) for the config `name`.

    With `flat` the images of a channels_last map are one, whose positions follow each other.
    """
    B, C, H, W = x.shape
    N, config, last = H * W, lookup_size(name, 0), is_channels_last(x)
    images, positions = (1, B * N) if last and flat else (B, N)
    block_n = min(power_of_two(positions), config.BLOCK // 64 if last else config.BLOCK)
    block_c = min(power_of_two(C), config.BLOCK // block_n)
    if last:  # few channels: longer tiles
        block_n = min(power_of_two(positions), config.BLOCK // block_c)
    strides = (C * N, 1, C) if last else (C * N, N, 1)
    return Tiling(config, images, C, positions, strides, block_c, block_n, cdiv(positions, block_n), cdiv(C, block_c))


def share_of(tiles: int, others: int) -> int:
    """Return how many of `tiles` one program takes, where each has `others` beside it, for about `PROGRAMS` in all."""
    return max(1, cdiv(tiles * others, PROGRAMS))


def parts_of(tiles: int, share: int) -> int:
    """Return how many programs with a `share` of `tiles` there are, none of them without a tile."""
    return cdiv(tiles, share)


@triton.jit
def locate_tile(t, tiles, N, C, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return image (int64), first position (int64), channels, and masks of channels and elements of the tile `t`."""
    first = t % tiles * BLOCK_N
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = mask_c[:, None] & (first + tl.arange(0, BLOCK_N) < N)[None, :]
    return (t // tiles).to(tl.int64), first.to(tl.int64), c, mask_c, mask


@triton.jit
def offsets_of(b, first, c, stride_b, stride_c, stride_n, BLOCK_N: tl.constexpr):
    """Return the offset of a tile in its map (int64), and those of its elements from there: (BLOCK_C, BLOCK_N)."""
    within = c[:, None] * stride_c + tl.arange(0, BLOCK_N)[None, :] * stride_n
    return b * stride_b + first * stride_n, within


@triton.jit
def positions_before(t, tiles, N, BLOCK_N: tl.constexpr):
    """Return how many positions the tiles before `t` hold, of all images in turn."""
    return t // tiles * N + tl.minimum(t % tiles * BLOCK_N, N)


@triton.jit
def row_of(classes_ptr, b):
    """Return the row of the tables for image `b`: its class, or the image itself where there are no classes."""
    if classes_ptr is not None:
        return tl.load(classes_ptr + b).to(tl.int64)
    else:
        return b


@triton.jit
def load_affine(
    gain_ptr, bias_ptr, row, rows, stride_row, c, mask_c, ONE: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return gain (1 added with ONE) and bias of the channels `c` in `row`; NaN where there is no such row."""
    exists = (row >= 0) & (row < rows)
    offs = row * stride_row + c
    missing = float("nan")
    gain = tl.full((BLOCK_C,), 1.0, ACC)
    bias = tl.zeros((BLOCK_C,), ACC)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + offs, mask=mask_c & exists, other=missing).to(ACC)
        if ONE:
            gain += 1.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs, mask=mask_c & exists, other=missing).to(ACC)
    return gain, bias


@triton.jit
def load_channels(mean_ptr, var_ptr, c, mask_c, eps):
    """Return the mean and 1/sqrt(var + eps) of the channels `c`."""
    mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0)
    var = tl.load(var_ptr + c, mask=mask_c, other=1.0)
    return mean, 1.0 / tl.sqrt(var + eps)

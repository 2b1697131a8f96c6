"""What the kernels of the attention block share: grids, and loads and stores of tiles of maps and weights.

Their grid is (tiles of an image, images): the tiles of one image run one after the other, since they read the same
keys. A second axis takes 65535 images at most; above, both axes are one (FLAT), which costs a program a division.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import LaunchConfig
from .launch import POINTERS

MAX_IMAGES = 65535
"""Length of a grid's second axis."""


def dense(x: Tensor) -> Tensor:
    """Return `x` (B, C, H, W) itself where it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a dense `x` (B, C, H, W) are innermost; False where both formats are the same."""
    return not x.is_contiguous()


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of the axes B, C and N = H*W of a dense `x`; its own are arbitrary where a size is 1."""
    B, C, H, W = x.shape
    return (C * H * W, 1, C) if is_channels_last(x) else (C * H * W, H * W, 1)


def cdiv(size: int, block: int) -> int:
    """Return how many tiles of `block` hold `size`. triton.cdiv takes ten times as long on the host."""
    return -(-size // block)


@functools.cache
def padded(size: int) -> int:
    """Return the width of a tile for `size` channels: the next power of two, at least 16 (the least K of tl.dot)."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def split(size: int) -> tuple[int, int]:
    """Return the widths of one or two tiles, side by side, that hold `size` channels; the second may be 0.

    Widths are powers of two: 96 channels are 64 + 32 instead of 128, a quarter fewer products and registers.
    """
    whole = padded(size)
    rest = padded(max(size - whole // 2, 1))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name for `dtype`."""
    return tl.dtype(POINTERS[dtype][1:])


def grid_of(tiles: int, images: int) -> tuple[int, ...]:
    """Return the grid for so many tiles an image; it has one axis if the kernel must run FLAT, else two."""
    return (tiles, images) if images <= MAX_IMAGES else (tiles * images,)


def arithmetic(precision: str, config: LaunchConfig) -> dict[str, object]:
    """Return the compile-time arguments of a kernel's products: their precision and what they accumulate in."""
    return {
        "PRECISION": "tf32" if precision == "tf32" else "tf32x3" if config.tf32x3 and precision == "fp32" else "ieee",
        "ACC": tl.float64 if precision == "fp64" else tl.float32,
    }


@triton.jit
def locate(size, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Return this program's image (int64) and its BLOCK positions of that image, which has `size` of them."""
    if FLAT:
        tiles = tl.cdiv(size, BLOCK)
        return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    else:
        return tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_rows(ptr, stride_row, stride_d, offs_row, mask_row, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns FIRST.. of the rows `offs_row` of a matrix with D columns: (rows, BLOCK), zero past D and masked."""
    offs_d = FIRST + tl.arange(0, BLOCK)
    ptrs = ptr + offs_row[:, None].to(tl.int64) * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride_row, tile, offs_row, mask_row, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store `tile` (rows, BLOCK) as columns FIRST.. of rows `offs_row` of a matrix with D columns, in its dtype."""
    offs_d = FIRST + tl.arange(0, BLOCK)
    ptrs = ptr + offs_row[:, None] * stride_row + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask_row[:, None] & (offs_d < D)[None, :])


@triton.jit
def store_lost(ptr, stride_row, tile, offs_row, mask_row, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `store_rows` loses of `tile` by rounding it to the dtype of `ptr`."""
    lost = tile - tile.to(ptr.dtype.element_ty).to(tile.dtype)
    store_rows(ptr, stride_row, lost, offs_row, mask_row, FIRST, D, BLOCK)


@triton.jit
def load_chunk(ptrs, stride_c, c, mask_c, mask_n):
    """Load channels `c` of the positions at `ptrs` (BLOCK_N, 1): (BLOCK_N, BLOCK_C), zero where masked."""
    return tl.load(ptrs + c[None, :] * stride_c, mask=mask_n[:, None] & mask_c[None, :], other=0.0)


@triton.jit
def load_weight(ptr, stride_c, stride_d, c, mask_c, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load channels `c` and columns FIRST.. of D of a weight: (BLOCK_C, BLOCK), zero past D and where masked."""
    offs_d = FIRST + tl.arange(0, BLOCK)
    ptrs = ptr + c[:, None] * stride_c + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask_c[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def load_weight_t(ptr, stride_c, c, mask_c, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load the same transposed, (BLOCK, BLOCK_C), of a weight (C, D) whose columns follow each other in memory."""
    offs_d = FIRST + tl.arange(0, BLOCK)
    ptrs = ptr + c[None, :] * stride_c + offs_d[:, None]
    return tl.load(ptrs, mask=mask_c[None, :] & (offs_d < D)[:, None], other=0.0)


@triton.jit
def load_bias(ptr, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load elements FIRST.. of D of a contiguous bias as a row: (1, BLOCK), zero past D."""
    offs_d = FIRST + tl.arange(0, BLOCK)
    return tl.load(ptr + offs_d, mask=offs_d < D, other=0.0)[None, :]

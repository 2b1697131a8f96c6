"""y = ReLU(gain * (x - mean)/sqrt(var + eps) + bias) of a map x (B, C, H, W), with statistics in float32.

`_moments_kernel`, one program for a share of the tiles of some channels: their mean, and the sum of squared distances
from it. Distances are taken from the mean of the program's first tile. That tile is a part of the sum, so what cancels
is at most as many times the result as the program has tiles, wherever the mean lies.
`_merge_kernel`, one program for a few channels: puts the programs' moments together in a fixed order (Chan, Golub &
LeVeque 1983, about their common mean) and moves the running averages.
`_fwd_kernel`, one program a tile: looks up gain and bias by class and writes y.
Nothing but x and the statistics is kept for backward. No atomics: equal inputs give equal bits.
Oracle: `reference.moments` and `reference.batch_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_contiguous, check_shape
from ..configs import lookup_size
from ..launch import Launch, Needs, accumulator_dtype, launch, size_of
from ..tiles import cdiv, is_channels_last
from .tiling import (
    load_affine,
    load_channels,
    locate_tile,
    offsets_of,
    parts_of,
    positions_before,
    row_of,
    share_of,
    tiling_of,
)

_COUNTS = ["all_tiles", "share", "parts"]
"""Not compiled in where they are 1: the kernels compute with them as tensors."""


@triton.jit(do_not_specialize=_COUNTS)
def _moments_kernel(
    x_ptr, partial_ptr,  # (B, C, N), (2, parts, C): mean, sum of squared distances
    stride_x_b, stride_x_c, stride_x_n,
    C, N, tiles, all_tiles, share, parts,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    part = tl.program_id(0)
    begin = part * share
    end = tl.minimum(begin + share, all_tiles)
    b, first, c, mask_c, mask = locate_tile(begin, tiles, N, C, BLOCK_C, BLOCK_N)
    base, offs = offsets_of(b, first, c, stride_x_b, stride_x_c, stride_x_n, BLOCK_N)
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    here = positions_before(begin + 1, tiles, N, BLOCK_N) - positions_before(begin, tiles, N, BLOCK_N)
    shift = tl.sum(x, axis=1) / here.to(ACC)
    moved = tl.where(mask, x - shift[:, None], 0.0)
    total, squares = moved, moved * moved
    for t in range(begin + 1, end):
        b, first, c, mask_c, mask = locate_tile(t, tiles, N, C, BLOCK_C, BLOCK_N)
        base, offs = offsets_of(b, first, c, stride_x_b, stride_x_c, stride_x_n, BLOCK_N)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
        moved = tl.where(mask, x - shift[:, None], 0.0)
        total += moved
        squares += moved * moved
    count = positions_before(end, tiles, N, BLOCK_N) - positions_before(begin, tiles, N, BLOCK_N)
    away = tl.sum(total, axis=1) / count.to(ACC)
    distance = tl.sum(squares, axis=1) - away * away * count
    partial_ptr += part.to(tl.int64) * C + c
    tl.store(partial_ptr, shift + away, mask=mask_c)
    tl.store(partial_ptr + parts * C, tl.where(distance < 0.0, 0.0, distance), mask=mask_c)  # keeps NaN


@triton.jit(do_not_specialize=_COUNTS)
def _merge_kernel(
    partial_ptr, mean_ptr, var_ptr,  # (2, parts, C), (C,), (C,)
    running_mean_ptr, running_var_ptr,  # (C,) or None
    momentum, C, N, tiles, all_tiles, share, parts,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    count = positions_before(all_tiles, tiles, N, BLOCK_N).to(ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask = (part < parts)[:, None] & mask_c[None, :]
        offs = part.to(tl.int64)[:, None] * C + c[None, :]
        acc += _positions_of(part, share, all_tiles, tiles, N, BLOCK_N, ACC)[:, None] * tl.load(
            partial_ptr + offs, mask=mask, other=0.0
        )
    mean = tl.sum(acc, axis=0) / count
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask = (part < parts)[:, None] & mask_c[None, :]
        offs = part.to(tl.int64)[:, None] * C + c[None, :]
        apart = tl.load(partial_ptr + offs, mask=mask, other=0.0) - mean[None, :]
        within = tl.load(partial_ptr + parts * C + offs, mask=mask, other=0.0)
        between = _positions_of(part, share, all_tiles, tiles, N, BLOCK_N, ACC)[:, None] * apart * apart
        acc += tl.where(mask, within + between, 0.0)
    distance = tl.sum(acc, axis=0)
    tl.store(mean_ptr + c, mean, mask=mask_c)
    tl.store(var_ptr + c, distance / count, mask=mask_c)
    if running_mean_ptr is not None:
        _move(running_mean_ptr + c, mean, momentum, mask_c, ACC)
        _move(running_var_ptr + c, distance / tl.maximum(count - 1.0, 1.0), momentum, mask_c, ACC)


@triton.jit
def _positions_of(part, share, all_tiles, tiles, N, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    begin = tl.minimum(part * share, all_tiles)
    end = tl.minimum(begin + share, all_tiles)
    return (positions_before(end, tiles, N, BLOCK_N) - positions_before(begin, tiles, N, BLOCK_N)).to(ACC)


@triton.jit
def _move(ptrs, value, momentum, mask, ACC: tl.constexpr):
    before = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
    tl.store(ptrs, (before + momentum * (value - before)).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_kernel(
    x_ptr, mean_ptr, var_ptr,  # (B, C, N), (C,), (C,)
    gain_ptr, bias_ptr, classes_ptr,  # (C,), (B, C) or (K, C), or None; (B,) or None
    out_ptr,  # as x
    stride_x_b, stride_x_c, stride_x_n,
    eps, C, N, tiles, rows, stride_row,
    ONE: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    b, first, c, mask_c, mask = locate_tile(tl.program_id(0), tiles, N, C, BLOCK_C, BLOCK_N)
    base, offs = offsets_of(b, first, c, stride_x_b, stride_x_c, stride_x_n, BLOCK_N)
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    row = row_of(classes_ptr, b)
    gain, bias = load_affine(gain_ptr, bias_ptr, row, rows, stride_row, c, mask_c, ONE, ACC, BLOCK_C)
    mean, scale = load_channels(mean_ptr, var_ptr, c, mask_c, eps)
    y = (x - mean[:, None]) * (scale * gain)[:, None] + bias[:, None]
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    tl.store(out_ptr + base + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def batch_norm_moments(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of `x` (B, C, H, W), (C,) each, float32 (float64 for float64).

    `x` is contiguous or channels_last and has at least one element. `running_mean` and `running_var` (C,) are moved in
    place by the share `momentum` towards the mean and the unbiased variance.
    """
    op = "batch_norm_moments"
    check_contiguous(op, ("running_mean", "running_var"), (running_mean, running_var))
    tiling, C = tiling_of(x, "batch_norm_map", flat=True), x.shape[1]
    all_tiles = tiling.images * tiling.tiles
    share = share_of(all_tiles, tiling.columns)
    parts = parts_of(all_tiles, share)
    acc = accumulator_dtype(x.dtype)
    partial = x.new_empty((2, parts, C), dtype=acc)
    mean, var = x.new_empty(C, dtype=acc), x.new_empty(C, dtype=acc)
    key = (x.shape, is_channels_last(x), share)
    sums = dict(all_tiles=all_tiles, share=share, parts=parts)

    def describe_moments() -> Launch:
        needs = Needs(flops=4 * x.numel(), bytes_read=size_of(x), bytes_written=size_of(partial))
        grid = (parts, tiling.columns)
        return Launch(grid, tiling.config, {**tiling.sizes, **sums}, tiling.blocks, lambda: needs)

    def describe_merge() -> Launch:
        config = lookup_size("batch_norm_merge", 0)
        numbers = dict(momentum=float(momentum), C=C, N=tiling.N, tiles=tiling.tiles, **sums)
        needs = Needs(
            flops=6 * partial.numel(),
            bytes_read=size_of(partial, running_mean, running_var),
            bytes_written=size_of(mean, var, running_mean, running_var),
        )
        blocks = dict(BLOCK_N=tiling.BLOCK_N, BLOCK_C=config.BLOCK_C, BLOCK_M=config.BLOCK_M)
        return Launch((cdiv(C, config.BLOCK_C),), config, numbers, blocks, lambda: needs)

    launch(op, _moments_kernel, dict(x_ptr=x, partial_ptr=partial), key, describe_moments)
    launch(
        "batch_norm_merge",
        _merge_kernel,
        dict(
            partial_ptr=partial, mean_ptr=mean, var_ptr=var,
            running_mean_ptr=running_mean, running_var_ptr=running_var,
        ),
        (*key, momentum),
        describe_merge,
    )  # fmt: skip
    return mean, var


def rows_of(op: str, x: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None) -> tuple[int, int]:
    """Return the rows of `gain` and `bias` and the step from one to the next, 0 where all images have the same.

    Raises ValueError unless they are contiguous and (C,), (B, C) or, with `classes` (B,), (K, C).
    """
    check_contiguous(op, ("gain", "bias", "classes"), (gain, bias, classes))
    B, C = x.shape[:2]
    table = gain if gain is not None else bias
    if table is None:
        return B, 0
    expected = (C,) if table.ndim == 1 else (table.shape[0] if classes is not None else B, C)
    for name, given in (("gain", gain), ("bias", bias)):
        if given is not None:
            check_shape(
                op, name, given, expected, "K, C" if classes is not None else "C" if given.ndim == 1 else "B, C"
            )
    if classes is not None:
        check_shape(op, "classes", classes, (B,), "B")
    return (B, 0) if table.ndim == 1 else (expected[0], C)


def batch_norm_fwd(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None = None,
    *, eps: float, relu: bool, one_plus: bool = False,
) -> Tensor:  # fmt: skip
    """Return gain * (x - mean)/sqrt(var + eps) + bias, in the dtype and memory format of `x` (B, C, H, W).

    `x` is contiguous or channels_last, `mean` and `var` (C,) as `batch_norm_moments` gives them. `gain` and `bias` are
    (C,), (B, C), one row an image, or with `classes` (B,) int64 tables (K, C); None is a gain of 1 and a bias of 0. A
    class that the tables do not have gives NaN. `one_plus` takes 1 + gain, `relu` makes the negative part zero.
    """
    op = "batch_norm_fwd"
    rows, stride_row = rows_of(op, x, gain, bias, classes)
    tiling, out = tiling_of(x, "batch_norm_map"), torch.empty_like(x)

    def describe() -> Launch:
        return Launch(
            (tiling.images * tiling.tiles, tiling.columns),
            tiling.config,
            dict(eps=float(eps), **tiling.sizes, rows=rows, stride_row=stride_row),
            dict(ONE=one_plus, RELU=relu, **tiling.blocks),
            lambda: Needs(
                flops=3 * x.numel(),
                bytes_read=size_of(x, mean, var, classes) + (2 * x.shape[0] if stride_row else 2) * x.shape[1] * 4,
                bytes_written=size_of(out),
            ),
        )

    launch(
        op,
        _fwd_kernel,
        dict(
            x_ptr=x, mean_ptr=mean, var_ptr=var, gain_ptr=gain, bias_ptr=bias, classes_ptr=classes, out_ptr=out,
        ),
        (x.shape, is_channels_last(x), rows, stride_row, eps, relu, one_plus),
        describe,
    )  # fmt: skip
    return out

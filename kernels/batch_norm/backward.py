"""The gradients of batch norm + ReLU for x, gain and bias, from x and the statistics; the ReLU's mask is found again.

With n = (x - mean)/sqrt(var + eps) and dz the gradient behind the ReLU, zero where gain * n + bias was not positive:
dx = (gain dz - mean of gain dz - n * mean of gain dz n)/sqrt(var + eps), the means over all images and positions. On
running averages the means are left out. d_bias and d_gain are the sums of dz and dz n over the images of a class.

`_sums_kernel`, one program for a share of the tiles of one image: its sums of dz and dz n by channel.
`_totals_kernel`, one program for a few channels: the two means. `_tables_kernel`, one program for a class and some
channels: adds up the images of its class. `_dx_kernel`, one program a tile: dx.
All sums have a fixed order, also those by class: no atomics. Oracle: autograd through `reference.batch_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_shape
from ..configs import lookup_size
from ..launch import Launch, Needs, launch, size_of
from ..tiles import cdiv, is_channels_last, triton_dtype
from .forward import rows_of
from .tiling import (
    load_affine,
    load_channels,
    locate_tile,
    offsets_of,
    parts_of,
    row_of,
    share_of,
    tiling_of,
)


@triton.jit
def _behind_relu(x, d_out, mean, scale, gain, bias, RELU: tl.constexpr):
    """Return n and dz: (BLOCK_C, BLOCK_N)."""
    normalised = (x - mean[:, None]) * scale[:, None]
    if RELU:  # as PyTorch's threshold_backward: NaN passes
        d_out = tl.where((x - mean[:, None]) * (scale * gain)[:, None] + bias[:, None] <= 0.0, 0.0, d_out)
    return normalised, d_out


@triton.jit(do_not_specialize=["share", "parts", "all_parts"])
def _sums_kernel(
    x_ptr, d_out_ptr, mean_ptr, var_ptr,  # (B, C, N), as x, (C,), (C,)
    gain_ptr, bias_ptr, classes_ptr,  # as forward's
    sums_ptr,  # (2, B * parts, C): of dz, of dz n
    stride_x_b, stride_x_c, stride_x_n,
    eps, C, N, tiles, rows, stride_row, share, parts, all_parts,
    ONE: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    image = tl.program_id(0) // parts
    begin = tl.program_id(0) % parts * share
    end = tl.minimum(begin + share, tiles)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    row = row_of(classes_ptr, image.to(tl.int64))
    gain, bias = load_affine(gain_ptr, bias_ptr, row, rows, stride_row, c, mask_c, ONE, ACC, BLOCK_C)
    mean, scale = load_channels(mean_ptr, var_ptr, c, mask_c, eps)
    d_bias = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    d_gain = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    for t in range(begin, end):
        b, first, c, mask_c, mask = locate_tile(image * tiles + t, tiles, N, C, BLOCK_C, BLOCK_N)
        base, offs = offsets_of(b, first, c, stride_x_b, stride_x_c, stride_x_n, BLOCK_N)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
        d_out = tl.load(d_out_ptr + base + offs, mask=mask, other=0.0).to(ACC)
        normalised, d_z = _behind_relu(x, d_out, mean, scale, gain, bias, RELU)
        d_bias += d_z
        d_gain += tl.where(mask, d_z * normalised, 0.0)
    sums_ptr += tl.program_id(0).to(tl.int64) * C + c
    tl.store(sums_ptr, tl.sum(d_bias, axis=1), mask=mask_c)
    tl.store(sums_ptr + all_parts * C, tl.sum(d_gain, axis=1), mask=mask_c)


@triton.jit(do_not_specialize=["parts", "all_parts"])
def _totals_kernel(
    sums_ptr, gain_ptr, classes_ptr, totals_ptr,  # (2, B * parts, C), as forward's, (2, C)
    factor, C, rows, stride_row, parts, all_parts,
    ONE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = totals_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    total = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    along = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, all_parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask_m = part < all_parts
        mask = mask_m[:, None] & mask_c[None, :]
        offs = part.to(tl.int64)[:, None] * C + c[None, :]
        d_bias = tl.load(sums_ptr + offs, mask=mask, other=0.0)
        d_gain = tl.load(sums_ptr + all_parts * C + offs, mask=mask, other=0.0)
        if gain_ptr is not None:
            row = (part // parts).to(tl.int64)
            if classes_ptr is not None:
                row = tl.load(classes_ptr + row, mask=mask_m, other=0).to(tl.int64)
            exists = (row >= 0) & (row < rows) & mask_m
            gains = gain_ptr + row[:, None] * stride_row + c[None, :]
            gain = tl.load(gains, mask=exists[:, None] & mask_c[None, :], other=float("nan")).to(ACC)
            if ONE:
                gain += 1.0
            d_bias = tl.where(mask, d_bias * gain, 0.0)
            d_gain = tl.where(mask, d_gain * gain, 0.0)
        total += d_bias
        along += d_gain
    tl.store(totals_ptr + c, tl.sum(total, axis=0) * factor, mask=mask_c)
    tl.store(totals_ptr + C + c, tl.sum(along, axis=0) * factor, mask=mask_c)


@triton.jit(do_not_specialize=["parts", "all_parts"])
def _tables_kernel(
    sums_ptr, classes_ptr, d_gain_ptr, d_bias_ptr,  # (2, B * parts, C), (B,) or None, (K, C) or None
    C, parts, all_parts,
    BY_IMAGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    begin, end = 0, all_parts
    if BY_IMAGE:
        begin, end = row * parts, row * parts + parts
    d_gain = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    d_bias = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(begin, end, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        mask_m = part < end
        if classes_ptr is not None:
            mask_m &= tl.load(classes_ptr + part // parts, mask=mask_m, other=-1) == row
        mask = mask_m[:, None] & mask_c[None, :]
        offs = part.to(tl.int64)[:, None] * C + c[None, :]
        d_bias += tl.load(sums_ptr + offs, mask=mask, other=0.0)
        d_gain += tl.load(sums_ptr + all_parts * C + offs, mask=mask, other=0.0)
    offs_out = row.to(tl.int64) * C + c
    if d_gain_ptr is not None:
        tl.store(d_gain_ptr + offs_out, tl.sum(d_gain, axis=0).to(d_gain_ptr.dtype.element_ty), mask=mask_c)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + offs_out, tl.sum(d_bias, axis=0).to(d_bias_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _dx_kernel(
    x_ptr, d_out_ptr, mean_ptr, var_ptr,  # (B, C, N), as x, (C,), (C,)
    gain_ptr, bias_ptr, classes_ptr,  # as forward's
    totals_ptr, d_x_ptr,  # (2, C) or None, as x
    stride_x_b, stride_x_c, stride_x_n,
    eps, C, N, tiles, rows, stride_row,
    ONE: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    b, first, c, mask_c, mask = locate_tile(tl.program_id(0), tiles, N, C, BLOCK_C, BLOCK_N)
    base, offs = offsets_of(b, first, c, stride_x_b, stride_x_c, stride_x_n, BLOCK_N)
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    d_out = tl.load(d_out_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    row = row_of(classes_ptr, b)
    gain, bias = load_affine(gain_ptr, bias_ptr, row, rows, stride_row, c, mask_c, ONE, ACC, BLOCK_C)
    mean, scale = load_channels(mean_ptr, var_ptr, c, mask_c, eps)
    normalised, d_z = _behind_relu(x, d_out, mean, scale, gain, bias, RELU)
    d_x = d_z * gain[:, None]
    if totals_ptr is not None:
        total = tl.load(totals_ptr + c, mask=mask_c, other=0.0)
        along = tl.load(totals_ptr + C + c, mask=mask_c, other=0.0)
        d_x -= total[:, None] + normalised * along[:, None]
    tl.store(d_x_ptr + base + offs, (d_x * scale[:, None]).to(d_x_ptr.dtype.element_ty), mask=mask)


def batch_norm_bwd_sums(
    d_out: Tensor, x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None,
    classes: Tensor | None = None, *, eps: float, relu: bool, one_plus: bool = False,
) -> Tensor:  # fmt: skip
    """Return sums of dz and of dz n, (2, B * parts, C), in the dtype of `mean`; each image has `parts` rows.

    The others are as `batch_norm_fwd`'s; `d_out` has the shape and the strides of `x`.
    """
    op = "batch_norm_bwd_sums"
    rows, stride_row = _checked(op, d_out, x, gain, bias, classes)
    tiling, (B, C) = tiling_of(x, "batch_norm_map"), x.shape[:2]
    share = share_of(tiling.tiles, B * tiling.columns)
    parts = parts_of(tiling.tiles, share)
    sums = mean.new_empty((2, B * parts, C))

    def describe() -> Launch:
        return Launch(
            (B * parts, tiling.columns),
            tiling.config,
            dict(
                eps=float(eps), **tiling.sizes, rows=rows, stride_row=stride_row,
                share=share, parts=parts, all_parts=B * parts,
            ),
            dict(ONE=one_plus, RELU=relu, **tiling.blocks),
            lambda: Needs(flops=6 * x.numel(), bytes_read=size_of(x, d_out), bytes_written=size_of(sums)),
        )  # fmt: skip

    launch(
        op,
        _sums_kernel,
        dict(
            x_ptr=x, d_out_ptr=d_out, mean_ptr=mean, var_ptr=var,
            gain_ptr=gain, bias_ptr=bias, classes_ptr=classes, sums_ptr=sums,
        ),
        (x.shape, is_channels_last(x), rows, stride_row, eps, relu, one_plus, share),
        describe,
    )  # fmt: skip
    return sums


def batch_norm_bwd_totals(
    sums: Tensor,
    x: Tensor,
    gain: Tensor | None,
    classes: Tensor | None = None,
    *,
    factor: float,
    one_plus: bool = False,
) -> Tensor:
    """Return `factor` times the sums over all images of gain dz and gain dz n, (2, C), from `batch_norm_bwd_sums`.

    A factor of 1/(B*H*W) makes them the means that dx needs.
    """
    op = "batch_norm_bwd_totals"
    rows, stride_row = rows_of(op, x, gain, None, classes)
    (B, C), all_parts = x.shape[:2], sums.shape[1]
    totals = sums.new_empty((2, C))

    def describe() -> Launch:
        config = lookup_size("batch_norm_merge", 0)
        return Launch(
            (cdiv(C, config.BLOCK_C),),
            config,
            dict(
                factor=float(factor), C=C, rows=rows, stride_row=stride_row,
                parts=all_parts // B, all_parts=all_parts,
            ),
            dict(ONE=one_plus, BLOCK_C=config.BLOCK_C, BLOCK_M=config.BLOCK_M),
            lambda: Needs(
                flops=2 * sums.numel(), bytes_read=size_of(sums) + B * C * 4, bytes_written=size_of(totals)
            ),
        )  # fmt: skip

    launch(
        op,
        _totals_kernel,
        dict(sums_ptr=sums, gain_ptr=gain, classes_ptr=classes, totals_ptr=totals),
        (B, C, all_parts, rows, stride_row, factor, one_plus),
        describe,
    )
    return totals


def batch_norm_bwd_tables(
    sums: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `gain` and `bias`, in their shapes and dtypes, from `batch_norm_bwd_sums`."""
    op = "batch_norm_bwd_tables"
    d_gain, d_bias = (None if table is None else torch.empty_like(table) for table in (gain, bias))
    table = d_gain if d_gain is not None else d_bias
    if table is None:
        return None, None
    (B, C), all_parts = x.shape[:2], sums.shape[1]
    rows = 1 if table.ndim == 1 else table.shape[0]
    by_image = table.ndim == 2 and classes is None
    classes = None if table.ndim == 1 else classes

    def describe() -> Launch:
        config = lookup_size("batch_norm_tables", 0)
        return Launch(
            (rows, cdiv(C, config.BLOCK_C)),
            config,
            dict(C=C, parts=all_parts // B, all_parts=all_parts),
            dict(
                BY_IMAGE=by_image, BLOCK_C=config.BLOCK_C, BLOCK_M=config.BLOCK_M,
                ACC=triton_dtype(sums.dtype),
            ),
            lambda: Needs(flops=sums.numel(), bytes_read=size_of(sums, classes), bytes_written=size_of(d_gain, d_bias)),
        )  # fmt: skip

    launch(
        op,
        _tables_kernel,
        dict(sums_ptr=sums, classes_ptr=classes, d_gain_ptr=d_gain, d_bias_ptr=d_bias),
        (B, C, all_parts, rows, by_image),
        describe,
    )
    return d_gain, d_bias


def batch_norm_bwd_input(
    d_out: Tensor, x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None,
    classes: Tensor | None, totals: Tensor | None, *, eps: float, relu: bool, one_plus: bool = False,
) -> Tensor:  # fmt: skip
    """Return dx in the dtype and memory format of `x`.

    `totals` (2, C) are the means of `batch_norm_bwd_totals`, or None where the statistics are constants: running
    averages. The others are as `batch_norm_bwd_sums`'.
    """
    op = "batch_norm_bwd_input"
    rows, stride_row = _checked(op, d_out, x, gain, bias, classes)
    tiling, d_x = tiling_of(x, "batch_norm_input"), torch.empty_like(x)

    def describe() -> Launch:
        return Launch(
            (tiling.images * tiling.tiles, tiling.columns),
            tiling.config,
            dict(eps=float(eps), **tiling.sizes, rows=rows, stride_row=stride_row),
            dict(ONE=one_plus, RELU=relu, **tiling.blocks),
            lambda: Needs(flops=8 * x.numel(), bytes_read=size_of(x, d_out, totals), bytes_written=size_of(d_x)),
        )

    launch(
        op,
        _dx_kernel,
        dict(
            x_ptr=x, d_out_ptr=d_out, mean_ptr=mean, var_ptr=var,
            gain_ptr=gain, bias_ptr=bias, classes_ptr=classes, totals_ptr=totals, d_x_ptr=d_x,
        ),
        (x.shape, is_channels_last(x), rows, stride_row, eps, relu, one_plus),
        describe,
    )  # fmt: skip
    return d_x


def _checked(
    op: str, d_out: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None
) -> tuple[int, int]:
    check_shape(op, "d_out", d_out, x.shape, "B, C, H, W")
    if is_channels_last(d_out) != is_channels_last(x):
        raise ValueError(f"{op}: d_out must have the strides of x, {x.stride()}, got {d_out.stride()}")
    return rows_of(op, x, gain, bias, classes)

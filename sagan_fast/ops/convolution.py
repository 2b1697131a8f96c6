"""Convolutions with faster gradients on the CPU: products of matrices where those were measured to be faster.

oneDNN has no fast float32 kernel for the gradient of the weights in channels_last with AVX2. It is half as fast as the
forward. Here the windows of each pixel are copied into the rows of a matrix (im2col), some images at a time, and MKL
multiplies. For few pixels of many channels the same holds for 4x4 convolutions of stride 2 in the other directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.ops.library import LIBRARY, define, is_plain

LEAST_CHANNELS, LEAST_PAIRS = 64, 2**13
"""Channels on each side, and pairs of them, from which the weights' gradient is clearly faster as products.

docs/log.md, "Weights' gradients of convolutions", has the times. With 64 channels on both sides they are about equal.
"""
MANY_PAIRS = 2**18
"""Pairs of channels from which a 4x4 convolution of stride 2 is faster as products in every direction."""
IS_MEASURED = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether this is a processor of the kind that was measured: with AVX-512 oneDNN has other kernels."""
CHUNK, LEAST_ROWS = 2**20, 512
"""Elements and rows of the matrix of windows at a time: what caches hold, but enough rows for each sum."""

define("conv_windows(Tensor x, Tensor weight, int stride) -> Tensor")
define("conv_windows_transpose(Tensor x, Tensor weight, int stride) -> Tensor")
define("conv_windows_weight(Tensor grad, Tensor x, int size, int stride) -> Tensor")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, products: bool = True, rectified: bool = False
) -> Tensor:
    """Return `F.conv2d(x, weight, bias, stride, padding=1)`, differentiable any number of times.

    With `products` as products of matrices where that is faster: `weight` (O, I, 3, 3) with stride 1, or (O, I, 4, 4)
    with stride 2 for `x` (B, I, H, W) of even height and width. If `x` is `rectified`, a ReLU has been written over it
    that autograd does not know: the gradient is that of what `x` held before. `may_be_rectified` must allow it.
    """
    products = products and _is_faster(x, weight, stride)
    if not (products or rectified):
        return F.conv2d(x, weight, bias, stride, 1)
    out: Tensor = _Conv.apply(x, weight, bias, stride, False, products, rectified)
    return out


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, products: bool = True) -> Tensor:
    """Return `F.conv_transpose2d(x, weight, bias, stride=2, padding=1)` for `weight` (I, O, 4, 4), as `conv2d` does."""
    if not (products and _is_faster(x, weight, 2)):
        return F.conv_transpose2d(x, weight, bias, 2, 1)
    out: Tensor = _Conv.apply(x, weight, bias, 2, True, True, False)
    return out


def may_be_rectified(x: Tensor, weight: Tensor) -> bool:
    """Return whether `conv2d` of `x`, or of as large a map, with such a `weight` takes `rectified`.

    On the CPU: the ReLU's gradient is then written over the convolution's, which saves a map at the peak of memory.
    """
    if is_plain() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.ndim == 4 and x.numel() > 0 and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def _is_faster(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether some direction of this convolution is faster as products, as far as it was measured."""
    if not (IS_MEASURED and may_be_rectified(x, weight)):
        return False
    if (stride, *weight.shape[2:]) not in ((1, 3, 3), (2, 4, 4)) or x.shape[2] % stride or x.shape[3] % stride:
        return False
    has_gradient = torch.is_grad_enabled() and weight.requires_grad
    return _is_all_products(weight) or has_gradient and _is_weight_product(weight)


def _is_all_products(weight: Tensor) -> bool:
    """Return whether both directions between the maps are faster as products too."""
    return weight.shape[2] == 4 and weight.shape[0] * weight.shape[1] >= MANY_PAIRS


def _is_weight_product(weight: Tensor) -> bool:
    return min(weight.shape[:2]) >= LEAST_CHANNELS and weight.shape[0] * weight.shape[1] >= LEAST_PAIRS


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, transposed: bool, products: bool,
        rectified: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.form = [stride] * 2, [1, 1], [1, 1], transposed, [0, 0], 1
        ctx.products, ctx.rectified = products, rectified
        if not (products and _is_all_products(weight)):
            return torch.ops.aten.convolution.default(x, weight, bias, *ctx.form)
        out = _transpose(x, weight, stride) if transposed else _forward(x, weight, stride)
        return out if bias is None else out.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # PyTorch knows the derivatives of its own backward
            before = F.relu(x) if ctx.rectified else x  # the same numbers, but their gradient passes a ReLU
            d_x, *rest = _by_pytorch(grad, before, weight, ctx.bias_sizes, *ctx.form, wanted)
            d_x = _through_relu(d_x, x, 0) if ctx.rectified and wanted[0] else d_x
            return d_x, *rest, None, None, None, None
        if ctx.products and _is_weight_product(weight):
            d_x, *rest = _by_products(ctx, grad, x, weight, wanted)
        else:
            d_x, *rest = _by_pytorch(grad, x, weight, ctx.bias_sizes, *ctx.form, wanted)
        if ctx.rectified and wanted[0]:
            _through_relu(d_x, x, 0, grad_input=d_x)
        return d_x, *rest, None, None, None, None


def _by_products(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    (stride, _), _, _, transposed, _, _ = ctx.form
    d_x = d_weight = None
    if wanted[0] and _is_all_products(weight):
        d_x = _forward(grad, weight, stride) if transposed else _transpose(grad, weight, stride)
    elif wanted[0]:
        d_x = _by_pytorch(grad, x, weight, None, *ctx.form, [True, False, False])[0]
    if wanted[1]:
        d_weight = _weight(*((x, grad) if transposed else (grad, x)), weight.shape[2], stride)
    return d_x, d_weight, grad.sum((0, 2, 3)) if wanted[2] else None  # PyTorch's d_bias costs a d_weight


_through_relu = torch.ops.aten.threshold_backward
_by_pytorch = torch.ops.aten.convolution_backward.default
_forward = torch.ops.sagan_fast.conv_windows.default
_transpose = torch.ops.sagan_fast.conv_windows_transpose.default
_weight = torch.ops.sagan_fast.conv_windows_weight.default


@torch.library.impl(LIBRARY, "conv_windows", "CPU")
def _forward_on_cpu(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the convolution of `x` (B, C, H, W) with `weight` (D, C, k, k), padding 1, in channels_last."""
    (B, _, H, W), D = x.shape, weight.shape[0]
    out = torch.empty((B, D, H // stride, W // stride), dtype=x.dtype, memory_format=torch.channels_last)
    pixels, matrix = _pixels(out), _matrix(weight).t()
    for rows, windows in _windows(x, weight.shape[2], stride):
        torch.mm(windows, matrix, out=pixels[rows])
    return out


@torch.library.impl(LIBRARY, "conv_windows_transpose", "CPU")
def _transpose_on_cpu(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the transposed convolution of `x` (B, D, H, W) with `weight` (D, C, k, k), padding 1, in channels_last."""
    (B, _, H, W), (C, size) = x.shape, weight.shape[1:3]
    out = x.new_zeros(B, H * stride + 2, W * stride + 2, C)
    pixels, matrix = _pixels(x), _matrix(weight)
    step = _images(H * W, size * size * C)
    for first in range(0, B, step):
        images = slice(first, first + step)
        windows = (pixels[first * H * W : (first + step) * H * W] @ matrix).view(-1, H, W, size, size, C)
        for i in range(size):
            for j in range(size):
                place = out[images, i : i + stride * H : stride, j : j + stride * W : stride]
                place.add_(windows[:, :, :, i, j])
    return out[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "conv_windows_weight", "CPU")
def _weight_on_cpu(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """Return the gradient (D, C, k, k) of the weight from `grad` (B, D, H/stride, W/stride) and `x` (B, C, H, W)."""
    D, C = grad.shape[1], x.shape[1]
    pixels, out = _pixels(grad), x.new_zeros(D, size * size * C)
    for rows, windows in _windows(x, size, stride):
        out.addmm_(pixels[rows].t(), windows)
    return out.view(D, size, size, C).permute(0, 3, 1, 2)


def _windows(x: Tensor, size: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the matrix of windows of `x`, (pixels of the result, size * size * C), and which they are."""
    B, C, H, W = x.shape
    height, width = H // stride, W // stride
    step = min(B, _images(height * width, size * size * C))
    padded = x.new_zeros(step, H + 2, W + 2, C)
    b, h, w, c = padded.stride()
    windows = padded.as_strided((step, height, width, size, size, C), (b, stride * h, stride * w, h, w, c))
    for first in range(0, B, step):
        count = min(step, B - first)
        padded[:count, 1:-1, 1:-1] = x[first : first + count].permute(0, 2, 3, 1)
        rows = slice(first * height * width, (first + count) * height * width)
        yield rows, windows[:count].reshape(count * height * width, size * size * C)


def _images(pixels: int, width: int) -> int:
    """Return how many images of so many `pixels` make a good matrix of windows of `width` elements."""
    return max(1, max(LEAST_ROWS, CHUNK // width) // pixels)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)

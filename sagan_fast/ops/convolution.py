"""Convolutions with faster gradients on the CPU: products of matrices where those were measured to be faster.

oneDNN has no fast float32 kernel for the gradient of the weights in channels_last with AVX2. It is half as fast as the
forward. Here the windows of each pixel are copied into the rows of a matrix (im2col), some images at a time, and
PyTorch multiplies. Between small maps of many channels the other directions of a 4x4 convolution are faster so too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.ops.library import LIBRARY, define, is_executed, is_plain
from sagan_fast.ops.remade import Remade

LEAST_CHANNELS, LEAST_PAIRS = 64, 2**13
"""Channels on each side, and pairs of them, from which the weights' gradient is clearly faster as products.

docs/log.md, "Weights' gradients of convolutions", has the times. With 64 channels on both sides small maps gain none.
"""
MANY_PAIRS, MOST_PIXELS = 2**18, 1024
"""Pairs of channels, and pixels of the smaller map over all images, for which a 4x4 one is faster in each direction."""
MOST_WINDOWS = 2**23
"""Elements of one image's windows up to which products are taken: above, they would need much memory."""
IS_MEASURED = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether this is a processor of the kind that was measured: with AVX-512 oneDNN has other kernels."""
CHUNK, LEAST_ROWS = 2**20, 512
"""Elements and rows of the matrix of windows at a time: what caches hold, but enough rows for each sum."""

define("conv_windows(Tensor x, Tensor weight, int stride) -> Tensor")
define("conv_windows_transpose(Tensor x, Tensor weight, int stride) -> Tensor")
define("conv_windows_weight(Tensor grad, Tensor x, int size, int stride) -> Tensor")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, products: bool = True, rectified: bool = False,
    remade: Remade | None = None,
) -> Tensor:  # fmt: skip
    """Return `F.conv2d(x, weight, bias, stride, padding=1)`, differentiable any number of times.

    With `products` as products of matrices where that is faster: `weight` (O, I, 3, 3) with stride 1, or (O, I, 4, 4)
    with stride 2 for `x` (B, I, H, W) of even height and width. `rectified` says that the caller has applied ReLU to
    `x` in place, hidden from autograd, where `can_hide_relu` allows it. The gradient of `x` then includes the ReLU's.
    With `remade` the op does not keep `x`, and gets it from `remade` in its backward pass.
    """
    form = _form(x, weight, bias, stride, False, products)
    if not (form.has_products or rectified or remade):
        return F.conv2d(x, weight, bias, stride, 1)
    out: Tensor = _Conv.apply(x, weight, bias, form, rectified, remade)
    return out


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, products: bool = True, remade: Remade | None = None
) -> Tensor:
    """Return `F.conv_transpose2d(x, weight, bias, stride=2, padding=1)` for `weight` (I, O, 4, 4), as `conv2d` does."""
    form = _form(x, weight, bias, 2, True, products)
    if not (form.has_products or remade):
        return F.conv_transpose2d(x, weight, bias, 2, 1)
    out: Tensor = _Conv.apply(x, weight, bias, form, False, remade)
    return out


def can_hide_relu(x: Tensor) -> bool:
    """Return whether a ReLU of `x` in place can be hidden from autograd, and left to the `conv2d` behind it.

    `conv2d` writes the ReLU's gradient over its own gradient of `x`. That saves a map at the peak of memory. Only on
    the CPU, without autocast, and neither in a transform nor while compiling.
    """
    if is_plain() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.ndim == 4 and x.numel() > 0 and x.dtype in (torch.float32, torch.float64)


class _Form(NamedTuple):
    """A convolution: its stride and direction, and what of it is faster as products."""

    stride: int
    transposed: bool
    weight_by_products: bool = False
    all_by_products: bool = False

    @property
    def has_products(self) -> bool:
        return self.weight_by_products or self.all_by_products

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The last arguments of `aten::convolution` and its backward."""
        return [self.stride] * 2, [1, 1], [1, 1], self.transposed, [0, 0], 1


def _form(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, transposed: bool, products: bool) -> _Form:
    """Return what is faster as products, as far as it was measured: where PyTorch's result is in channels_last."""
    plain = _Form(stride, transposed)
    if not (products and IS_MEASURED and can_hide_relu(x) and x.dtype == weight.dtype):
        return plain
    if (stride, *weight.shape[2:]) not in ((1, 3, 3), (2, 4, 4)) or x.shape[1] != weight.shape[0 if transposed else 1]:
        return plain
    if bias is not None and bias.shape != weight.shape[1 if transposed else 0 :][:1]:
        return plain
    B, _, H, W = x.shape
    if not any(each.is_contiguous(memory_format=torch.channels_last) for each in (x, weight)):
        return plain
    if not transposed and (H % stride or W % stride):
        return plain
    pixels = H * W if transposed else H // stride * (W // stride)  # of the smaller map
    channels, pairs = weight.shape[1], weight.shape[0] * weight.shape[1]
    if pixels * weight[0].numel() > MOST_WINDOWS:
        return plain
    by_weight = min(weight.shape[0], channels) >= LEAST_CHANNELS and pairs >= LEAST_PAIRS
    has_gradient = torch.is_grad_enabled() and weight.requires_grad
    everything = weight.shape[2] == 4 and pairs >= MANY_PAIRS and B * pixels <= MOST_PIXELS
    return _Form(stride, transposed, by_weight and (has_gradient or everything), everything)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, form: _Form, rectified: bool, remade: Remade | None
    ) -> Tensor:
        ctx.save_for_backward(None if remade else x, weight, *(remade.tensors if remade else ()))
        ctx.remade = remade and remade._replace(tensors=())  # what is saved is freed with the graph
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.form, ctx.rectified = form, rectified
        if not form.all_by_products:
            return torch.ops.aten.convolution.default(x, weight, bias, *form.arguments)
        out = (_transpose if form.transposed else _forward)(x, weight, form.stride)
        return out if bias is None else out.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, *kept = ctx.saved_tensors
        form = ctx.form
        # compiled autograd knows no nodes
        wanted = list(ctx.needs_input_grad[:3]) if torch.compiler.is_compiling() else _wanted(ctx)
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad)
        if ctx.remade:
            x = ctx.remade.result(kept, links=torch.is_grad_enabled() and wanted[1])
        if torch.is_grad_enabled() or is_batched or is_plain():  # PyTorch differentiates and batches its own backward
            # ReLU changes no number of x here. It is there for the second derivatives.
            before = F.relu(x) if ctx.rectified else x
            d_x, *rest = _by_pytorch(grad, before, weight, ctx.bias_sizes, *form.arguments, wanted)
            d_x = _through_relu(d_x, x, 0) if ctx.rectified and wanted[0] else d_x
            return d_x, *rest, None, None, None
        if form.weight_by_products:
            d_x, *rest = _by_products(form, grad, x, weight, wanted)
        else:
            d_x, *rest = _by_pytorch(grad, x, weight, ctx.bias_sizes, *form.arguments, wanted)
        if ctx.rectified and wanted[0]:
            _through_relu(d_x, x, 0, grad_input=d_x)
        return d_x, *rest, None, None, None


def _wanted(ctx: Any) -> list[bool]:
    """Return for x, weight and bias whether this backward pass needs its gradient; `needs_input_grad` is of all passes.

    An R1 penalty asks for the gradient of the images alone.
    """
    nodes = [node for node, _ in ctx.next_functions]
    return [
        needed and is_executed(node) for needed, node in zip(ctx.needs_input_grad, [*nodes, None][:3], strict=False)
    ]


def _by_products(form: _Form, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    d_x = d_weight = None
    if wanted[0] and form.all_by_products:
        d_x = (_forward if form.transposed else _transpose)(grad, weight, form.stride)
    elif wanted[0]:
        d_x = _by_pytorch(grad, x, weight, None, *form.arguments, [True, False, False])[0]
    if wanted[1]:
        d_weight = _weight(*((x, grad) if form.transposed else (grad, x)), weight.shape[2], form.stride)
    # PyTorch computes the weights' gradient to get that of the bias (findings/conv_bias_gradient.sh).
    return d_x, d_weight, grad.sum((0, 2, 3)) if wanted[2] else None


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
        rows = pixels[first * H * W : (first + step) * H * W]
        # not @, which autocast would round
        windows = torch.mm(rows, matrix, out=rows.new_empty(len(rows), matrix.shape[1])).view(-1, H, W, size, size, C)
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


@torch.library.register_fake("sagan_fast::conv_windows", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _forward_fake(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    B, _, H, W = x.shape
    out = x.new_empty(B, weight.shape[0], H // stride, W // stride)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("sagan_fast::conv_windows_transpose", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _transpose_fake(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    B, _, H, W = x.shape
    out = x.new_empty(B, weight.shape[1], H * stride, W * stride)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("sagan_fast::conv_windows_weight", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _weight_fake(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    out = x.new_empty(grad.shape[1], x.shape[1], size, size)
    return out.contiguous(memory_format=torch.channels_last)

"""A 3x3 convolution and the resizing beside it as one convolution of 4x4 weights and stride 2: 16 products, not 36.

Nearest up-sampling by 2 and then a 3x3 convolution with zero padding 1 is a transposed convolution, and a 3x3
convolution with padding 1 and then 2x2 average pooling is a convolution, both 4x4, stride 2, padding 1. Border and odd
sizes included. Along an axis the weights (a, b, c) become (c, b + c, a + b, a), and (a, a + b, b + c, c) / 2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from sagan_fast.ops.convolution import conv2d, conv_transpose2d
from sagan_fast.ops.library import is_transformed
from sagan_fast.ops.remade import Remade

Direction = Literal["up", "down"]

LEAST_PIXELS = {torch.float32: 64, torch.float64: 1}
"""On the CPU: the pixels of the small map, over all images, from which the folded form was measured to be faster.

Batch 4 at 4x4 is the least that was (docs/log.md, "Resizing folded into convolutions"; benchmarks/bench_resized_conv.py
and bench_train_step.py). In float64 nobody trains for speed: tests use it.
"""


def is_folded(x: Tensor, direction: Direction) -> bool:
    """Return whether the folded form is the faster one for `x` (B, C, H, W), as far as it was measured.

    It was on the CPU. On a GPU it is not measured, and an exported or traced graph is one of plain layers: False.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    if x.dtype not in LEAST_PIXELS or torch.is_autocast_enabled("cpu"):
        return False
    return x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS[x.dtype] * (4 if direction == "down" else 1)


def up_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, products: bool = True, remade: Remade | None = None
) -> Tensor:
    """Return conv2d(x up-sampled, w, bias, padding=1), (B, O, 2H, 2W), with `weight` = `folded(w, "up")`."""
    return conv_transpose2d(x, weight, bias, products, remade)


def conv2d_down(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, products: bool = True, rectified: bool = False
) -> Tensor:
    """Return conv2d(x, w, bias, padding=1) average-pooled, (B, O, H//2, W//2), with `weight` = `folded(w, "down")`.

    `products`, `rectified` and `remade` are as in ops.convolution, here and in `up_conv2d`.
    """
    return conv2d(x, weight, bias, 2, products, rectified)


def folded(weight: Tensor, direction: Direction, value: Tensor | None = None) -> Tensor:
    """Return the 4x4 weights of the 3x3 `weight` (O, I, 3, 3): (I, O, 4, 4) for "up", (O, I, 4, 4) for "down".

    A linear map of nine numbers to sixteen; differentiable any number of times, and in forward mode. A `value` that
    was computed before, of the same weight, is taken and put into the graph of `weight`.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"folded: weight must have shape (O, I, 3, 3), got {tuple(weight.shape)}")
    if torch.compiler.is_compiling() or is_transformed() or not (torch.is_grad_enabled() and weight.requires_grad):
        return _folded(weight, direction) if value is None else value
    if value is None:
        with torch.no_grad():
            value = _folded(weight, direction)
    out: Tensor = _Folded.apply(weight, value, direction)
    return out


class _Folded(torch.autograd.Function):
    """Puts weights already folded into the graph of the 3x3 ones, for any number of backwards."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight: Tensor, value: Tensor, direction: Direction
    ) -> Tensor:
        ctx.direction = direction  # type: ignore[attr-defined]
        return value.detach()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _unfolded(grad, ctx.direction), None, None  # type: ignore[attr-defined]


def _taps(like: Tensor, direction: Direction) -> Tensor:
    """Return (16, 9): which of the nine weights are summed to each of the sixteen."""
    rows = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    if direction == "up":
        rows = rows[::-1]
    scale = 1.0 if direction == "up" else 0.25
    taps = [[scale * a * b for a in row for b in column] for row in rows for column in rows]
    return torch.tensor(taps, dtype=like.dtype, device=like.device)  # `new_tensor` refuses batches of gradients


def _folded(weight: Tensor, direction: Direction) -> Tensor:
    if direction == "up":
        weight = weight.transpose(0, 1)
    return _mapped(weight, _taps(weight, direction), 4)


def _unfolded(grad: Tensor, direction: Direction) -> Tensor:
    out = _mapped(grad, _taps(grad, direction).t(), 3)
    return out.transpose(0, 1) if direction == "up" else out


def _exactly(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast: sums of weights are kept, and have the weights' own precision."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _mapped(weight: Tensor, taps: Tensor, size: int) -> Tensor:
    """Return `taps` (n, k) applied to the last two axes of `weight` (A, B, ., .), k numbers: (A, B, size, size).

    The result is channels_last unless `weight` is contiguous.
    """
    A, B = weight.shape[:2]
    with _exactly(weight.device.type):
        if weight.is_contiguous():
            return (weight.reshape(A * B, -1) @ taps.t()).view(A, B, size, size)
        pixels = weight.permute(0, 2, 3, 1).reshape(A, -1, B)
        # not matmul, which would copy the weights to make two matrices of them
        return torch.bmm(taps.expand(A, -1, -1), pixels).view(A, size, size, B).permute(0, 3, 1, 2)

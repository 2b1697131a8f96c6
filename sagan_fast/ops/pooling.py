"""Average pooling that keeps nothing for backward, where PyTorch's keeps its whole input for the shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.ops.library import is_plain


def avg_pool2d(x: Tensor) -> Tensor:
    """Return `F.avg_pool2d(x, 2)`, differentiable any number of times. On the CPU it keeps nothing for backward."""
    if x.device.type != "cpu" or x.ndim != 4 or is_plain():
        return F.avg_pool2d(x, 2)
    out: Tensor = _AvgPool2d.apply(x)
    return out


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rest = x.shape[-1] % 2, x.shape[-2] % 2
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        d_x = F.interpolate(0.25 * grad, scale_factor=2, mode="nearest")
        right, below = ctx.rest
        return F.pad(d_x, (0, right, 0, below)) if right or below else d_x

"""Conditional batch norm and ReLU on the CPU, forward and backward, some images at a time, in PyTorch's operators.

With s = gain/sqrt(var + eps) the output is s x + (bias - mean s), one pass over x and one for the ReLU. The gradient is
that of backward.py; a share of the images passes through the caches for all of its operators. Beside x and the
statistics only the output is kept, for the ReLU's mask. Oracle: autograd through `reference.batch_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHARE_ELEMENTS = 2**19
"""Of a map, that its operators take together: 2 MB, what the caches hold. Smaller shares cost more calls."""


def runs_on(x: Tensor) -> bool:
    """Return whether `x` is a map of single or double precision on the CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def batch_norm_moments(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of `x` (B, C, H, W), (C,) each, in its dtype.

    `running_mean` and `running_var` (C,) are moved in place by the share `momentum` towards the mean and the unbiased
    variance.
    """
    running = running_mean, running_var
    own = [None if kept is None else kept.to(x.dtype) for kept in running]
    mean, var = torch.batch_norm_update_stats(x, own[0], own[1], momentum)
    for kept, moved in zip(running, own, strict=True):
        if kept is not None and moved is not None and kept is not moved:
            kept.copy_(moved)
    return mean, var


def batch_norm_fwd(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    *, eps: float, relu: bool, one_plus: bool,
) -> Tensor:  # fmt: skip
    """Return gain * (x - mean)/sqrt(var + eps) + bias, in the dtype and memory format of `x`: see forward.py."""
    scale = (var + eps).rsqrt_() * _rows(gain, classes, x, one_plus)
    shift = mean * -scale
    if bias is not None:
        shift = _rows(bias, classes, x) + shift
    out = torch.empty_like(x)
    for some in _shares(x):
        torch.addcmul(_of(shift, some), x[some], _of(scale, some), out=out[some])
        if relu:
            out[some].relu_()
    return out


def batch_norm_bwd(
    d_out: Tensor, x: Tensor, out: Tensor | None, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None,
    classes: Tensor | None, *, eps: float, one_plus: bool, wanted: Sequence[bool],
    means_of: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return dx, d_gain and d_bias, those that are `wanted`: see backward.py.

    `out` is the result of the ReLU, None without one. `means_of` makes the means over the batch of the sums (2, C) of
    gain dz and gain dz n, in that order; it is None where mean and var are not the batch's.
    """
    scale = (var + eps).rsqrt_()
    factor = _rows(gain, classes, x, one_plus)
    d_z, sums = _behind_relu(d_out, x, out, mean, scale)
    d_gain = _of_table(sums[1], gain, classes) if wanted[1] and gain is not None else None
    d_bias = _of_table(sums[0], bias, classes) if wanted[2] and bias is not None else None
    if not wanted[0]:
        return None, d_gain, d_bias
    means = None if means_of is None else means_of((sums * factor).sum(1))
    factor = factor * scale
    if means is not None:
        slope = means[1] * scale * -scale
        level = (mean * -slope - means[0] * scale)[:, None, None]
        slope = slope[:, None, None]
    for some in _shares(x):
        d = d_z[some].mul_(_of(factor, some))
        if means is not None:
            d.add_(level).addcmul_(x[some], slope)
    return d_z, d_gain, d_bias


def _behind_relu(
    d_out: Tensor, x: Tensor, out: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dz (B, C, H, W), and the sums of dz and dz n by image, (2, B, C)."""
    d_z, sums = torch.empty_like(x), x.new_empty(2, *x.shape[:2])
    middle = mean[:, None, None]
    for some in _shares(x):
        d = d_z[some]
        if out is None:
            d.copy_(d_out[some])
        else:
            torch.ops.aten.threshold_backward.grad_input(d_out[some], out[some], 0, grad_input=d)
        torch.sum(d, (2, 3), out=sums[0, some])
        torch.sum((x[some] - middle).mul_(d), (2, 3), out=sums[1, some])
    sums[1].mul_(scale)
    return d_z, sums


def _of_table(rows: Tensor, table: Tensor, classes: Tensor | None) -> Tensor:
    """Return the gradient of `table`, (C,), (B, C) or (K, C) with `classes` (B,), from `rows` (B, C) by image."""
    if classes is not None:
        return torch.zeros_like(table, dtype=rows.dtype).index_add_(0, classes, rows).to(table.dtype)
    return (rows.clone() if table.ndim == 2 else rows.sum(0)).to(table.dtype)


def _rows(table: Tensor | None, classes: Tensor | None, x: Tensor, one_plus: bool = False) -> Tensor:
    """Return the gains or biases by image, (B, C) or (1, C) for all."""
    if table is None:
        return x.new_ones(1, x.shape[1])
    rows = (table if classes is None else torch.embedding(table, classes)).to(x.dtype)
    rows = rows if rows.ndim == 2 else rows[None]
    return 1 + rows if one_plus else rows


def _of(rows: Tensor, some: slice) -> Tensor:
    return (rows if len(rows) == 1 else rows[some])[:, :, None, None]


def _shares(x: Tensor) -> Sequence[slice]:
    """Return which images are taken together."""
    each = max(1, SHARE_ELEMENTS * len(x) // max(1, x.numel()))
    return [slice(first, first + each) for first in range(0, len(x), each)]

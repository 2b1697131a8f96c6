"""Conditional batch norm and ReLU in plain PyTorch, differentiable as often as one likes.

Source: Ioffe & Szegedy 2015, algorithm 1; gains and biases by class: Dumoulin et al. 2017, equation 5, and the released
SAGAN's ops.py:304-360. `one_plus` is the form of BigGAN-PyTorch (layers.py, ccbn) and PyTorch-StudioGAN (ops.py).
"""

import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of `x` (B, C, H, W) by channel, (C,) each."""
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


def by_image(table: Tensor | None, classes: Tensor | None, default: float) -> Tensor | float:
    """Return a gain or bias, (C,), (B, C) or a table (K, C) for `classes` (B,), to be used beside (B, C, H, W)."""
    if table is None:
        return default
    rows = table if classes is None else table[classes]
    return rows[..., None, None]


def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None, classes: Tensor | None,
    *, eps: float, relu: bool, one_plus: bool,
) -> Tensor:  # fmt: skip
    """Return gain * (x - mean)/sqrt(var + eps) + bias, (B, C, H, W), its negative part 0 with `relu`.

    `mean` and `var` (C,) are those of `moments`, or running averages. With `one_plus` the factor is 1 + gain.
    """
    normalised = (x - mean[:, None, None]) / (var + eps).sqrt()[:, None, None]
    factor = by_image(gain, classes, 1.0) + (1.0 if one_plus and gain is not None else 0.0)
    out = factor * normalised + by_image(bias, classes, 0.0)
    return out.relu() if relu else out

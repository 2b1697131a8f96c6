"""Batch norm whose gain and bias are looked up by class (Dumoulin et al. 2017; the released SAGAN's ops.py:304-360)."""

import torch
from torch import Tensor, nn


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and bias for each class: gain[y] * batch_norm(x) + bias[y], (B, C, H, W).

    Gains start at 1 and biases at 0. `num_classes` 0 gives plain batch norm with a learned gain and bias, and ignores
    `y`. Keep spectral norm off the tables: one sigma over all classes would limit every gain. Training uses the
    statistics of the batch and updates running averages with `momentum`, the weight of the new batch; evaluation uses
    the running averages. A floating `y` (B, num_classes) mixes the gains and biases of the classes with its weights.
    Raises ValueError if classes are asked for and `y` is None, and for weights of another shape.
    """

    def __init__(self, channels: int, num_classes: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.norm = nn.BatchNorm2d(channels, eps=eps, momentum=momentum, affine=num_classes == 0)
        if num_classes > 0:
            self.gain = nn.Embedding(num_classes, channels)
            self.bias = nn.Embedding(num_classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the normalised `x` (B, C, H, W), in its dtype, for classes `y` (B,) int64, or weights of them."""
        normalised: Tensor = self.norm(x)
        if self.num_classes == 0:
            return normalised
        if y is None:
            raise ValueError(
                f"ConditionalBatchNorm2d: y must give one of {self.num_classes} classes an image, got None"
            )
        mixed = y.is_floating_point()
        if mixed and y.shape[1:] != (self.num_classes,):
            shape = f"(B, {self.num_classes})"
            raise ValueError(f"ConditionalBatchNorm2d: weights y must have shape {shape}, got {tuple(y.shape)}")
        gain = y @ self.gain.weight if mixed else self.gain(y)
        bias = y @ self.bias.weight if mixed else self.bias(y)
        gain, bias = (each.to(x.dtype)[:, :, None, None] for each in (gain, bias))
        return torch.addcmul(bias, gain, normalised)

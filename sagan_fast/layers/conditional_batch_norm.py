"""Batch norm whose gain and bias are looked up by class (Dumoulin et al. 2017; the released SAGAN's ops.py:304-360)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.layers.batch_norm import fused
from sagan_fast.layers.effective_weight import is_watched


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and bias for each class: gain[y] * batch_norm(x) + bias[y], (B, C, H, W).

    Gains start at 1 and biases at 0. `num_classes` 0 gives plain batch norm with a learned gain and bias, and ignores
    `y`. Keep spectral norm off the tables: one sigma over all classes would limit every gain. Training uses the
    statistics of the batch and updates running averages with `momentum`, the weight of the new batch; evaluation uses
    the running averages. A floating `y` (B, num_classes) mixes the gains and biases of the classes with its weights.
    On CUDA all of it is one op in each direction. Raises ValueError if classes are asked for and `y` is None, and for
    weights of another shape.
    """

    def __init__(self, channels: int, num_classes: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.backend = "auto"
        self.norm = nn.BatchNorm2d(channels, eps=eps, momentum=momentum, affine=num_classes == 0)
        if num_classes > 0:
            self.gain = nn.Embedding(num_classes, channels)
            self.bias = nn.Embedding(num_classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(
        self, x: Tensor, y: Tensor | None = None, relu: bool = False, in_place: bool = False, remakes: bool = False
    ) -> Tensor:
        """Return the normalised `x` (B, C, H, W), in its dtype, for classes `y` (B,) int64, or weights of them.

        With `relu` its negative part is zero, with `in_place` in memory that the layer itself has made. `backend`, an
        attribute, is as in `functional.conditional_batch_norm`, `remakes` as in `ops.batch_norm.Options`.
        """
        gain, bias, classes = self._tables(x, y)
        out = fused(self.norm, x, gain, bias, classes, relu=relu, backend=self.backend, remakes=remakes)
        if out is None:
            out = self.norm(x)
            if self.num_classes > 0:
                if classes is not None:
                    gain, bias = self.gain(classes), self.bias(classes)
                gain, bias = (each.to(x.dtype)[:, :, None, None] for each in (gain, bias))
                out = torch.addcmul(bias, gain, out)
            if relu:
                out = F.relu(out, inplace=in_place and not is_watched(self.norm))
        return out

    def _tables(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return gains and biases by image, or the tables and the classes to look up."""
        if self.num_classes == 0:
            return self.norm.weight, self.norm.bias, None
        if y is None:
            raise ValueError(
                f"ConditionalBatchNorm2d: y must give one of {self.num_classes} classes an image, got None"
            )
        if y.is_floating_point():
            if y.shape[1:] != (self.num_classes,):
                shape = f"(B, {self.num_classes})"
                raise ValueError(f"ConditionalBatchNorm2d: weights y must have shape {shape}, got {tuple(y.shape)}")
            return y @ self.gain.weight, y @ self.bias.weight, None
        if type(self.gain) is type(self.bias) is nn.Embedding and not (is_watched(self.gain) or is_watched(self.bias)):
            return self.gain.weight, self.bias.weight, y
        return self.gain(y), self.bias(y), None  # a parametrised table must be computed once

"""Batch norm whose gain and bias are looked up by class (Dumoulin et al. 2017; the released SAGAN's ops.py:304-360)."""

from torch import Tensor, nn


class ConditionalBatchNorm2d(nn.Module):
    """gain[y] * batch_norm(x) + bias[y], (B, C, H, W), from tables of one row a class, gains at 1 and biases at 0.

    `num_classes` 0 gives plain batch norm with a learned gain and bias, and `y` is not looked at. No spectral norm
    belongs on the tables: one sigma over all classes would cap every gain. Statistics are those of the batch in
    training (running averages kept with `momentum`, the share of the new batch) and the running averages in eval.
    A floating `y` (B, num_classes) holds weights of the classes: gain and bias are mixed by them, and a row of one 1
    is that class. Raises ValueError if classes are asked for and `y` is None, and for weights of another shape.
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
                f"ConditionalBatchNorm2d: y must be given, one of {self.num_classes} classes an image, got None"
            )
        mixed = y.is_floating_point()
        if mixed and y.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"ConditionalBatchNorm2d: y must hold a weight for each class, (B, {self.num_classes}), "
                f"got {tuple(y.shape)}"
            )
        gain = (y @ self.gain.weight if mixed else self.gain(y)).to(x.dtype)[:, :, None, None]
        bias = (y @ self.bias.weight if mixed else self.bias(y)).to(x.dtype)[:, :, None, None]
        out: Tensor = gain * normalised + bias
        return out

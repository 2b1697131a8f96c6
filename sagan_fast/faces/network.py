"""FaceBoxes, a face detector for one processor core (Zhang et al., IJCB 2017, https://arxiv.org/abs/1708.05234).

The layers, their names and their order are those of the PyTorch port whose weights are published
(https://github.com/zisianw/FaceBoxes.PyTorch, models/faceboxes.py, MIT licence): a state dict of either fits the other.
"""

from __future__ import annotations

from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.faces.weights import read_weights

ANCHORS_OF_A_CELL = (21, 1, 1)
"""Anchors at each position of the three feature maps; `boxes.anchors` says which."""


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class CRelu(BasicConv2d):
    """Convolution without bias, batch norm, and ReLU of the result and of its negative: twice the channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(torch.cat([x, -x], 1))


class Inception(nn.Module):
    """Four branches of 32 channels over 128, with receptive fields of 1, 3, 3 and 5 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(128, 32, 1)
        self.branch1x1_2 = BasicConv2d(128, 32, 1)
        self.branch3x3_reduce = BasicConv2d(128, 24, 1)
        self.branch3x3 = BasicConv2d(24, 32, 3)
        self.branch3x3_reduce_2 = BasicConv2d(128, 24, 1)
        self.branch3x3_2 = BasicConv2d(24, 32, 3)
        self.branch3x3_3 = BasicConv2d(32, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.branch1x1_2(F.avg_pool2d(x, 3, 1, 1))
        deep = self.branch3x3_3(self.branch3x3_2(self.branch3x3_reduce_2(x)))
        return torch.cat([self.branch1x1(x), pooled, self.branch3x3(self.branch3x3_reduce(x)), deep], 1)


class FaceBoxes(nn.Module):
    """The network: 1,007,330 parameters, 174 entries in its state dict, strides 32, 64 and 128.

    It starts from the random weights of the published training: normal with deviation 0.01 where a batch norm follows,
    Xavier in the heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = CRelu(3, 24, 7, 4)
        self.conv2 = CRelu(48, 64, 5, 2)
        self.inception1, self.inception2, self.inception3 = Inception(), Inception(), Inception()
        self.conv3_1, self.conv3_2 = BasicConv2d(128, 128, 1), BasicConv2d(128, 256, 3, 2)
        self.conv4_1, self.conv4_2 = BasicConv2d(256, 128, 1), BasicConv2d(128, 256, 3, 2)
        heads = list(zip((128, 256, 256), ANCHORS_OF_A_CELL, strict=True))
        self.loc = nn.Sequential(*(nn.Conv2d(channels, 4 * count, 3, padding=1) for channels, count in heads))
        self.conf = nn.Sequential(*(nn.Conv2d(channels, 2 * count, 3, padding=1) for channels, count in heads))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module.bias is None:
                    nn.init.normal_(module.weight, 0, 0.01)
                else:
                    nn.init.xavier_normal_(module.weight)
                    nn.init.constant_(module.bias, 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc (B, A, 4) and conf (B, A, 2) of the images `x` (B, 3, H, W), any H and W.

        `x` is blue, green, red in 0 to 255 minus `images.MEAN`. loc holds box codes relative to the A anchors that
        `boxes.anchors(H, W)` lists in the same order. conf is for background and face: probabilities in evaluation,
        their logits in training.
        """
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = F.max_pool2d(self.conv2(x), 3, 2, 1)
        first = self.inception3(self.inception2(self.inception1(x)))
        second = self.conv3_2(self.conv3_1(first))
        third = self.conv4_2(self.conv4_1(second))
        maps = (first, second, third)
        loc, conf = (
            torch.cat([_by_anchor(head(x), width) for head, x in zip(heads, maps, strict=True)], 1)
            for heads, width in ((self.loc, 4), (self.conf, 2))
        )
        return loc, conf if self.training else conf.softmax(-1)

    def load_weights(self, path: str | PathLike[str]) -> FaceBoxes:
        """Load the weights in the file `path`, as published or as `faces train` writes them, and return the network.

        Raises InputError for a file that is missing or holds anything else, in a sentence that says where the published
        file is described.
        """
        self.load_state_dict(read_weights(path, self.state_dict()))
        return self


def _by_anchor(found: Tensor, width: int) -> Tensor:
    """Return a head's output (B, C, H, W) as (B, H * W * C / width, width)."""
    return found.permute(0, 2, 3, 1).reshape(len(found), -1, width)

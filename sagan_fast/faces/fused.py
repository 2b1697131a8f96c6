"""FaceBoxes rewritten for inference: the same function of its input, with less work.

Every step is an identity in real arithmetic, so that only float32's rounding differs:

- Batch norm is folded into the convolution before it.
- The four 1x1 convolutions of an Inception are one of 128 to 112 channels. Average pooling commutes with a 1x1
  convolution without bias, so 32 channels are pooled instead of 128.
- max(relu(x)) = relu(max(x)), so the pools before and after conv2 read half the channels of a CReLU.
- Location and confidence of a map come from one convolution, and softmax over two logits is the sigmoid of their
  difference: five numbers an anchor instead of six.
- Tensors are channels_last, in which the heads' output is in the order of the anchors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sagan_fast.faces.network import BasicConv2d, FaceBoxes, Inception


def fuse(net: FaceBoxes) -> FusedFaceBoxes:
    """Return the inference-time rewrite of `net` in evaluation, with its own copy of the weights.

    What differs is float32's rounding: on photographs, with the published weights, loc and the probabilities differ by
    about 1e-5 and 2e-6, as much as either network does from float64.
    """
    return FusedFaceBoxes(net)


def for_rgb(net: FaceBoxes) -> FusedFaceBoxes:
    """Return the fused network of `net` that reads red, green, blue: its first convolution turned round."""
    fused = fuse(net)
    fused.conv1.weight.data = fused.conv1.weight.data.flip(1).contiguous(memory_format=torch.channels_last)
    return fused


class FusedInception(nn.Module):
    """An Inception with one 1x1 convolution: 128 to 32 (1x1), 24 and 24 (reductions), 32 (to be pooled)."""

    def __init__(self, block: Inception) -> None:
        super().__init__()
        pooled = _folded(block.branch1x1_2)
        entries = [_folded(b) for b in (block.branch1x1, block.branch3x3_reduce, block.branch3x3_reduce_2)]
        assert pooled.bias is not None
        weight = torch.cat([conv.weight for conv in (*entries, pooled)])
        # The pooled branch has its bias after the pool, whose border averages zeros in.
        bias = torch.cat([*(conv.bias for conv in entries if conv.bias is not None), torch.zeros_like(pooled.bias)])
        self.entry = _conv(weight, bias, entries[0])
        self.pooled_bias = nn.Parameter(pooled.bias.detach().clone().view(1, -1, 1, 1), requires_grad=False)
        self.near, self.far1, self.far2 = (_folded(b) for b in (block.branch3x3, block.branch3x3_2, block.branch3x3_3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        pooled = F.avg_pool2d(x[:, 80:], 3, 1, 1) + self.pooled_bias
        near, far = F.relu(x[:, 32:80]).chunk(2, 1)
        return F.relu_(torch.cat([x[:, :32], pooled, self.near(near), self.far2(F.relu_(self.far1(far)))], 1))


class FusedFaceBoxes(nn.Module):
    """The network of `fuse`; it takes and gives what FaceBoxes does in evaluation."""

    def __init__(self, net: FaceBoxes) -> None:
        super().__init__()
        self.conv1, self.conv2 = _folded(net.conv1), _folded(net.conv2)
        self.inceptions = nn.Sequential(*map(FusedInception, (net.inception1, net.inception2, net.inception3)))
        self.conv3_1, self.conv3_2 = _folded(net.conv3_1), _folded(net.conv3_2)
        self.conv4_1, self.conv4_2 = _folded(net.conv4_1), _folded(net.conv4_2)
        self.heads = nn.ModuleList(_head(loc, conf) for loc, conf in zip(net.loc, net.conf, strict=True))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.train(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc (B, A, 4) and the probabilities (B, A, 2) of background and face; see `FaceBoxes.forward`."""
        codes = self.codes(x)
        face = codes[..., 4].sigmoid()
        return codes[..., :4], torch.stack([1 - face, face], -1)

    def codes(self, x: Tensor) -> Tensor:
        """Return (B, A, 5): the four numbers of loc, and the logit of the probability that the anchor has a face."""
        x = _pooled_crelu(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        x = _pooled_crelu(self.conv2(x))
        first = self.inceptions(x)
        second = F.relu_(self.conv3_2(F.relu_(self.conv3_1(first))))
        third = F.relu_(self.conv4_2(F.relu_(self.conv4_1(second))))
        found = [head(x) for head, x in zip(self.heads, (first, second, third), strict=True)]
        return torch.cat([y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, 5) for y in found], 1)


def _pooled_crelu(x: Tensor) -> Tensor:
    highest = F.max_pool2d(x, 3, 2, 1)
    return F.relu_(torch.cat([highest, F.max_pool2d(x.neg_(), 3, 2, 1)], 1))  # in place: new memory costs more


def _conv(weight: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution with `weight` and `bias`, and the stride and padding of `like`."""
    out, into, *kernel = weight.shape
    make: Any = nn.Conv2d
    conv: nn.Conv2d = make(into, out, kernel, like.stride, like.padding, dtype=weight.dtype, device=weight.device)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def _folded(block: BasicConv2d) -> nn.Conv2d:
    """Return the block's convolution with its batch norm in evaluation inside, computed in float64."""
    bn = block.bn
    assert bn.running_mean is not None and bn.running_var is not None
    statistics = (bn.running_mean.double(), bn.running_var.double(), bn.eps, bn.weight.double(), bn.bias.double())
    weight, bias = fuse_conv_bn_weights(block.conv.weight.double(), None, *statistics)
    dtype = block.conv.weight.dtype
    return _conv(weight.detach().to(dtype), bias.detach().to(dtype), block.conv)


def _head(loc: Any, conf: Any) -> nn.Conv2d:
    """Return one convolution with five channels an anchor: its box code, and face's logit minus background's."""
    parts = []
    for of_loc, of_conf in ((loc.weight, conf.weight), (loc.bias, conf.bias)):
        codes = of_loc.detach().reshape(-1, 4, *of_loc.shape[1:])
        logits = of_conf.detach().double().reshape(-1, 2, *of_conf.shape[1:])
        face = (logits[:, 1:] - logits[:, :1]).to(codes.dtype)
        parts.append(torch.cat([codes, face], 1).flatten(0, 1))
    return _conv(parts[0], parts[1], loc)

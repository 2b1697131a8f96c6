"""The form for ONNX Runtime computes what the fused network does, with nothing that its layout in blocks stops at."""

import pytest
import torch

from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.for_runtime import RuntimeFaceBoxes
from sagan_fast.faces.fused import for_rgb


@pytest.mark.parametrize(("height", "width"), [(96, 128), (97, 33), (10, 300), (1, 1), (300, 1)])
def test_the_codes_are_those_of_the_fused_network(trained, generator, height, width):
    """In float64, so that only a wrong weight, stride or border can differ."""
    net = trained.double()
    x = torch.rand(1, 3, height, width, generator=generator, dtype=torch.float64) * 255 - 117
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, found = for_rgb(net).codes(x), RuntimeFaceBoxes(net)(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_it_is_as_near_float64_as_the_fused_network(trained, generator):
    x = torch.rand(1, 96, 128, 3, generator=generator) * 255 - 117
    with torch.no_grad():
        found, fused = RuntimeFaceBoxes(trained)(x), for_rgb(trained).codes(x.permute(0, 3, 1, 2))
        truth = RuntimeFaceBoxes(trained.double())(x.double())
    own, other = ((codes - truth).norm() / truth.norm() for codes in (found, fused))
    assert float(own) <= 3 * float(other) + 1e-7


def test_all_channels_are_whole_blocks():
    """Maps that are joined have multiples of eight channels: others would be turned back before the concatenation."""
    seen = []
    net = RuntimeFaceBoxes(FaceBoxes())
    cat = torch.cat
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "cat", lambda parts, dim: seen.append([p.shape[1] for p in parts]) or cat(parts, dim))
        net(torch.zeros(1, 64, 64, 3))
    assert seen[:-1] == [[24, 24], [64, 64], *[[32] * 4] * 3]

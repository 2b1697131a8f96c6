"""The rewrite is the network itself to rounding, whatever the statistics and the size of the picture."""

import copy

import pytest
import torch

from sagan_fast.faces import FaceBoxes, fuse
from sagan_fast.faces.for_runtime import RuntimeFaceBoxes


@pytest.mark.parametrize("shape", [(1, 3, 96, 128), (2, 3, 101, 67), (1, 3, 10, 333), (3, 3, 31, 33)])
def test_fused_equals_the_network(trained, shape, generator):
    """In float64 to 1e-10, which no shortcut would pass, and in float32 to the promised tolerances of trained nets."""
    x = torch.rand(shape, generator=generator) * 255 - 117
    with torch.no_grad():
        for dtype, most, share in ((torch.float32, 1e-5, 2e-6), (torch.float64, 1e-10, 1e-10)):
            net = trained.to(dtype)
            loc, conf = net(x.to(dtype))
            fused_loc, fused_conf = fuse(net)(x.to(dtype))
            assert fused_loc.shape == loc.shape and fused_conf.shape == conf.shape
            scale = max(1.0, float(loc.abs().max()))
            assert float((fused_loc - loc).abs().max()) <= most * scale, dtype
            assert float((fused_conf - conf).abs().max()) <= share * scale, dtype


def test_the_published_network_is_as_near_to_float64(weights, photographs):
    """In float32 all networks are some 1e-5 from float64 in location; the rewrites at most twice as far."""
    from sagan_fast.faces.pictures import as_input, read_picture

    net = FaceBoxes().load_weights(weights).eval()
    exact, fused, runtime = copy.deepcopy(net).double(), fuse(net), RuntimeFaceBoxes(net)
    for name in ("astronaut.png", "coffee.png"):
        x = as_input(read_picture(photographs / name)[:301, :455]).flip(1)
        with torch.no_grad():
            codes = runtime(x.flip(1).permute(0, 2, 3, 1))
            face = codes[..., 4].sigmoid()
            of_runtime = codes[..., :4], torch.stack([1 - face, face], -1)
            results = exact(x.double()), net(x), fused(x), of_runtime
        for truth, published, *ours, floor in zip(*results, (1e-5, 2e-6), strict=True):
            far, *near = (float((found - truth).abs().max()) for found in (published, *ours))
            assert max(near) <= 2 * far + floor and max(near) <= 3 * floor, name


def test_the_input_and_the_network_are_left_as_they_were(trained, generator):
    x = torch.randn(1, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)
    before, state = x.clone(), {key: value.clone() for key, value in trained.state_dict().items()}
    fused = fuse(trained)
    with torch.no_grad():
        fused(x)
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(x, before) and not fused.training
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())


def test_fewer_numbers_are_computed(trained):
    """One convolution in place of four and of two, no batch norm: 21 convolutions instead of 33."""
    convolutions = [m for m in fuse(trained).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 21
    assert len([m for m in trained.modules() if isinstance(m, torch.nn.Conv2d)]) == 33
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fuse(trained).modules())

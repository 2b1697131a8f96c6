"""The network has the published names, shapes and numbers."""

import pytest
import torch

from sagan_fast.faces import FaceBoxes, anchors


def test_size_and_keys_are_the_published_ones():
    net = FaceBoxes()
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 1_007_330 and len(state) == 174
    assert list(state)[:2] == ["conv1.conv.weight", "conv1.bn.weight"] and list(state)[-1] == "conf.2.bias"
    assert state["inception2.branch3x3_reduce_2.conv.weight"].shape == (24, 128, 1, 1)
    assert state["loc.0.weight"].shape == (84, 128, 3, 3) and state["conf.0.weight"].shape == (42, 128, 3, 3)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (33, 97), (10, 300), (1, 1)])
def test_there_is_an_output_for_each_anchor(height, width, generator):
    net = FaceBoxes().eval()
    with torch.no_grad():
        loc, conf = net(torch.randn(2, 3, height, width, generator=generator))
    count = len(anchors(height, width))
    assert loc.shape == (2, count, 4) and conf.shape == (2, count, 2)
    torch.testing.assert_close(conf.sum(-1), torch.ones(2, count))


def test_training_gives_logits_of_the_same_probabilities(trained, generator):
    x = torch.randn(1, 3, 64, 96, generator=generator) * 60
    with torch.no_grad():
        _, probabilities = trained(x)
        for module in trained.modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        _, logits = trained(x)
    torch.testing.assert_close(logits.softmax(-1), probabilities)


def test_every_parameter_has_a_gradient(generator):
    net = FaceBoxes()
    loc, conf = net(torch.randn(2, 3, 96, 128, generator=generator) * 60)
    (loc.square().sum() + conf.square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in net.parameters())


def test_the_published_weights_fit(weights):
    from sagan_fast.faces.weights import PUBLISHED_BYTES, PUBLISHED_SHA256
    from sagan_fast.files import file_sha256

    assert file_sha256(weights) == PUBLISHED_SHA256 and weights.stat().st_size == PUBLISHED_BYTES
    net, state = FaceBoxes(), torch.load(weights, weights_only=True, map_location="cpu")
    assert net.load_weights(weights) is net and list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())

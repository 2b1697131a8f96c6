import pytest
import torch

from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from shared_by_tests import randn


def test_each_image_gets_the_gain_and_bias_of_its_class(generator):
    layer = ConditionalBatchNorm2d(3, num_classes=4).double()
    assert layer.gain.weight.eq(1).all() and layer.bias.weight.eq(0).all()
    with torch.no_grad():
        layer.gain.weight.copy_(randn(4, 3, generator=generator))
        layer.bias.weight.copy_(randn(4, 3, generator=generator))
    x, y = randn(5, 3, 4, 6, generator=generator), torch.tensor([3, 0, 0, 2, 1])
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    normalised = (x - mean) / (var + 1e-5).sqrt()
    expected = layer.gain.weight[y][:, :, None, None] * normalised + layer.bias.weight[y][:, :, None, None]
    torch.testing.assert_close(layer(x, y), expected)


def test_eval_uses_the_running_averages(generator):
    layer = ConditionalBatchNorm2d(3, num_classes=2, momentum=1.0)
    x, y = randn(64, 3, 4, 4, generator=generator, dtype=torch.float32) * 5 + 2, torch.zeros(64, dtype=torch.long)
    trained = layer(x, y)
    torch.testing.assert_close(layer.eval()(x, y), trained, rtol=1e-2, atol=1e-2)
    layer.norm.reset_running_stats()
    torch.testing.assert_close(layer(x, y), x, rtol=1e-4, atol=1e-4)


def test_without_classes_it_is_batch_norm():
    layer = ConditionalBatchNorm2d(3, num_classes=0)
    assert {name for name, _ in layer.named_parameters()} == {"norm.weight", "norm.bias"}
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_classes_are_asked_for():
    with pytest.raises(ValueError, match="y must give one of 4 classes an image"):
        ConditionalBatchNorm2d(3, num_classes=4)(torch.zeros(2, 3, 4, 4))

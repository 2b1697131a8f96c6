import pytest
import torch
from torch import nn

from sagan_fast.layers.initialization import xavier


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 10, 3), nn.Linear(54, 90), nn.Embedding(54, 90)], ids=repr)
def test_weights_fill_the_xavier_range_and_biases_are_zero(layer):
    xavier(layer)
    bound = (6 / (54 + 90)) ** 0.5 if not isinstance(layer, nn.Conv2d) else (6 / (6 * 9 + 10 * 9)) ** 0.5
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    if getattr(layer, "bias", None) is not None:
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))

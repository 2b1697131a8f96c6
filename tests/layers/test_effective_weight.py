import pytest
import torch
import torch.nn.functional as F
from foreign_layers import BigGANConv, Wrapped, hooked
from torch import nn

from sagan_fast.layers.effective_weight import bias_of, is_direct, weight_now
from shared_by_tests import randn


@pytest.mark.parametrize(
    "make", [lambda c: c, nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, Wrapped, hooked]
)
def test_direct_convolutions_are_their_weight_and_bias(make, generator):
    conv = make(nn.Conv2d(5, 3, 1).double()).eval()
    x = randn(2, 5, 4, 6, generator=generator)
    assert is_direct(conv)
    expected = conv(x)
    for _ in range(200):  # those that move in evaluation come to rest
        conv(x)
    torch.testing.assert_close(F.conv2d(x, weight_now(conv), bias_of(conv)), conv(x))
    assert expected.shape == (2, 3, 4, 6)


def test_what_has_to_be_called_is_not_direct():
    class Noisy(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    assert is_direct(BigGANConv(4, 4, 1)) and is_direct(nn.Conv1d(4, 4, 1))
    for conv in (
        Noisy(4, 4, 1), nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4), nn.Identity(),
    ):  # fmt: skip
        assert not is_direct(conv)
    hooked_conv = nn.Conv2d(4, 4, 1)
    hooked_conv.register_forward_pre_hook(lambda module, inputs: None)
    assert not is_direct(hooked_conv)
    bound = nn.Conv2d(4, 4, 1)
    bound.forward = lambda x: x
    assert not is_direct(bound)

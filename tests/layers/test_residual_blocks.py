"""The blocks against the official order of operations, written out; nothing rectified in place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from shared_by_tests import randn


def up(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_generator_block_is_the_official_one(generator):
    block = GeneratorBlock(4, 6, num_classes=3).double().eval()
    x, y = randn(2, 4, 5, 5, generator=generator), torch.tensor([2, 0])
    kept = x.clone()
    h = block.conv1(up(block.norm1(x, y).relu()))
    h = block.conv2(block.norm2(h, y).relu())
    torch.testing.assert_close(block(x, y), h + block.shortcut(up(x)))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("channels", "first", "downsample"), [(3, True, True), (6, False, True), (4, False, True)])
def test_discriminator_block_is_the_official_one(channels, first, downsample, generator):
    block = DiscriminatorBlock(channels, 6, downsample, first).double().eval()
    x = randn(2, channels, 8, 8, generator=generator)
    kept = x.clone()
    h = block.conv2(block.conv1(x if first else x.relu()).relu())
    expected = F.avg_pool2d(h, 2) + F.avg_pool2d(block.shortcut(x), 2)
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, kept)


def test_the_last_discriminator_block_has_an_identity_shortcut(generator):
    block = DiscriminatorBlock(6, 6, downsample=False).double().eval()
    x = randn(2, 6, 4, 4, generator=generator)
    assert block.shortcut is None
    torch.testing.assert_close(block(x), block.conv2(block.conv1(x.relu()).relu()) + x)


def test_hidden_width_is_the_output_width():
    assert DiscriminatorBlock(4, 32).conv1.out_channels == 32
    assert GeneratorBlock(32, 4, 0).conv1.out_channels == 4


def test_a_rectified_shortcut_is_that_of_a_relu_in_place(generator):
    block = DiscriminatorBlock(3, 4, rectified=True)
    x = torch.randn(2, 3, 6, 6, generator=generator)
    torch.testing.assert_close(block.eval()(x), block(x.relu()))
    first = DiscriminatorBlock(3, 4, first=True, rectified=True).eval()
    assert not torch.allclose(first(x), first(x.relu()))
    assert GeneratorBlock(3, 4, 0, bn_eps=1e-4).norm2.norm.eps == 1e-4


def test_what_a_hook_has_seen_is_not_written_over(generator):
    x = randn(2, 4, 6, 6, generator=generator)
    for block in (GeneratorBlock(4, 6, 0).double().eval(), DiscriminatorBlock(4, 6).double().eval()):
        seen = {}
        for name in ("conv1", "conv2"):
            layer = getattr(block, name)
            layer.register_forward_hook(
                lambda _, inputs, out, seen=seen, name=name: seen.update({name: (out, 1 * out)})
            )
        expected = block(x)
        assert set(seen) == {"conv1", "conv2"} and all(torch.equal(*pair) for pair in seen.values())
        block.in_place = False
        torch.testing.assert_close(block(x), expected)


def test_a_backward_hook_on_any_layer_leaves_the_gradients_as_they_are(generator):
    x = randn(2, 4, 6, 6, generator=generator).requires_grad_()
    for block in (GeneratorBlock(4, 6, 0).double().eval(), DiscriminatorBlock(4, 6).double().eval()):
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
        for layer in block.children():
            layer.register_full_backward_hook(lambda *_: None)
        (found,) = torch.autograd.grad(block(x).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_hooks_of_all_modules_see_what_every_layer_returns(generator):
    block, x = GeneratorBlock(4, 6, 0), torch.randn(2, 4, 8, 8, generator=generator)
    seen = {}
    hooks = torch.nn.modules.module
    kept = hooks.register_module_forward_hook(lambda module, given, out: seen.update({module: (out, out.clone())}))
    called = hooks.register_module_full_backward_hook(lambda module, given, out: None)
    try:
        block(x).sum().backward()
    finally:
        kept.remove(), called.remove()
    assert {block.conv1, block.conv2, block.shortcut, block.norm1} <= seen.keys()
    assert all(torch.equal(now, then) for now, then in seen.values())


def test_a_spectral_normed_weight_is_read_once_a_forward(generator):
    block = DiscriminatorBlock(4, 4).double()
    u = block.conv2.parametrizations.weight[0]._u
    twin = copy.deepcopy(block)
    block(randn(2, 4, 8, 8, generator=generator))
    _ = twin.conv2.weight
    torch.testing.assert_close(u, twin.conv2.parametrizations.weight[0]._u, rtol=0, atol=0)


def test_a_replaced_first_convolution_sees_its_own_result(generator):
    class Kept(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            self.out = self.conv(x)
            return self.out

    block = DiscriminatorBlock(4, 4).double().eval()
    block.conv1 = Kept(block.conv1)
    x = randn(2, 4, 8, 8, generator=generator)
    block(x)
    one = torch.autograd.grad(block.conv1.out.mean(), block.conv1.conv.bias)
    block.products = block.in_place = False
    block(x)
    torch.testing.assert_close(one, torch.autograd.grad(F.relu(block.conv1.out).mean(), block.conv1.conv.bias))


def test_a_convolution_with_a_forward_of_its_own_is_called(generator):
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    block = DiscriminatorBlock(4, 4, downsample=False).double().eval()
    block.conv2 = Doubled(4, 4, 3, padding=1).double()
    x = randn(2, 4, 8, 8, generator=generator)
    h = block.conv1(x.relu()).relu()
    torch.testing.assert_close(block(x), 2 * F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1) + x)

"""Average pooling is PyTorch's, with any number of derivatives, and keeps nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from sagan_fast.layers.residual_blocks import DiscriminatorBlock
from sagan_fast.ops.pooling import avg_pool2d
from shared_by_tests import randn


@pytest.mark.parametrize("size", [(6, 4), (5, 4), (3, 7)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_average_pooling_keeps_no_map(memory_format, size, generator):
    x = randn(2, 3, *size, generator=generator).contiguous(memory_format=memory_format).requires_grad_()
    h = x * 1
    storage = StorageWeakRef(h.untyped_storage())
    out = avg_pool2d(h)
    torch.testing.assert_close(out, F.avg_pool2d(x, 2))
    del h
    assert storage.expired()
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(F.avg_pool2d(x, 2).square().sum(), x)[0])
    assert grad.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(avg_pool2d, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(avg_pool2d, x)
    one = x.detach()[0].requires_grad_()
    (grad,) = torch.autograd.grad(avg_pool2d(one).square().sum(), one)
    torch.testing.assert_close(grad, torch.autograd.grad(F.avg_pool2d(one, 2).square().sum(), one)[0])


def test_a_discriminator_block_keeps_its_input_rectified_alone(generator):
    block = DiscriminatorBlock(4, 6)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    h = x * 1
    storage = StorageWeakRef(h.untyped_storage())
    out = block(h)
    del h
    assert storage.expired() and out.requires_grad

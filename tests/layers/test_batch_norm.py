"""Modules run by the kernels compute what they do without: values, gradients, running averages; two processes too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sagan_fast.layers.batch_norm import batch_norm_relu, fused, fused_backend, is_watched
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from sagan_fast.layers.synced_batch_norm import SyncedBatchNorm2d, sync_batch_norms
from shared_by_tests import randn, run_ranks


def drawn(norm, generator):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(randn(*parameter.shape, generator=generator))
    return norm.double()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, SyncedBatchNorm2d])
def test_batch_norm_and_relu_of_a_module(kind, momentum, generator):
    norm = drawn(kind(3, eps=1e-3, momentum=momentum), generator)
    other = copy.deepcopy(norm)
    x = randn(4, 3, 2, 5, generator=generator).requires_grad_()
    for training in (True, True, False):
        found, right = batch_norm_relu(norm.train(training), x, "triton"), F.relu(other.train(training)(x))
        assert "BatchNormFunction" in type(found.grad_fn).__name__
        torch.testing.assert_close(found, right)
    for one, truth in zip(norm.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("relu", [True, False])
def test_a_conditional_layer_is_the_same_on_both_backends(num_classes, relu, generator):
    layer = drawn(ConditionalBatchNorm2d(3, num_classes, momentum=0.3), generator)
    other = copy.deepcopy(layer)
    layer.backend = "triton"
    x = randn(4, 3, 2, 5, generator=generator).requires_grad_()
    mixed = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    for y in (torch.tensor([4, 1, 4, 0]), mixed) if num_classes else (None,):
        results = []
        for one in (layer, other):
            out = one(x, y, relu=relu)
            grads = torch.autograd.grad(out.cos().sum(), (x, *one.parameters()))
            results.append([out, *grads, *one.buffers()])
        assert "BatchNormFunction" in type(results[0][0].grad_fn).__name__
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("training", [True, False])
def test_on_the_cpu_it_is_what_pytorch_computes(training, generator):
    layer = drawn(ConditionalBatchNorm2d(3, 5), generator).double().train(training)
    plain = copy.deepcopy(layer)
    plain.backend = "eager"
    x, y = randn(4, 3, 2, 5, generator=generator).requires_grad_(), torch.tensor([4, 1, 4, 0])
    d_out = randn(4, 3, 2, 5, generator=generator)
    found, right = (
        [out, *torch.autograd.grad(out, [x, *one.parameters()], d_out), *one.buffers()]
        for one in (layer, plain)
        for out in [one(x, y, relu=True)]
    )
    assert "BatchNormFunction" in type(found[0].grad_fn).__name__ and "Relu" in type(right[0].grad_fn).__name__
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs)
    tail = drawn(nn.BatchNorm2d(3), generator).double().eval()
    torch.testing.assert_close(batch_norm_relu(tail, x), F.relu(tail(x)))
    assert fused(layer.norm, x.detach().bfloat16(), None, None) is None


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_one_is_added_to_gains_by_image(backend, generator):
    norm = nn.BatchNorm2d(3, affine=False).double()
    x, gain, bias = (randn(*shape, generator=generator) for shape in ((4, 3, 2, 5), (4, 3), (4, 3)))
    found = fused(norm, x, gain, bias, one_plus=True, backend=backend)
    torch.testing.assert_close(found, norm(x) * (1 + gain)[:, :, None, None] + bias[:, :, None, None])
    assert fused_backend(norm, x) == "cpu" and fused_backend(norm, x[:1, :, :1, :1]) is None
    assert fused(norm, x, gain[:1], bias[:1]) is None


class Another(nn.BatchNorm2d):
    """Somebody else's: what it computes is its own."""


def test_hooks_and_other_classes_are_left_to_themselves(generator):
    x, y = torch.randn(4, 3, 2, 5, generator=generator), torch.tensor([4, 1, 4, 0])
    assert fused(Another(3), x, None, None, backend="triton") is None
    layer = ConditionalBatchNorm2d(3, 5)
    layer.backend, calls = "triton", []
    layer.norm.register_forward_hook(lambda *_: calls.append("norm"))
    layer(x, y)
    layer.norm._forward_hooks.clear()
    layer.gain.register_forward_hook(lambda *_: calls.append("gain"))
    assert is_watched(layer.gain) and "BatchNormFunction" in type(layer(x, y).grad_fn).__name__
    assert calls == ["norm", "gain"]


def test_errors_are_those_of_the_module():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm_relu(nn.BatchNorm2d(3), torch.ones(1, 3, 1, 1), "triton")
    with pytest.raises(ValueError, match="expected 4D input"):
        batch_norm_relu(nn.BatchNorm2d(3), torch.ones(1, 3), "triton")


def as_rank(folder):
    from sagan_fast.distributed import connected

    generator = torch.Generator().manual_seed(5)
    layer = drawn(ConditionalBatchNorm2d(3, 5, momentum=0.3), generator)
    x, y = randn(5, 3, 2, 3, generator=generator), torch.tensor([4, 1, 4, 0, 2])
    layer.backend = "triton"
    assert sync_batch_norms(layer) == 1
    with connected("cpu", 60) as world:
        mine = torch.arange(5).split((3, 2))[world.rank]
        part = x[mine].requires_grad_()
        out = layer(part, y[mine], relu=True)
        out.square().sum().backward()
        assert "BatchNormFunction" in type(out.grad_fn).__name__
        torch.save(
            [out.detach(), part.grad, *(p.grad for p in layer.parameters()), *layer.buffers()],
            folder / f"{world.rank}.pt",
        )


@pytest.mark.slow
def test_two_processes_are_one_batch(tmp_path):
    assert run_ranks(as_rank, 2, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    generator = torch.Generator().manual_seed(5)
    layer = drawn(ConditionalBatchNorm2d(3, 5, momentum=0.3), generator)
    x, y = randn(5, 3, 2, 3, generator=generator).requires_grad_(), torch.tensor([4, 1, 4, 0, 2])
    out = layer(x, y, relu=True)
    out.square().sum().backward()
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad)
    for one, other, parameter in zip(first[2:4], second[2:4], layer.parameters(), strict=True):
        torch.testing.assert_close(one + other, parameter.grad)
    for one, other, buffer in zip(first[4:], second[4:], layer.buffers(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, buffer)

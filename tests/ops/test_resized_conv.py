"""The folded convolutions against resizing and convolving one after the other: values and all derivatives, exactly."""

import pytest
import torch
import torch.nn.functional as F

from sagan_fast.ops.resized_conv import conv2d_down, folded, is_folded, up_conv2d
from shared_by_tests import randn

SIZES = [(1, 1), (2, 3), (5, 4), (7, 7), (1, 6)]


def plain(x, weight, bias, direction):
    if direction == "up":
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)


def fused(x, weight, bias, direction):
    return (up_conv2d if direction == "up" else conv2d_down)(x, folded(weight, direction), bias)


def drawn(generator, direction, size, channels=(3, 5), dtype=torch.float64, batch=2):
    size = tuple(max(2, side) for side in size) if direction == "down" else size
    x = randn(batch, channels[0], *size, generator=generator, dtype=dtype)
    weight = randn(channels[1], channels[0], 3, 3, generator=generator, dtype=dtype)
    return x, weight, randn(channels[1], generator=generator, dtype=dtype)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_two_layers(direction, size, layout, generator):
    x, weight, bias = drawn(generator, direction, size)
    results = []
    for run in (plain, fused):
        inputs = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in (x, weight, bias)]
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out = run(*inputs, direction)
        cotangent = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
        results.append([out, *first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_gradients_and_second_gradients_are_those_of_finite_differences(direction, generator):
    inputs = tuple(t.requires_grad_() for t in drawn(generator, direction, (3, 4), (2, 2), batch=1))
    assert torch.autograd.gradcheck(lambda *given: fused(*given, direction), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: fused(*given, direction), inputs)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_transforms_and_forward_mode_differentiate_it(direction, generator):
    x, weight, bias = drawn(generator, direction, (4, 4))
    weight.requires_grad_()  # as a parameter is

    def value(run):
        return lambda w: run(x, w, bias, direction).square().sum()

    tangent = randn(*weight.shape, generator=generator, dtype=weight.dtype)
    for ours, theirs in (
        (torch.func.grad(value(fused))(weight), torch.func.grad(value(plain))(weight)),
        *zip(*(torch.func.jvp(value(run), (weight,), (tangent,)) for run in (fused, plain)), strict=True),
        *zip(*(torch.autograd.functional.hvp(value(run), weight, tangent) for run in (fused, plain)), strict=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    many = torch.stack([weight, 2 * weight])
    mapped = torch.func.vmap(lambda w: fused(x, w, bias, direction))(many)
    torch.testing.assert_close(mapped[1], plain(x, 2 * weight, bias, direction), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_in_float32_the_error_is_that_of_two_layers(direction, generator):
    x, weight, bias = drawn(generator, direction, (8, 8), (33, 17), torch.float32, batch=8)
    truth = plain(x.double(), weight.double(), bias.double(), direction)
    ours, theirs = (run(x, weight, bias, direction).double() - truth for run in (fused, plain))
    assert ours.square().mean() <= 4 * theirs.square().mean() + (1e-7 * truth).square().mean()


def test_a_value_made_before_is_put_into_the_graph(generator):
    weight = randn(4, 3, 3, 3, generator=generator).requires_grad_()
    value = folded(weight.detach(), "up")
    out = folded(weight, "up", value)
    assert out.data_ptr() == value.data_ptr()
    (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, torch.full_like(weight, 4.0))  # each number is in four of the sixteen


def test_only_3x3_weights_are_folded():
    with pytest.raises(ValueError, match=r"folded: weight must have shape \(O, I, 3, 3\), got \(2, 3, 1, 1\)"):
        folded(torch.zeros(2, 3, 1, 1), "up")


def test_what_was_not_measured_is_not_folded():
    x = torch.zeros(4, 8, 16, 16)
    assert is_folded(x, "up") and is_folded(x, "down")
    assert not is_folded(x[:1, :, :4, :4], "up") and not is_folded(x[:1, :, :8, :8], "down")
    assert not is_folded(x.bfloat16(), "up") and not is_folded(x.to("meta"), "up")
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_folded(x, "up")

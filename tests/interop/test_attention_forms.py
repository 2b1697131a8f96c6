import pytest
import torch
from foreign_attention import QUERY, THETA, Block, Container, WithMap, conv
from foreign_layers import Wrapped
from torch import nn

import sagan_fast
from sagan_fast.interop.attention_forms import convolution_path, possible_forms
from shared_by_tests import randn


def test_paths_lead_to_the_one_convolution_or_its_wrapper():
    assert convolution_path(nn.Conv2d(2, 2, 1)) == () == convolution_path(Wrapped(nn.Conv1d(2, 2, 1)))
    assert convolution_path(Container(nn.Conv2d(2, 2, 1))) == ("conv",)
    assert convolution_path(nn.Sequential(nn.ReLU(), Container(Wrapped(nn.Conv2d(2, 2, 1))))) == ("1", "conv")
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), nn.ReLU(), nn.Identity()):
        assert convolution_path(other) is None


def test_forms_are_those_whose_shapes_fit():
    block = Block(conv, THETA, D_QK=3)
    forms = list(possible_forms(block, [(name,) for name in THETA], ["gamma"]))
    assert len(forms) == 4 and {form.theta for form in forms} == {("theta",), ("phi",)}
    assert {form.pool for form in forms} == {True, False} and all(form.g == ("g",) for form in forms)
    square = Block(conv, QUERY, D_QK=16, D_V=16, pool=False)
    assert len(list(possible_forms(square, [(name,) for name in QUERY], ["gamma"]))) == 12


@pytest.fixture
def module():
    found = WithMap(lambda i, o: conv(i, o, True), QUERY, D_V=16, pool=False).double()
    sagan_fast.accelerate(found)
    return found


def test_the_map_is_computed_only_where_somebody_uses_it(module, generator):
    x = randn(2, 16, 4, 6, generator=generator).requires_grad_()
    out, beta = module(x)
    out.sum().backward()
    assert not beta.is_computed and beta.shape == (2, 24, 24)
    q, k, _ = module.parts(x)
    torch.testing.assert_close(beta + 0, (q.mT @ k).softmax(-1))


def test_a_loss_on_the_map_differentiates_it(module, generator):
    x = randn(2, 16, 4, 6, generator=generator).requires_grad_()
    grads = []
    for own in (False, True):
        out, beta = WithMap.forward(module, x) if own else module(x)
        grads.append(torch.autograd.grad(beta.square().sum() + out.sum(), [x, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_map_looked_at_after_the_step_is_that_of_before(module, generator):
    x = randn(2, 16, 4, 6, generator=generator)
    expected = WithMap.forward(module, x)[1].detach()
    beta = module(x)[1]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    torch.testing.assert_close(beta.detach(), expected)
    beta = module(x)[1]
    x.add_(1)
    with pytest.raises(RuntimeError, match="input was changed in place"):
        beta.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype, generator):
    found = Block(conv, THETA)
    x = randn(2, 16, 4, 6, generator=generator, dtype=torch.float32)
    expected = found(x)
    sagan_fast.accelerate(found, strict=True)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(found(x), expected, atol=0.05, rtol=0.05, check_dtype=False)
    torch.testing.assert_close(found.to(dtype)(x.to(dtype)).float(), expected, atol=0.1, rtol=0.05)
    assert found(x.to(dtype)).dtype == dtype

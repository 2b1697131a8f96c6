"""Convolutions as products of matrices against PyTorch's: values and all derivatives, in chunks of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_fast.ops import convolution
from shared_by_tests import randn

FORMS = {"3x3": (3, 1, False), "4x4": (4, 2, False), "4x4 transposed": (4, 2, True)}
WANTED = [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
SIZES = [(2, 2), (4, 6), (8, 2)]


@pytest.fixture(params=["all directions", "weights only"])
def by_products(request, monkeypatch):
    """Products for every size and processor, in chunks of a few rows, with both rules."""
    monkeypatch.setattr(convolution, "IS_MEASURED", True)
    monkeypatch.setattr(convolution, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(convolution, "LEAST_PAIRS", 1)
    monkeypatch.setattr(convolution, "MANY_PAIRS", 1 if request.param == "all directions" else 10**9)
    monkeypatch.setattr(convolution, "MOST_PIXELS", 10**9)
    monkeypatch.setattr(convolution, "CHUNK", 100)
    monkeypatch.setattr(convolution, "LEAST_ROWS", 20)


def drawn(generator, form, size, channels=(3, 5), batch=3, dtype=torch.float64):
    kernel, _, transposed = FORMS[form]
    pair = channels if transposed else channels[::-1]
    x = randn(batch, channels[0], *size, generator=generator, dtype=dtype)
    weight = randn(*pair, kernel, kernel, generator=generator, dtype=dtype)
    bias = randn(channels[1], generator=generator, dtype=dtype)
    return x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last), bias


def is_by_products(x, weight, form):
    _, stride, transposed = FORMS[form]
    return convolution._form(x, weight, None, stride, transposed, True).has_products


def ours(x, weight, bias, form, products=True):
    _, stride, transposed = FORMS[form]
    if transposed:
        return convolution.conv_transpose2d(x, weight, bias, products)
    return convolution.conv2d(x, weight, bias, stride, products)


def pytorch(x, weight, bias, form):
    _, stride, transposed = FORMS[form]
    return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, stride, 1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_values_and_all_derivatives_are_those_of_pytorch(form, size, layout, generator):
    drew, results = drawn(generator, form, size), []
    for run in (pytorch, ours):
        inputs = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in drew]
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out = run(*inputs, form)
        cotangent = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        first = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
        graphed = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graphed), inputs, materialize_grads=True)
        results.append([out, *first, *graphed, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_only_the_gradients_asked_for_come_out(form, wanted, generator):
    x, weight, bias = drawn(generator, form, (4, 4))
    found = []
    for run in (pytorch, ours):
        inputs = [t.clone().requires_grad_(want) for t, want in zip((x, weight, bias), wanted, strict=True)]
        run(*inputs, form).square().sum().backward()
        found.append([t.grad for t in inputs])
    for one, other, want in zip(*found, wanted, strict=True):
        assert (other is not None) == want
        if want:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_without_a_bias(form, generator):
    x, weight, _ = drawn(generator, form, (4, 4))
    found = []
    for run in (pytorch, ours):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = run(*inputs, None, form)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("by_products")
def test_the_result_may_be_written_over(generator):
    x, weight, bias = (t.requires_grad_() for t in drawn(generator, "4x4", (4, 4)))
    out = ours(x, weight, bias, "4x4")
    assert out.is_contiguous(memory_format=torch.channels_last)
    doubled = torch.autograd.grad(out.add_(out.detach().clone()).sum(), weight)
    torch.testing.assert_close(doubled, torch.autograd.grad(pytorch(x, weight, bias, "4x4").sum(), weight))


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("form", ["3x3", "4x4"])
@pytest.mark.usefixtures("by_products")
def test_a_relu_that_autograd_does_not_know_has_its_derivatives(form, products, generator):
    drew, results = drawn(generator, form, (4, 6)), []

    def unseen(x, weight, bias, form):
        h = x * 1.0
        assert convolution.can_hide_relu(h)
        h.detach().relu_()
        return convolution.conv2d(h, weight, bias, FORMS[form][1], products, rectified=True)

    for run in (lambda x, *rest: pytorch(F.relu(x), *rest), unseen):
        inputs = [t.clone().requires_grad_() for t in drew]
        out = run(*inputs, form)
        first = torch.autograd.grad(out.sin().sum(), inputs, retain_graph=True)
        only_x = torch.autograd.grad(out.sin().sum(), inputs[0], retain_graph=True)
        graphed = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in graphed), inputs)
        results.append([out, *first, *only_x, *graphed, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_transforms_and_forward_mode_differentiate_it(form, generator):
    x, weight, bias = drawn(generator, form, (4, 4))
    weight.requires_grad_()  # as a parameter is
    tangent = torch.ones_like(x)
    for transform in (
        lambda run: torch.func.jvp(lambda x: run(x, weight, bias, form), (x,), (tangent,))[1],
        lambda run: torch.func.grad(lambda w: run(x, w, bias, form).square().sum())(weight),
        lambda run: torch.func.vmap(lambda x: run(x[None], weight, bias, form))(x),
    ):
        torch.testing.assert_close(transform(ours), transform(pytorch), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("by_products")
def test_odd_maps_and_what_products_are_not_for_go_to_pytorch(generator):
    x, weight, bias = drawn(generator, "4x4", (5, 4))
    weight.requires_grad_()
    torch.testing.assert_close(ours(x, weight, bias, "4x4"), pytorch(x, weight, bias, "4x4"))
    assert not is_by_products(x, weight, "4x4")
    x = drawn(generator, "4x4", (4, 4))[0]
    assert is_by_products(x, weight, "4x4")
    assert is_by_products(x.contiguous(), weight, "4x4") and is_by_products(x, weight.contiguous(), "4x4")
    assert not is_by_products(x.contiguous(), weight.contiguous(), "4x4")
    assert not is_by_products(x.bfloat16(), weight.bfloat16(), "4x4")
    assert not is_by_products(x.float(), weight, "4x4")
    assert not is_by_products(x[:0], weight, "4x4")
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_by_products(x.float(), weight.float(), "4x4")
    assert ours(x, weight, bias, "4x4", products=False).grad_fn.name() == "ConvolutionBackward0"
    with pytest.raises(RuntimeError):
        ours(x, weight, bias[:1], "4x4")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_only_what_a_backward_pass_asks_for_is_computed(form, generator):
    x, weight, bias = (t.requires_grad_() for t in drawn(generator, form, (4, 4)))
    out = ours(x * 1, weight * 1, bias * 1, form)
    for asked, expected in (([x], 0), ([weight], 1), ([x, weight], 1), ([bias], 0)):
        with _Named() as names:
            torch.autograd.grad(out.sum(), asked, retain_graph=True)
        assert names.count("sagan_fast::conv_windows_weight") == expected
        d_x = [name for name in names if "backward" in name or name.endswith(("windows", "transpose"))]
        assert len(d_x) == (x in set(asked))


class _Named(TorchDispatchMode):
    def __enter__(self):
        self.names = []
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.usefixtures("by_products")
def test_batched_gradients(rectified, generator):
    x, weight, bias = (t.requires_grad_() for t in drawn(generator, "3x3", (2, 4)))
    h = x * 1
    if rectified:
        h.detach().relu_()
    found = []
    for out in (
        convolution.conv2d(h, weight * 1, bias * 1, 1, rectified=rectified),
        F.conv2d(F.relu(x) if rectified else x, weight, bias, padding=1),
    ):
        basis = torch.eye(out.numel(), dtype=out.dtype)[:3].view(3, *out.shape)
        found.append(torch.autograd.grad(out, [x, weight, bias], basis, is_grads_batched=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("by_products")
def test_shapes_are_known_without_memory(form, generator):
    drew = drawn(generator, form, (4, 6))
    expected = ours(*drew, form)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(t).requires_grad_() for t in drew]
        out = ours(*inputs, form)
        assert (out.shape, out.stride()) == (expected.shape, expected.stride())
        out.sum().backward()
        assert [t.grad.shape for t in inputs] == [t.shape for t in drew]


@pytest.mark.usefixtures("by_products")
def test_autocast_around_the_backward_alone_rounds_nothing(generator):
    found = []
    for enabled in (False, True):
        x, weight, bias = (t.float().requires_grad_() for t in drawn(generator, "4x4", (4, 4)))
        out = ours(x, weight.detach().requires_grad_(), bias, "4x4")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, x, torch.ones_like(out))[0])
        generator.manual_seed(generator.initial_seed())
    assert torch.equal(*found)


def test_the_rules_are_those_that_were_measured(monkeypatch):
    monkeypatch.setattr(convolution, "IS_MEASURED", True)
    for channels, size, side, wants_gradient, expected in [
        ((64, 128), 3, 8, True, (True, False)),
        ((64, 64), 3, 8, True, (False, False)),
        ((64, 128), 3, 8, False, (False, False)),
        ((32, 512), 3, 8, True, (False, False)),
        ((128, 128), 3, 128, True, (False, False)),  # too much memory
        ((512, 512), 3, 8, False, (False, False)),
        ((512, 512), 4, 8, False, (True, True)),
        ((512, 512), 4, 64, True, (True, False)),
        ((256, 512), 4, 8, False, (False, False)),
    ]:
        weight = torch.ones(*channels, size, size, requires_grad=wants_gradient)
        x = torch.ones(2, channels[1], side, side).to(memory_format=torch.channels_last)
        found = convolution._form(x, weight, None, size - 2 if size == 4 else 1, False, True)
        assert (found.weight_by_products, found.all_by_products) == expected
    monkeypatch.setattr(convolution, "IS_MEASURED", False)
    assert not convolution._form(x, weight, None, 2, False, True).weight_by_products


def test_in_float32_at_a_real_width_it_is_as_exact_as_pytorch(generator, monkeypatch):
    monkeypatch.setattr(convolution, "IS_MEASURED", True)
    x, weight, bias = drawn(generator, "4x4", (8, 8), (512, 512), batch=2, dtype=torch.float32)
    assert is_by_products(x, weight, "4x4")
    truth, theirs, own = [], [], []
    for found, run, dtype in ((truth, pytorch, torch.float64), (theirs, pytorch, None), (own, ours, None)):
        inputs = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        out = run(*inputs, "4x4")
        found += [out.detach(), *torch.autograd.grad(out, inputs, out.detach().sign())]
    for exact, one, other in zip(truth, theirs, own, strict=True):
        scale = exact.abs().max()
        assert (other - exact).abs().max() / scale < max(3 * (one - exact).abs().max() / scale, 1e-6)

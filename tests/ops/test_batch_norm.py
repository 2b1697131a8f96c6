"""conditional_batch_norm on both backends against the reference in float64, and all kinds of derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from sagan_fast.functional import conditional_batch_norm
from sagan_fast.kernels.batch_norm import reference
from sagan_fast.ops.batch_norm import Options, Sync, fused_batch_norm, together
from shared_by_tests import assert_close_to_truth, randn

B, C = 4, 3
KINDS = {"none": None, "plain": (C,), "image": (B, C), "class": (5, C)}
wide_backends = pytest.mark.parametrize("backend", ["triton", "cpu", "eager"])
backends = pytest.mark.parametrize("backend", ["triton", "eager"])


def draw(generator, kind="class", size=(5, 2), dtype=torch.float64):
    """Return x, gain, bias and classes; x, gain and bias are leaves."""
    x = (randn(B, C, *size, generator=generator) * 2 + 3).to(dtype).requires_grad_()
    shape = KINDS[kind]
    tables = [None if shape is None else randn(*shape, generator=generator, dtype=dtype) for _ in range(2)]
    y = torch.tensor([4, 1, 4, 0]) if kind == "class" else None
    return x, *(t if t is None else t.requires_grad_() for t in tables), y


def running(generator, dtype=torch.float64):
    means = randn(C, generator=generator, dtype=dtype)
    return dict(running_mean=means, running_var=randn(C, generator=generator, dtype=dtype).square() + 1)


@wide_backends
@pytest.mark.parametrize(
    ("kind", "training"), [("none", True), ("plain", False), ("image", True), ("class", True), ("class", False)]
)
def test_value_and_gradients_are_the_reference_s(backend, kind, training, generator):
    x, gain, bias, y = draw(generator, kind)
    statistics = running(generator)
    expected = {name: t.clone() for name, t in statistics.items()}
    F.batch_norm(x.detach(), *expected.values(), training=training, momentum=0.3)
    moments = reference.moments(x) if training else tuple(t.clone() for t in statistics.values())
    form = dict(eps=1e-3, relu=True, one_plus=kind != "plain")
    truth = reference.batch_norm(x, *moments, gain, bias, y, **form)
    out = conditional_batch_norm(
        x, gain, bias, y, **statistics, training=training, momentum=0.3, backend=backend, **form
    )
    torch.testing.assert_close(out, truth)
    d_out, leaves = randn(*x.shape, generator=generator), [t for t in (x, gain, bias) if t is not None]
    for found, right in zip(*(torch.autograd.grad(one, leaves, d_out) for one in (out, truth)), strict=True):
        torch.testing.assert_close(found, right)
    for name, moved in statistics.items():
        torch.testing.assert_close(moved, expected[name])


def test_gradcheck(generator):
    x, gain, bias, y = draw(generator)
    x, y = x.detach()[:2, :, :2].requires_grad_(), y[:2]

    def of(x, gain, bias):
        return conditional_batch_norm(x, gain, bias, y, training=True, backend="eager")

    assert gradcheck(of, (x, gain, bias)) and gradgradcheck(of, (x, gain, bias))


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_those_of_plain_pytorch(training, generator):
    x, gain, bias, y = draw(generator)
    statistics, d_out = running(generator), randn(*x.shape, generator=generator)
    seconds = []
    for backend in ("triton", "cpu", "eager"):
        kept = {name: t.clone() for name, t in statistics.items()}
        out = conditional_batch_norm(x, gain, bias, y, **kept, training=training, relu=True, backend=backend)
        grads = torch.autograd.grad(out, (x, gain, bias), d_out, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        seconds.append([*torch.autograd.grad(penalty, (x, gain)), *kept.values()])
    for triton, cpu, right in zip(*seconds, strict=True):
        torch.testing.assert_close(triton, right)
        torch.testing.assert_close(cpu, right)


def test_transforms_and_compilers_get_plain_pytorch(generator, monkeypatch):
    x, gain, bias, y = draw(generator)
    given = dict(training=True, relu=True, backend="triton")
    value = conditional_batch_norm(x, gain, bias, y, **given).square().sum()
    (right,) = torch.autograd.grad(value, x)
    grad = torch.func.grad(lambda x: conditional_batch_norm(x, gain, bias, y, **given).square().sum())(x)
    torch.testing.assert_close(grad, right)
    tangent = torch.func.jvp(lambda x: conditional_batch_norm(x, gain, bias, y, **given), (x,), (x,))[1]
    assert tangent.shape == x.shape and tangent.abs().max() > 1e-8
    out = conditional_batch_norm(x, gain, bias, y, **given)
    batched = torch.autograd.grad(out, x, torch.stack([2 * out.detach()] * 2), is_grads_batched=True)[0]
    torch.testing.assert_close(batched[1], right)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "Relu" in type(conditional_batch_norm(x, gain, bias, y, **given).grad_fn).__name__


@backends
def test_half_precision_and_autocast(backend, generator):
    x, gain, bias, y = draw(generator, dtype=torch.float32)
    x = x.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = conditional_batch_norm(x, gain, bias, y, training=True, relu=True, backend=backend)
    d_gain = torch.autograd.grad(out.float().sum(), gain)[0]
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    assert d_gain.dtype == torch.float32
    wide = (t.detach().double() for t in (gain, bias))
    moments = reference.moments(x.detach().double())
    truth = reference.batch_norm(x.detach().double(), *moments, *wide, y, eps=1e-5, relu=True, one_plus=False)
    assert_close_to_truth("out", out.detach(), truth, precision="bf16")


@wide_backends
def test_no_images_leave_the_statistics_alone(backend, generator):
    statistics = running(generator)
    before = {name: t.clone() for name, t in statistics.items()}
    x, gain = torch.zeros(0, C, 2, 2, requires_grad=True), torch.ones(5, C, requires_grad=True)
    y = torch.zeros(0, dtype=torch.long)
    out = conditional_batch_norm(x.double(), gain.double(), None, y, **statistics, training=True, backend=backend)
    d_x, d_gain = torch.autograd.grad(out.sum(), (x, gain))
    assert out.shape == d_x.shape == x.shape and d_gain.eq(0).all()
    assert all(torch.equal(before[name], statistics[name]) for name in before)


def test_a_map_of_any_strides_and_gains_shared_by_two_inputs(generator):
    x, gain, _, y = draw(generator, size=(4, 6))
    found, right = (
        torch.autograd.grad(
            conditional_batch_norm(x[:, :, ::2, 1::2], gain, 2 * gain, y, training=True, backend=backend).cos().sum(),
            (x, gain),
        )
        for backend in ("triton", "eager")
    )
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def test_running_averages_that_moved_since_are_not_taken_for_the_old(generator):
    x, gain, bias, y = draw(generator)
    statistics = running(generator)
    out = conditional_batch_norm(x, gain, bias, y, **statistics, backend="triton")
    conditional_batch_norm(x, gain, bias, y, **statistics, training=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Ranks:
    """Plays processes one after the other: each round tells what the others gave in the round before."""

    def __init__(self, count):
        self.given = [{} for _ in range(count)]

    def sync(self, rank):
        def gather(mine):
            self.given[rank]["moments"] = mine.clone()
            return torch.stack([given.get("moments", mine) for given in self.given])

        def add(totals):
            self.given[rank]["totals"] = totals.clone()
            totals.copy_(sum(given.get("totals", torch.zeros_like(totals)) for given in self.given))

        return Sync(gather, add)


def test_processes_together_are_one_batch(generator):
    split = 3, 1, 0
    x, gain, bias, y = draw(generator)
    d_out = randn(*x.shape, generator=generator)
    alone, ranks = running(generator), Ranks(len(split))
    whole = {name: t.clone() for name, t in alone.items()}
    for number in range(3):  # moments are right from the second round on, totals in the third
        outs, found = [], []
        for rank, (part, some, d_part) in enumerate(
            zip(x.split(split), y.split(split), d_out.split(split), strict=True)
        ):
            own = [t.clone() for t in alone.values()]
            options = Options(True, 0.3, 1e-3, True, sync=ranks.sync(rank))
            outs.append(fused_batch_norm(part, gain, bias, some, *own, options))
            if number:
                found.append(torch.autograd.grad(outs[-1], (x, gain, bias), d_part, retain_graph=True))
    form = dict(training=True, momentum=0.3, eps=1e-3, relu=True)
    truth = conditional_batch_norm(x, gain, bias, y, **whole, **form, backend="eager")
    torch.testing.assert_close(torch.cat(outs), truth)
    for *some, right in zip(*found, torch.autograd.grad(truth, (x, gain, bias), d_out), strict=True):
        torch.testing.assert_close(sum(some), right)
    for moved, right in zip(own, whole.values(), strict=True):
        torch.testing.assert_close(moved, right)
    with pytest.raises(RuntimeError, match="must be differentiated once, got create_graph=True"):
        torch.autograd.grad(outs[0].sum(), x, create_graph=True)


def test_moments_of_no_process_are_zero():
    mean, var, count = together(torch.zeros(2, 5), 2)
    assert mean.eq(0).all() and var.eq(0).all() and count == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.ones(2, 3)), ValueError, r"x must have 4 axes \(B, C, H, W\)"),
        (dict(training=False), ValueError, "running_mean must be given without training, got None"),
        (dict(running_mean=torch.ones(2)), ValueError, r"running_mean must have shape \(C\) = \(3,\)"),
        (dict(running_mean=torch.ones(3)), ValueError, "running_mean and running_var must be given both or neither"),
        (dict(x=torch.ones(1, 3, 1, 1), y=None), ValueError, "x must have more than 1 value a channel"),
        (dict(y=torch.ones(2)), TypeError, "y must have an integer dtype, got torch.float32"),
        (dict(y=torch.ones(3, dtype=torch.long)), ValueError, r"y must have shape \(B\) = \(2,\)"),
        (dict(gain=torch.ones(5, 4)), ValueError, r"gain must have shape \(num_classes, C\) = \(5, 3\)"),
        (dict(bias=torch.ones(4, 3)), ValueError, r"bias must have shape \(num_classes, C\) = \(5, 3\)"),
        (dict(gain=torch.ones(3), bias=None), ValueError, r"gain must have 2 axes \(num_classes, C\)"),
        (dict(y=None), ValueError, r"gain must have shape \(B, C\) = \(2, 3\)"),
        (dict(backend="sdpa"), ValueError, "backend must be one of auto, eager, cpu, triton, got 'sdpa'"),
    ],
)
def test_bad_arguments(changes, error, message):
    y = torch.zeros(2, dtype=torch.long)
    given = dict(x=torch.ones(2, 3, 2, 2), gain=torch.ones(5, 3), bias=torch.ones(5, 3), y=y, training=True)
    with pytest.raises(error, match=f"conditional_batch_norm: {message}"):
        conditional_batch_norm(**{**given, **changes})

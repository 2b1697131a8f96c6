"""Batch norm and ReLU in shares of the images on the CPU, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from sagan_fast.kernels.batch_norm import cpu, reference
from shared_by_tests import assert_close_to_truth, randn

B, C, H, W = 5, 3, 6, 4
SHAPES = {"none": None, "plain": (C,), "image": (B, C), "class": (4, C)}
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


@pytest.fixture(params=[2 * C * H * W, 10**9], ids=["two images a share", "one share"])
def share(request, monkeypatch):
    monkeypatch.setattr(cpu, "SHARE_ELEMENTS", request.param)


def draw(generator, kind, layout, dtype=torch.float64):
    """Return x, gain, bias and classes; x, gain and bias are leaves."""
    x = (2 * randn(B, C, H, W, generator=generator) + 3).to(dtype).contiguous(memory_format=layout)
    tables = [None if SHAPES[kind] is None else randn(*SHAPES[kind], generator=generator).to(dtype) for _ in range(2)]
    classes = torch.randint(4, (B,), generator=generator) if kind == "class" else None
    return x.requires_grad_(), *(t if t is None else t.requires_grad_() for t in tables), classes


@layouts
@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize(
    ("relu", "one_plus", "training"), [(True, False, True), (False, True, True), (True, True, False)]
)
def test_it_is_the_reference(kind, layout, relu, one_plus, training, share, generator):
    x, gain, bias, classes = draw(generator, kind, layout)
    form = dict(eps=1e-3, one_plus=one_plus)
    mean, var = cpu.batch_norm_moments(x.detach())
    moments = reference.moments(x) if training else (mean, var)
    truth = reference.batch_norm(x, *moments, gain, bias, classes, relu=relu, **form)
    with torch.no_grad():
        out = cpu.batch_norm_fwd(x, mean, var, gain, bias, classes, relu=relu, **form)
        d_out = randn(B, C, H, W, generator=generator)
        found = cpu.batch_norm_bwd(
            d_out, x, out if relu else None, mean, var, gain, bias, classes, wanted=(True, True, True),
            means_of=(lambda totals: totals / (B * H * W)) if training else None, **form,
        )  # fmt: skip
    torch.testing.assert_close(out, truth.detach())
    assert out.stride() == x.stride()
    leaves = [t for t in (x, gain, bias) if t is not None]
    right = torch.autograd.grad(truth, leaves, d_out)
    for grad, expected in zip([grad for grad in found if grad is not None], right, strict=True):
        torch.testing.assert_close(grad, expected)


@layouts
def test_single_precision_is_as_close_as_pytorch_s(layout, share, generator):
    x, gain, bias, classes = draw(generator, "class", layout, torch.float32)
    wide = [t.detach().double() for t in (x, gain, bias)]
    truth = reference.batch_norm(
        wide[0], *reference.moments(wide[0]), *wide[1:], classes, eps=1e-5, relu=False, one_plus=False
    )
    with torch.no_grad():
        moments = cpu.batch_norm_moments(x)
        out = cpu.batch_norm_fwd(x, *moments, gain, bias, classes, eps=1e-5, relu=False, one_plus=False)
    assert_close_to_truth("out", out, truth, precision="fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_averages_move_as_pytorch_s(dtype, generator):
    x = randn(B, C, H, W, generator=generator)
    mine = [randn(C, generator=generator).to(dtype), randn(C, generator=generator).to(dtype)]
    theirs = [t.double() for t in mine]
    cpu.batch_norm_moments(x, *mine, momentum=0.3)
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    for found, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, right.to(dtype))


def test_gradients_that_nobody_wants_are_not_made(generator):
    x, gain, bias, classes = draw(generator, "class", torch.contiguous_format)
    with torch.no_grad():
        found = cpu.batch_norm_bwd(
            torch.ones_like(x), x, None, *cpu.batch_norm_moments(x), gain, bias, classes, eps=1e-5, one_plus=False,
            wanted=(False, True, False), means_of=None,
        )  # fmt: skip
    assert [grad is None for grad in found] == [True, False, True]


def test_it_runs_on_single_and_double_precision_of_the_cpu():
    assert cpu.runs_on(torch.zeros(1)) and cpu.runs_on(torch.zeros(1).double())
    assert not cpu.runs_on(torch.zeros(1).bfloat16()) and not cpu.runs_on(torch.zeros(1, device="meta"))

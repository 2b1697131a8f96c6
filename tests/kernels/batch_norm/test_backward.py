import pytest
import torch

from sagan_fast.kernels.batch_norm import backward, reference
from shared_by_tests import assert_close_to_truth, randn

FORMATS = [torch.contiguous_format, torch.channels_last]
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
RAGGED = (2, 3, 6, 13)  # several tiles a program, and several programs, in both formats
EPS = 1e-3


def case(shape, kind, training, memory_format, generator, dtype=torch.float32, relu=True):
    """Return x, d_out, mean, var, gain, bias, classes, and the gradients of x, gain and bias in float64.

    x is drawn again where the ReLU's input is so near to 0 that float32's rounding may decide its sign.
    """
    B, C = shape[:2]
    size = {"none": None, "plain": (C,), "image": (B, C), "class": (5, C)}[kind]
    gain, bias = (None if size is None else randn(*size, generator=generator).float() for _ in range(2))
    classes = torch.tensor([4, 1, 4, 0])[:B] if kind == "class" else None
    form = dict(eps=EPS, relu=False, one_plus=relu)
    while True:
        x = (randn(*shape, generator=generator) * 2 + 3).to(dtype).contiguous(memory_format=memory_format)
        mean, var = reference.moments(x.double()) if training else (torch.full((C,), 2.5), torch.full((C,), 3.0))
        leaves = [None if t is None else t.double().requires_grad_() for t in (x, gain, bias)]
        statistics = reference.moments(leaves[0]) if training else (mean.double(), var.double())
        out = reference.batch_norm(leaves[0], *statistics, *leaves[1:], classes, **form)
        if out.abs().min() > 1e-5:
            break
    d_out = randn(*shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    wanted = [leaf for leaf in leaves if leaf is not None]
    truths = torch.autograd.grad(out.relu() if relu else out, wanted, d_out.double())
    return (x, d_out, mean.float(), var.float(), gain, bias, classes), [*truths, None, None][:3]


def gradients(x, d_out, mean, var, gain, bias, classes, training, relu=True):
    form = dict(eps=EPS, relu=relu, one_plus=relu)
    sums = backward.batch_norm_bwd_sums(d_out, x, mean, var, gain, bias, classes, **form)
    d_gain, d_bias = backward.batch_norm_bwd_tables(sums, x, gain, bias, classes)
    factor = x.shape[1] / x.numel()
    totals = backward.batch_norm_bwd_totals(sums, x, gain, classes, factor=factor, one_plus=relu) if training else None
    d_x = backward.batch_norm_bwd_input(d_out, x, mean, var, gain, bias, classes, totals, **form)
    return d_x, d_gain, d_bias


def check(inputs, truths, training, relu=True):
    found = gradients(*inputs, training, relu)
    for name, one, truth in zip(("x", "gain", "bias"), found, truths, strict=True):
        assert (one is None) == (truth is None), name
        if truth is not None:
            assert_close_to_truth(f"d_{name}", one.cpu(), truth)
    return found


@pytest.mark.parametrize(
    ("kind", "training", "memory_format"),
    [
        ("none", True, torch.channels_last),
        ("plain", True, torch.contiguous_format),
        ("plain", False, torch.channels_last),
        ("image", False, torch.contiguous_format),
        ("class", True, torch.contiguous_format),
        ("class", True, torch.channels_last),
    ],
)
def test_matches_float64(kind, training, memory_format, generator, small_tiles):
    inputs, truths = case(RAGGED, kind, training, memory_format, generator)
    d_x, d_gain, _ = check(inputs, truths, training)
    assert d_x.stride() == inputs[0].stride()
    if kind == "class":
        assert d_gain[2:4].eq(0).all(), "no image of these classes"


@formats
def test_more_channels_than_a_tile(memory_format, generator, small_tiles):
    check(*case((3, 33, 2, 2), "class", True, memory_format, generator), True)


@pytest.mark.parametrize(("dtype", "relu"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
def test_any_dtype(dtype, relu, generator):
    inputs, truths = case((3, 5, 7, 9), "class", True, torch.channels_last, generator, dtype, relu)
    d_x, d_gain, _ = check(inputs, truths, True, relu)
    assert d_x.dtype == dtype and d_gain.dtype == torch.float32


def test_equal_inputs_give_equal_bits(generator, small_tiles):
    inputs, _ = case(RAGGED, "class", True, torch.contiguous_format, generator)
    first, second = gradients(*inputs, True), gradients(*inputs, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_wanted_is_computed(generator):
    inputs, truths = case((3, 5, 2, 2), "class", True, torch.contiguous_format, generator)
    x, d_out, mean, var, gain, bias, classes = inputs
    sums = backward.batch_norm_bwd_sums(d_out, x, mean, var, gain, bias, classes, eps=EPS, relu=True, one_plus=True)
    d_gain, d_bias = backward.batch_norm_bwd_tables(sums, x, None, bias, classes)
    assert d_gain is None
    assert_close_to_truth("d_bias", d_bias, truths[2])
    assert backward.batch_norm_bwd_tables(sums, x, None, None, classes) == (None, None)


def test_gradients_of_another_layout_are_refused():
    x, ones = torch.ones(3, 2, 4, 2), torch.ones(2)
    d_out = torch.ones(3, 2, 4, 2).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="batch_norm_bwd_sums: d_out must have the strides of x"):
        backward.batch_norm_bwd_sums(d_out, x, ones, ones, ones, ones, eps=EPS, relu=True)
    with pytest.raises(ValueError, match=r"batch_norm_bwd_input: d_out must have shape \(B, C, H, W\)"):
        backward.batch_norm_bwd_input(d_out[1:], x, ones, ones, ones, ones, None, None, eps=EPS, relu=True)


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_map_on_gpu(dtype, memory_format, generator):
    inputs, truths = case((4, 96, 16, 17), "class", True, memory_format, generator, dtype)
    check([None if tensor is None else tensor.cuda() for tensor in inputs], truths, True)

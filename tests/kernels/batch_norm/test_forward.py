import pytest
import torch

from sagan_fast.kernels.batch_norm import reference
from sagan_fast.kernels.batch_norm.forward import batch_norm_fwd, batch_norm_moments
from shared_by_tests import assert_close_to_truth, randn

RAGGED = (2, 3, 6, 13)  # several tiles a program, and several programs, in both formats
SHAPES = [RAGGED, (3, 33, 2, 2), (5, 1, 1, 1)]
FORMATS = [torch.contiguous_format, torch.channels_last]
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def draw(shape, memory_format, generator, dtype=torch.float32, mean=0.0):
    x = randn(*shape, generator=generator) * 2 + mean
    return x.to(dtype).contiguous(memory_format=memory_format)


@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_match_float64(shape, memory_format, generator, small_tiles):
    x = draw(shape, memory_format, generator, mean=30.0)
    mean, var = batch_norm_moments(x)
    truth = reference.moments(x.double())
    assert mean.dtype == var.dtype == torch.float32
    assert_close_to_truth("mean", mean, truth[0])
    assert_close_to_truth("var", var, truth[1])


@dtypes
def test_moments_of_any_dtype_are_float32(dtype, generator):
    x = draw((3, 5, 7, 9), torch.channels_last, generator, dtype)
    for name, found, truth in zip(("mean", "var"), batch_norm_moments(x), reference.moments(x.double()), strict=True):
        assert_close_to_truth(name, found, truth)


@formats
def test_a_large_mean_and_odd_first_values_cancel_nothing(memory_format, generator, small_tiles):
    x = draw(RAGGED, memory_format, generator, mean=1000.0)
    x[0, :, 0, 0] = -1000.0
    _, var = batch_norm_moments(x)
    assert_close_to_truth("var", var, reference.moments(x.double())[1])
    constant = torch.full(RAGGED, 1000.1).contiguous(memory_format=memory_format)
    assert batch_norm_moments(constant)[1].ge(0).all() and batch_norm_moments(constant)[1].lt(1e-5).all()


def test_equal_inputs_give_equal_bits_and_nan_stays(generator, small_tiles):
    x = draw(RAGGED, torch.contiguous_format, generator)
    first, second = batch_norm_moments(x), batch_norm_moments(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x[1, 1, 3, 3] = float("nan")
    mean, var = batch_norm_moments(x)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, True, False]


def test_running_averages_move_as_torch_moves_them(generator):
    x = draw((3, 5, 4, 3), torch.contiguous_format, generator)
    running = [randn(5, generator=generator).float(), randn(5, generator=generator).float().abs()]
    expected = [tensor.double() for tensor in running]
    torch.nn.functional.batch_norm(x.double(), *expected, training=True, momentum=0.3)
    batch_norm_moments(x, *running, momentum=0.3)
    for found, truth in zip(running, expected, strict=True):
        assert_close_to_truth("running", found, truth)


def tables(kind, B, C, generator):
    """Return gain, bias and classes: none, one for all images, one an image, or tables of four classes."""
    size = {"none": None, "plain": (C,), "image": (B, C), "class": (4, C)}[kind]
    gain, bias = (None if size is None else randn(*size, generator=generator).float() for _ in range(2))
    return gain, bias, torch.randint(4, (B,), generator=generator) if kind == "class" else None


@pytest.mark.parametrize(
    ("kind", "memory_format"),
    [
        ("none", torch.contiguous_format),
        ("plain", torch.channels_last),
        ("image", torch.contiguous_format),
        ("class", torch.contiguous_format),
        ("class", torch.channels_last),
    ],
)
def test_matches_float64(kind, memory_format, generator, small_tiles):
    x = draw(RAGGED, memory_format, generator, mean=3.0)
    gain, bias, classes = tables(kind, *RAGGED[:2], generator)
    mean, var = (t.float() for t in reference.moments(x.double()))
    for relu in (True, False):
        form = dict(eps=1e-3, relu=relu, one_plus=not relu)
        out = batch_norm_fwd(x, mean, var, gain, bias, classes, **form)
        wide = (None if t is None else t.double() for t in (x, mean, var, gain, bias))
        assert_close_to_truth("out", out, reference.batch_norm(*wide, classes, **form))
        assert out.stride() == x.stride()


@dtypes
def test_the_result_has_the_dtype_of_x(dtype, generator):
    x = draw((3, 5, 7, 9), torch.channels_last, generator, dtype)
    mean, var = (t.float() for t in reference.moments(x.double()))
    gain, bias, classes = tables("class", 3, 5, generator)
    out = batch_norm_fwd(x, mean, var, gain, bias.to(dtype), classes, eps=1e-5, relu=True)
    wide = (t.double() for t in (x, mean, var, gain, bias.to(dtype)))
    truth = reference.batch_norm(*wide, classes, eps=1e-5, relu=True, one_plus=False)
    assert out.dtype == dtype
    assert_close_to_truth("out", out, truth)


def test_a_class_that_does_not_exist_gives_nan_and_reads_nothing():
    x, ones = torch.ones(3, 2, 1, 2), torch.ones(2)
    out = batch_norm_fwd(
        x, ones, ones, torch.ones(4, 2), torch.ones(4, 2), torch.tensor([-1, 3, 4]), eps=0.0, relu=True
    )
    assert out.isnan().flatten(1).all(1).tolist() == [True, False, True] and out[1].eq(1).all()


def test_tables_that_do_not_fit_are_refused():
    x, ones = torch.ones(3, 2, 1, 2), torch.ones(2)
    with pytest.raises(ValueError, match=r"batch_norm_fwd: bias must have shape \(C\) = \(2,\), got \(3,\)"):
        batch_norm_fwd(x, ones, ones, ones, torch.ones(3), eps=0.0, relu=True)
    with pytest.raises(ValueError, match=r"gain must have shape \(B, C\) = \(3, 2\), got \(4, 2\)"):
        batch_norm_fwd(x, ones, ones, torch.ones(4, 2), None, eps=0.0, relu=True)
    with pytest.raises(ValueError, match="gain must be contiguous"):
        batch_norm_fwd(x, ones, ones, torch.ones(2, 3).T, None, eps=0.0, relu=True)
    with pytest.raises(ValueError, match="running_mean must be contiguous"):
        batch_norm_moments(x, torch.ones(4)[::2], torch.ones(2), 0.1)


@pytest.mark.gpu
@formats
@dtypes
def test_a_large_map_on_gpu(dtype, memory_format, generator):
    x = draw((8, 96, 64, 65), memory_format, generator, dtype, mean=3.0)
    gain, bias, classes = tables("class", 8, 96, generator)
    on_gpu = (None if t is None else t.cuda() for t in (gain, bias, classes))
    mean, var = batch_norm_moments(x.cuda())
    again = batch_norm_moments(x.cuda())
    assert torch.equal(mean, again[0]) and torch.equal(var, again[1])
    out = batch_norm_fwd(x.cuda(), mean, var, *on_gpu, eps=1e-5, relu=True)
    moments = reference.moments(x.double())
    truth = reference.batch_norm(
        x.double(), *moments, gain.double(), bias.double(), classes, eps=1e-5, relu=True, one_plus=False
    )
    assert_close_to_truth("out", out.cpu(), truth)

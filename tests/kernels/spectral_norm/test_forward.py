import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.kernels.spectral_norm import eager
from sagan_fast.kernels.spectral_norm.forward import spectral_norm_fwd
from sagan_fast.kernels.spectral_norm.tables import column_groups, offsets
from shared_by_tests import assert_close_to_truth, spectral_norm_inputs, spectral_norm_truth

# One of each width of row tile, with odd rows and columns, single rows and columns among them.
SHAPES = [
    (64, 27), (3, 576), (1, 1024), (16, 128), (130, 77), (1, 1), (70, 3), (9, 64, 3, 3), (3, 1201), (3, 2304),
    (2, 4608), (2, 9216),
]  # fmt: skip
NARROW = [(64, 27), (3, 130), (130, 77), (1, 1), (1030, 4), (6, 8, 3, 3)]
"""For the mirrored sweep, whose programs are columns: the interpreter takes milliseconds each."""

launchers = pytest.mark.parametrize("fwd", [spectral_norm_fwd, eager.spectral_norm_fwd], ids=["triton", "eager"])


def check(fwd, weights, us, vs, n_power_iterations=1, update=True, v_first=False, out_dtype=None):
    truths = [
        spectral_norm_truth(w, u, v, n_power_iterations, update, v_first)
        for w, u, v in zip(weights, us, vs, strict=True)
    ]
    out_dtype = out_dtype or weights[0].dtype
    out, sigmas, flat_u, flat_v = fwd(
        weights, us, vs, n_power_iterations=n_power_iterations, update=update, v_first=v_first, out_dtype=out_dtype
    )
    assert out.dtype == out_dtype and sigmas.dtype == torch.float32
    starts = [offsets([x.numel() for x in xs])[0] for xs in (weights, us, vs)]
    for i, (w, u, v, (out_truth, sigma, u_truth, v_truth)) in enumerate(zip(weights, us, vs, truths, strict=True)):
        name = f"{tuple(w.shape)}: "
        part = out[starts[0][i] : starts[0][i] + w.numel()].as_strided(w.shape, w.stride())
        C, S = column_groups(w)
        stored = v_truth.view(C, S).T.flatten()
        assert_close_to_truth(name + "W/sigma", part, out_truth)
        assert_close_to_truth(name + "sigma", sigmas[i], sigma)
        assert_close_to_truth(name + "u", u, u_truth)
        assert_close_to_truth(name + "v", v, v_truth)
        assert_close_to_truth(name + "copy of u", flat_u[starts[1][i] : starts[1][i] + u.numel()], u_truth)
        assert_close_to_truth(name + "copy of v", flat_v[starts[2][i] : starts[2][i] + v.numel()], stored)


@launchers
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_float64(generator, fwd, dtype, update):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator, dtype)
    check(fwd, weights, us, vs, update=update)


@launchers
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_both_orders_and_several_iterations(generator, fwd, v_first, n_power_iterations):
    weights, us, vs = spectral_norm_inputs(NARROW, generator)
    check(fwd, weights, us, vs, n_power_iterations, v_first=v_first)


@launchers
@pytest.mark.parametrize("v_first", [False, True])
def test_channels_last_weights_are_read_as_they_lie(generator, fwd, v_first):
    weights, us, vs = spectral_norm_inputs([(9, 20, 3, 3), (16, 3, 3, 3), (4, 8, 1, 1)], generator)
    weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    check(fwd, weights, us, vs, v_first=v_first)


@launchers
def test_other_dtype_of_the_result_and_weights_that_start_anywhere(generator, fwd):
    weights, us, vs = spectral_norm_inputs([(32, 128), (5, 300), (16, 64)], generator)
    shifted = [torch.cat([torch.zeros(1), w.flatten()])[1:].view(w.shape) for w in weights]
    assert any(w.data_ptr() % 16 for w in shifted)
    check(fwd, shifted, us, vs, out_dtype=torch.float16)
    check(fwd, shifted, us, vs, out_dtype=torch.bfloat16)


@launchers
def test_lengths_are_not_taken_below_eps_as_in_torch(fwd):
    weight, u, v = torch.full((4, 8), 1e-4), torch.full((4,), 0.5), torch.full((8,), 0.125**0.5)
    module = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 4, bias=False), eps=1e-2)
    norm = module.parametrizations.weight
    with torch.no_grad():
        norm.original.copy_(weight), norm[0]._u.copy_(u), norm[0]._v.copy_(v)
    w_torch = module.weight.detach()
    out, _, _, _ = fwd([weight], [u], [v], eps=1e-2, out_dtype=torch.float32)
    torch.testing.assert_close(out[:32].view(4, 8), w_torch)
    torch.testing.assert_close(u, norm[0]._u)
    torch.testing.assert_close(v, norm[0]._v)


@launchers
@pytest.mark.parametrize("n_power_iterations", [1, 2])
@pytest.mark.parametrize("v_first", [False, True])
def test_zeros_give_nan_as_in_torch_but_leave_u_and_v(generator, fwd, v_first, n_power_iterations):
    weights, us, vs = spectral_norm_inputs([(6, 10), (5, 3, 3, 3), (6, 10), (4, 9)], generator)
    bad = {0: 0.0, 1: float("nan"), 2: float("inf")}
    for i, value in bad.items():
        weights[i] = torch.full_like(weights[i], value)
    u_before, v_before = ([x.clone() for x in xs] for xs in (us, vs))
    out, sigmas, _, _ = fwd(
        weights, us, vs, v_first=v_first, n_power_iterations=n_power_iterations, out_dtype=torch.float32
    )
    starts, _ = offsets([w.numel() for w in weights])
    for i, (start, weight) in enumerate(zip(starts, weights, strict=True)):
        part = out[start : start + weight.numel()]
        assert part.isnan().all() if i in bad else part.isfinite().all()
        assert torch.equal(us[i], u_before[i]) == torch.equal(vs[i], v_before[i]) == (i in bad)
    assert sigmas[0] == 0


@launchers
def test_same_bits_every_time_and_into_memory_given(generator, fwd):
    weights, us, vs = spectral_norm_inputs([(130, 77), (1100, 260)], generator)
    first = fwd(weights, [u.clone() for u in us], [v.clone() for v in vs], out_dtype=torch.float32)
    out = torch.full_like(first[0], 3.0)
    second = fwd(weights, us, vs, out_dtype=torch.float32, out=out)
    assert second[0] is out
    for a, b in zip(first[1:], second[1:], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    for start, weight in zip(offsets([w.numel() for w in weights])[0], weights, strict=True):
        assert torch.equal(first[0][start : start + weight.numel()], out[start : start + weight.numel()])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda w, u, v: ([], [], []), ValueError, "must have one length"),
        (lambda w, u, v: ([w[0].double()], u, v), TypeError, r"weights\[0\] must have dtype"),
        (lambda w, u, v: ([w[0].flatten()], u, v), ValueError, "at least 2 axes"),
        (lambda w, u, v: ([w[0].t()], v, u), ValueError, "must be contiguous or channels_last"),
        (lambda w, u, v: ([torch.zeros(1, 16385)], u, v), ValueError, "1 to 16384"),
        (lambda w, u, v: (w, [u[0].half()], v), TypeError, r"us\[0\] must have dtype"),
        (lambda w, u, v: (w, u, [v[0][1:]]), ValueError, r"vs\[0\] must have shape"),
        (lambda w, u, v: (w, u, [v[0].repeat(2)[::2]]), ValueError, "contiguous"),
    ],
)
def test_refuses_what_it_cannot_take(change, error, match):
    with pytest.raises(error, match=match):
        spectral_norm_fwd(*change([torch.ones(6, 8)], [torch.ones(6)], [torch.ones(8)]))


def test_refuses_no_iterations():
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1"):
        spectral_norm_fwd([torch.ones(6, 8)], [torch.ones(6)], [torch.ones(8)], n_power_iterations=0)


@pytest.mark.slow
@launchers
@pytest.mark.parametrize("first", range(0, 44, 11))
def test_all_sagan_matrices(generator, fwd, first):
    weights, us, vs = spectral_norm_inputs(SAGAN_MATRICES[first : first + 11], generator)
    check(fwd, weights, us, vs)


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_all_sagan_matrices_on_gpu(generator, dtype, out_dtype, v_first):
    weights, us, vs = map(on_gpu, spectral_norm_inputs(SAGAN_MATRICES, generator, dtype))
    check(spectral_norm_fwd, weights, us, vs, out_dtype=out_dtype, v_first=v_first)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [SHAPES, [(64, 13824), (3, 16383), (16384, 100)]])
@pytest.mark.parametrize("n_power_iterations", [1, 2])
def test_all_widths_on_gpu(generator, shapes, n_power_iterations):
    weights, us, vs = map(on_gpu, spectral_norm_inputs(shapes, generator))
    check(spectral_norm_fwd, weights, us, vs, n_power_iterations)

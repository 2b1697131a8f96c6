import pytest
import torch

from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.kernels.spectral_norm import eager, reference
from sagan_fast.kernels.spectral_norm.backward import spectral_norm_bwd
from sagan_fast.kernels.spectral_norm.tables import offsets
from shared_by_tests import assert_close_to_truth, randn, spectral_norm_inputs

SHAPES = [(64, 27), (3, 576), (1, 1024), (16, 128), (130, 77), (9, 64, 3, 3), (3, 1201), (40, 1100)]

launchers = pytest.mark.parametrize("bwd", [spectral_norm_bwd, eager.spectral_norm_bwd], ids=["triton", "eager"])


def check(bwd, weights, us, vs, grads, device="cpu"):
    weights, us, vs = ([x.to(device) for x in xs] for xs in (weights, us, vs))
    grads = [None if grad is None else grad.to(device) for grad in grads]
    _, sigmas, u, v = eager.spectral_norm_fwd(weights, us, vs, update=False, out_dtype=torch.float32)
    flat = bwd(grads, weights, sigmas, u, v)
    assert flat.dtype == weights[0].dtype
    starts, _ = offsets([w.numel() for w in weights])
    for start, w, u, v, grad in zip(starts, weights, us, vs, grads, strict=True):
        if grad is None:
            continue
        matrix, u, v = w.double().flatten(1), u.double(), v.double()
        truth = reference.normalise_backward(grad.double().flatten(1), matrix, u, v, u @ matrix @ v).view(w.shape)
        d_weight = flat[start : start + w.numel()].as_strided(w.shape, w.stride())
        assert_close_to_truth(f"dW of {tuple(w.shape)}", d_weight, truth)


def grads_for(weights, generator, dtype=torch.float32):
    return [randn(*w.shape, generator=generator, dtype=dtype) for w in weights]


@launchers
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_matches_float64(generator, bwd, dtype, grad_dtype):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator, dtype)
    check(bwd, weights, us, vs, grads_for(weights, generator, grad_dtype))


@launchers
def test_absent_grads_are_left_out(generator, bwd):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator)
    grads = grads_for(weights, generator)
    check(bwd, weights, us, vs, [None if i % 2 else grad for i, grad in enumerate(grads)])


@launchers
def test_grads_and_weights_of_any_layout(generator, bwd):
    weights, us, vs = spectral_norm_inputs([(9, 20, 3, 3), (9, 20, 3, 3), (8, 4, 3, 3)], generator)
    grads = grads_for(weights, generator)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    grads[1] = grads[1].contiguous(memory_format=torch.channels_last)
    grads[2] = torch.cat([torch.zeros(1), grads[2].flatten()])[1:].view(grads[2].shape)
    check(bwd, weights, us, vs, grads)


def test_no_grads_launch_nothing():
    weight = torch.ones(4, 8)
    flat = spectral_norm_bwd([None], [weight], torch.ones(1), torch.ones(64), torch.ones(64))
    assert flat.numel() == 64


def test_refuses_grads_that_do_not_fit():
    weight, ones = torch.ones(4, 8), torch.ones(64)
    with pytest.raises(ValueError, match=r"grads\[0\] must have shape"):
        spectral_norm_bwd([torch.ones(4, 7)], [weight], torch.ones(1), ones, ones)
    with pytest.raises(TypeError, match=r"grads\[1\] must have dtype"):
        spectral_norm_bwd([torch.ones(4, 8), torch.ones(4, 8).half()], [weight, weight], torch.ones(2), ones, ones)


@pytest.mark.slow
@launchers
@pytest.mark.parametrize("first", range(0, 44, 11))
def test_all_sagan_matrices(generator, bwd, first):
    weights, us, vs = spectral_norm_inputs(SAGAN_MATRICES[first : first + 11], generator)
    check(bwd, weights, us, vs, grads_for(weights, generator))


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_all_sagan_matrices_on_gpu(generator, grad_dtype):
    weights, us, vs = spectral_norm_inputs(SAGAN_MATRICES, generator)
    check(spectral_norm_bwd, weights, us, vs, grads_for(weights, generator, grad_dtype), device="cuda")

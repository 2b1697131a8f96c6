"""The kernels of the tangent and of the second gradients against the reference in float64."""

import pytest
import torch

from sagan_fast.kernels import tiles
from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.second import attention_second
from sagan_fast.kernels.configs import LaunchConfig
from shared_by_tests import assert_gradient, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # B, N, M, D_QK, D_V
    (2, 70, 40, 8, 32),
    (1, 33, 17, 3, 5),  # nothing a multiple of anything
    (1, 64, 64, 24, 96),
    (2, 5, 1, 1, 1),  # one key
]
NAMES = ("tangent", "d_q", "d_k", "d_v")


def inputs(shape, generator, dtype):
    """Return q, k, v, d_o and the tangents of q, k and v, logits of order 1."""
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    made = [randn(*size, generator=generator) for size in (*sizes, *sizes[:3])]
    made[0] *= D_QK**-0.5
    return [t.to(DEVICE, dtype) for t in made]


def run(tensors, scale=1.0, **configs):
    q, k, v, d_o, *tangents = tensors
    return attention_second(d_o, q, k, v, *attention_fwd(q, k, v, scale), *tangents, scale, **configs)


def truth(tensors, scale=1.0, dtype=torch.float64):
    q, k, v, d_o, *tangents = (t.to(dtype) for t in tensors)
    return reference.attention_second(d_o, q, k, v, *tangents, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, generator):
    tensors = inputs(shape, generator, dtype)
    found, exact, eager = run(tensors), truth(tensors), truth(tensors, dtype=dtype)
    whole = max(float(t.norm()) for t in exact)
    for name, ours, right, plain in zip(NAMES, found, exact, eager, strict=True):
        assert ours.dtype == dtype
        assert_gradient(name, ours, right, plain, terms=right.new_tensor(whole) if shape[2] == 1 else None)


@pytest.mark.parametrize("scale", [0.3, -0.7])
def test_any_scale_strides_and_tiles(scale, generator):
    tensors = inputs((2, 70, 40, 8, 24), generator, torch.float32)
    exact = truth(tensors, scale)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    small = LaunchConfig(BLOCK_N=16, BLOCK_M=32, num_warps=4)
    for given, configs in ((tensors, {}), (strided, {"dkv_config": small, "dq_config": small})):
        for name, ours, right in zip(NAMES, run(given, scale, **configs), exact, strict=True):
            assert (ours.double() - right).norm() <= 1e-5 * right.norm(), name


def test_large_logits_stay_finite_and_right(generator):
    tensors = inputs((1, 40, 50, 8, 16), generator, torch.float32)
    tensors[0] *= 60  # logits of some hundreds: one key takes all
    for ours, right in zip(run(tensors), truth(tensors), strict=True):
        assert ours.isfinite().all() and (ours.double() - right).norm() <= 1e-3 * right.norm() + 1e-3


def test_a_flat_grid_and_poisoned_results(generator, monkeypatch):
    tensors = inputs((3, 40, 20, 4, 8), generator, torch.float32)
    once = run(tensors)
    monkeypatch.setattr(tiles, "MAX_IMAGES", 2)
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(run(tensors), once, strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 0, 3, 5), (1, 0, 4, 3, 5), (0, 4, 4, 3, 5)])
def test_nothing_to_compute_gives_zeros(shape, generator):
    tensors = inputs(shape, generator, torch.float32)
    assert all(not t.any() for t in run(tensors))

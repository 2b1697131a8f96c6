import pytest
import torch

from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.ops.spectral_norm import spectral_norm_group
from sagan_fast.testing import assert_close_to_truth, randn

SHAPES = [(64, 3, 3, 3), (3, 64, 3, 3), (1, 1024), (16, 128, 1, 1), (130, 77)]


def make(generator, shapes=SHAPES):
    weights = [randn(*shape, generator=generator, dtype=torch.float32) for shape in shapes]
    us = [torch.nn.functional.normalize(randn(w.shape[0], generator=generator).float(), dim=0) for w in weights]
    vs = [torch.nn.functional.normalize(randn(w[0].numel(), generator=generator).float(), dim=0) for w in weights]
    return weights, us, vs


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("update", [True, False])
def test_matches_float64(generator, update, n_power_iterations):
    weights, us, vs = make(generator)
    truth = []
    for w, u, v in zip(weights, us, vs, strict=True):
        u, v, matrix = u.double(), v.double(), w.double().flatten(1)
        if update:
            u, v = reference.power_iteration(matrix, u, v, n_power_iterations)
        truth.append((reference.normalise(matrix, u, v)[0].view_as(w), u, v))
    outs = spectral_norm_group(weights, us, vs, n_power_iterations=n_power_iterations, update=update)
    for out, u, v, (out_truth, u_truth, v_truth) in zip(outs, us, vs, truth, strict=True):
        assert_close_to_truth("W/sigma", out, out_truth)
        assert_close_to_truth("u", u, u_truth)
        assert_close_to_truth("v", v, v_truth)

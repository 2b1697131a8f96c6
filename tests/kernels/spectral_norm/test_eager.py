"""The results are held by test_forward.py and test_backward.py, which run both launchers on the same inputs."""

import torch

from benchmarks.accuracy import rel_rms
from sagan_fast.kernels.spectral_norm import eager
from sagan_fast.kernels.spectral_norm.forward import spectral_norm_fwd
from shared_by_tests import assert_close_to_truth, spectral_norm_inputs, spectral_norm_truth


def test_blocks_of_rows_that_do_not_divide_the_rows(generator, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 1000)
    weights, us, vs = spectral_norm_inputs([(130, 77), (5, 1300)], generator)
    truths = [spectral_norm_truth(*one) for one in zip(weights, us, vs, strict=True)]
    eager.spectral_norm_fwd(weights, us, vs, out_dtype=torch.float32)
    for u, v, (_, _, u_truth, v_truth) in zip(us, vs, truths, strict=True):
        assert_close_to_truth("u", u, u_truth)
        assert_close_to_truth("v", v, v_truth)


def test_flat_results_are_laid_out_as_the_kernels(generator):
    weights, us, vs = spectral_norm_inputs([(7, 3, 3, 3), (5, 65), (3, 2)], generator)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    theirs = spectral_norm_fwd(weights, us, vs, update=False)
    ours = eager.spectral_norm_fwd(weights, us, vs, update=False, out_dtype=torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        written = ~a.isnan()
        assert torch.equal(written, ~b.isnan())
        assert rel_rms(a[written], b[written]) < 1e-6

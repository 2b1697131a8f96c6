import pytest
import torch

from sagan_fast.kernels.spectral_norm.addresses import addresses_of
from sagan_fast.kernels.spectral_norm.sweep import Buffers, launch_sweep
from sagan_fast.kernels.spectral_norm.tables import OFFSET_UNIT, tables_for
from shared_by_tests import assert_close_to_truth, spectral_norm_inputs

SHAPES = [(40, 27), (130, 77), (5, 1201), (9, 1024), (6, 2304)]


@pytest.mark.parametrize("v_first", [False, True], ids=["rows", "columns"])
def test_both_products_of_one_reading(generator, v_first):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator)
    tables = tables_for(weights, v_first)
    layout = tables.layout
    _, z_size, t_size, partial_size = layout.sizes
    z, t, partial, norms = (torch.empty(n) for n in (z_size, t_size, partial_size, 16 * len(SHAPES)))
    launch_sweep(
        tables,
        addresses_of(weights, us, vs),
        Buffers(z, t, partial, norms),
        torch.float32,
        1e-12,
        first=True,
        update=True,
    )
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        w = weight.double()
        R, K = w.shape
        first, second = (
            (w.T @ u.double(), w @ (w.T @ u.double())) if v_first else (w @ v.double(), w.T @ (w @ v.double()))
        )
        stored = t[layout.t[i] :][:K] if v_first else z[layout.z[i] :][:R]
        sums = partial[layout.partial[i] :][: layout.parts[i] * len(second)].view(layout.parts[i], -1).sum(0)
        assert layout.partial[i] % OFFSET_UNIT == 0
        assert_close_to_truth(f"{R}x{K} first", stored, first, precision="fp32")
        assert_close_to_truth(f"{R}x{K} second", sums, second, precision="fp32")

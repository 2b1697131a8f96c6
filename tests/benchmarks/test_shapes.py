"""The standard shapes and what they need, against counts made another way."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import BLOCK_SHAPES, SAGAN_MATRICES, STANDARD_SHAPES, BlockShape


def block(x, theta, phi, g, o, pool):
    """The block's products with PyTorch's operators; gamma and biases need none."""
    conv, pooled = torch.nn.functional.conv2d, torch.nn.functional.max_pool2d
    q, k, v = conv(x, theta), conv(x, phi), conv(x, g)
    k, v = (pooled(k, 2), pooled(v, 2)) if pool else (k, v)
    beta = torch.softmax(q.flatten(2).transpose(1, 2) @ k.flatten(2), -1)
    y = (v.flatten(2) @ beta.transpose(1, 2)).unflatten(2, x.shape[2:])
    return conv(y, o) if o is not None else y


@pytest.mark.parametrize("pool, out_proj", [(True, True), (False, False)])
def test_needed_flops_are_those_of_the_operators(pool, out_proj):
    shape = BlockShape("small", B=2, C=24, H=6, W=10, d_qk=3, d_v=12, pool=pool, out_proj=out_proj)
    sizes = [(3, 24), (3, 24), (12, 24), (24, 12)]
    x, theta, phi, g, o = (
        torch.randn(*size, requires_grad=True) for size in [(2, 24, 6, 10), *((*size, 1, 1) for size in sizes)]
    )
    with FlopCounterMode(display=False) as forward:
        y = block(x, theta, phi, g, o if out_proj else None, pool)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == shape.flops()
    scores_again = 2 * shape.B * shape.N * shape.M * shape.d_qk  # eager keeps the map, so it does not count this
    assert forward.get_total_flops() + backward.get_total_flops() + scores_again == shape.flops(backward=True)


def test_needed_bytes_and_exps():
    shape = BlockShape("small", B=2, C=8, H=4, W=4, d_qk=1, d_v=4)
    weights = 8 * (2 + 4) + 4 * 8
    assert shape.N == 16 and shape.M == 4
    assert shape.exps() == 2 * 16 * 4 and shape.exps(backward=True) == 2 * shape.exps()
    assert shape.bytes("bf16") == 2 * (2 * 2 * 8 * 16 + weights)
    assert shape.bytes("fp32", backward=True) == 4 * (5 * 2 * 8 * 16 + 3 * weights)


def test_odd_maps_pool_as_pytorch_does():
    assert BlockShape("odd", 1, 8, 7, 5, 1, 4).M == 3 * 2


def test_the_standard_shapes_are_the_eight_of_the_design():
    assert len(STANDARD_SHAPES) == 8 and len({shape.name for shape in BLOCK_SHAPES}) == 9
    sizes = {(s.C, s.H, s.d_qk, s.d_v, s.pool) for s in STANDARD_SHAPES}
    assert (192, 64, 24, 96, True) in sizes and (96, 64, 12, 48, True) in sizes
    assert (64, 32, 8, 64, False) in sizes and (128, 16, 16, 128, False) in sizes
    assert BLOCK_SHAPES[-1].N == 128 * 128 and BLOCK_SHAPES[-1].M == 64 * 64


def test_the_matrices_are_those_of_the_official_networks():
    generator, discriminator = SAGAN_MATRICES[:21], SAGAN_MATRICES[21:]
    assert len(discriminator) == 23
    assert sum(R * K for R, K in generator) == pytest.approx(32.2e6, rel=2e-3)
    assert sum(R * K for R, K in discriminator) == pytest.approx(39.5e6, rel=2e-3)

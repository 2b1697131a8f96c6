"""Widths of tiles, grids, and that programs stand where they should on both kinds of grid."""

import pytest
import torch

from sagan_fast.kernels import tiles
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.tiles import dense, grid_of, is_channels_last, padded, split, strides_of
from shared_by_tests import randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_tiles_are_powers_of_two_of_at_least_sixteen():
    assert [padded(size) for size in (1, 3, 16, 17, 24, 48, 96, 256)] == [16, 16, 16, 32, 32, 64, 128, 256]


def test_two_tiles_where_one_would_be_wider():
    found = {size: split(size) for size in range(1, 257)}
    known = {1: (16, 0), 33: (32, 16), 48: (32, 16), 64: (64, 0), 96: (64, 32), 97: (128, 0), 160: (128, 32)}
    assert found.items() >= known.items() and found[192] == (128, 64)
    for size, (first, rest) in found.items():
        assert first >= 16 and size <= first + rest <= padded(size)
        assert rest == 0 or (rest >= 16 and first < size)


def test_many_images_go_on_one_axis():
    assert grid_of(3, 65535) == (3, 65535) and grid_of(3, 65536) == (196608,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_flat_grid_computes_the_same(dtype, generator, monkeypatch):
    q, k, v = (randn(*size, generator=generator).to(DEVICE, dtype) for size in ((3, 150, 8), (3, 40, 8), (3, 40, 48)))
    out, lse, lost = attention_fwd(q, k, v)
    monkeypatch.setattr(tiles, "MAX_IMAGES", 2)
    flat = attention_fwd(q, k, v)
    assert torch.equal(flat[0], out) and torch.equal(flat[1], lse)
    assert lost is flat[2] is None or torch.equal(flat[2], lost)


def test_strides_do_not_trust_axes_of_size_one():
    x = torch.zeros(2, 6, 5, 1)
    assert strides_of(x) == (30, 5, 1)
    last = torch.zeros(2, 5, 1, 6).permute(0, 3, 1, 2)
    assert is_channels_last(last) and strides_of(last) == (30, 1, 6)
    assert dense(x) is x and dense(last) is last
    cut = torch.zeros(2, 6, 5, 8)[..., ::2]
    assert dense(cut).is_contiguous()

"""How maps are cut: every element is in one tile, and every tile in one share."""

import pytest
import torch

from sagan_fast.kernels.batch_norm.tiling import PROGRAMS, parts_of, power_of_two, share_of, tiling_of

SHAPES = [(64, 1024, 4, 4), (64, 64, 128, 128), (2, 3, 9, 7), (1, 1, 1, 1), (3, 70, 5, 1), (5, 3, 1, 700)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flat", [True, False])
def test_tiles_hold_the_map_and_no_tile_is_empty(shape, memory_format, flat):
    x = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
    tiling = tiling_of(x, "batch_norm_map", flat)
    B, C, H, W = shape
    assert tiling.images * tiling.N == B * H * W and tiling.C == C
    assert (tiling.tiles - 1) * tiling.BLOCK_N < tiling.N <= tiling.tiles * tiling.BLOCK_N
    assert (tiling.columns - 1) * tiling.BLOCK_C < C <= tiling.columns * tiling.BLOCK_C
    assert tiling.BLOCK_C * tiling.BLOCK_N <= tiling.config.BLOCK


def test_a_tile_is_wide_where_memory_is_contiguous():
    x = torch.empty(8, 64, 32, 32, device="meta")
    first, last = (tiling_of(one, "batch_norm_map") for one in (x, x.contiguous(memory_format=torch.channels_last)))
    assert (first.BLOCK_N, last.BLOCK_C) == (1024, 64)
    assert first.strides == (64 * 1024, 1024, 1) and last.strides == (64 * 1024, 1, 64)


@pytest.mark.parametrize(("tiles", "others"), [(1, 1), (7, 3), (5000, 1), (32768, 16), (1, 100000)])
def test_shares_are_few_and_none_is_empty(tiles, others):
    share = share_of(tiles, others)
    parts = parts_of(tiles, share)
    assert (parts - 1) * share < tiles <= parts * share
    assert parts * others <= max(PROGRAMS, others) + others


def test_powers_of_two():
    assert [power_of_two(size) for size in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]

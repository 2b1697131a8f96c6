import pytest
import torch

from sagan_fast.kernels.spectral_norm import tables
from sagan_fast.kernels.spectral_norm.tables import MAX_SIZE, Shape, layout_of, tables_for, tiles_of
from sagan_fast.testing import SAGAN_MATRICES

SHAPES = tuple(Shape(R, K, K, 1, K % 4 == 0) for R, K in [*SAGAN_MATRICES, (MAX_SIZE, MAX_SIZE), (1, 1)])


def inputs():
    return [torch.ones(6, 8), torch.ones(4, 9)], [torch.ones(6), torch.ones(4)], [torch.ones(8), torch.ones(9)]


@pytest.mark.parametrize("v_first", [False, True])
def test_every_element_is_in_one_item_of_each_launch(v_first):
    layout = layout_of(SHAPES, v_first)
    for index, shape in enumerate(SHAPES):
        own = sorted(item[1:] for item in layout.sweep if item[0] == index)
        assert [part for _, _, part in own] == list(range(layout.parts[index]))
        if v_first:
            assert [column for column, _, _ in own] == list(range(0, shape.K, layout.configs.sweep_columns.BLOCK))
        else:
            ends = [first + rows for first, rows, _ in own]
            assert [first for first, _, _ in own] == [0, *ends[:-1]] and ends[-1] == shape.R
        second = shape.R if v_first else shape.K
        assert layout.chunks[index] <= 16 and layout.chunks[index] * layout.configs.reduce.BLOCK >= second
        assert sum(item[0] == index for item in layout.reduce) == layout.chunks[index]
        flat = [chunk for i, chunk in layout.flat if i == index]
        assert flat == list(range(len(flat))) and len(flat) * layout.configs.scale.ELEMENTS >= shape.R * shape.K
        assert layout.flat[layout.flat_first[index]] == (index, 0)


def test_tiles_cover_every_matrix_once():
    layout = layout_of(SHAPES[:-2] + (SHAPES[-1],), False)
    for index, shape in enumerate(layout.shapes):
        width = 128 if shape.K <= 128 else 1024
        own = [tile for tile in tiles_of(layout) if tile[0] == index]
        covered = sum(rows * min(width, shape.K - 128 * column) for _, _, column, rows in own)
        assert covered == shape.R * shape.K and len(set(own)) == len(own)


def test_found_again_while_nothing_moved_and_built_again_when_it_did():
    weights, us, vs = inputs()
    first = tables_for(weights, us, vs, False)
    weights[0].mul_(2)
    assert tables_for(weights, us, vs, False) is first
    weights[0] = weights[0].clone()
    moved = tables_for(weights, us, vs, False)
    assert moved is not first
    assert moved.matrices[0, tables.W].item() == weights[0].data_ptr()
    assert moved.matrices[1].tolist() == first.matrices[1].tolist()


def test_not_built_while_a_graph_is_captured(monkeypatch):
    weights, us, vs = inputs()
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="captured after one run outside"):
        tables_for(weights, us, vs, False)
    monkeypatch.setattr(tables, "is_capturing", lambda device: False)
    built = tables_for(weights, us, vs, False)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    assert tables_for(weights, us, vs, False) is built
    with pytest.raises(RuntimeError, match="tiles have to be uploaded"):
        tables.tile_items(layout_of((Shape(6, 123, 123, 1, False),), False), torch.device("cpu"))

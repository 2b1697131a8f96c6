import pytest
import torch

from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.kernels.spectral_norm import tables
from sagan_fast.kernels.spectral_norm.tables import MAX_COLUMNS, MAX_ROWS, Shape, layout_of, tables_for, tiles_of

SHAPES = tuple(
    Shape(R, K, K, 1, K % 4 == 0) for R, K in [*SAGAN_MATRICES, (MAX_ROWS, 100), (24576, MAX_COLUMNS), (1, 1)]
)


def inputs():
    return [torch.ones(6, 8), torch.ones(4, 9)]


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
    layout = layout_of(SHAPES[:-3] + (SHAPES[-1],), False)
    for index, shape in enumerate(layout.shapes):
        width = 128 if shape.K <= 128 else 1024
        own = [tile for tile in tiles_of(layout) if tile[0] == index]
        covered = sum(rows * min(width, shape.K - 128 * column) for _, _, column, rows in own)
        assert covered == shape.R * shape.K and len(set(own)) == len(own)


def test_uploaded_once_for_all_lists_of_one_layout():
    first = tables_for(inputs(), False)
    assert tables_for(inputs(), False) is first and tables_for(inputs(), True) is not first
    unaligned = torch.ones(49)[1:].view(6, 8), inputs()[1]
    other = tables_for(unaligned, False)
    assert first.matrices[0, tables.ALIGNED] == 1 and other.matrices[0, tables.FLAT_ALIGNED] == 0
    assert other.matrices[1].tolist() == first.matrices[1].tolist()


def test_not_uploaded_while_a_graph_is_captured(monkeypatch):
    weights = inputs()
    tables._uploaded.cache_clear()
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="captured after one run outside"):
        tables_for(weights, False)
    monkeypatch.setattr(tables, "is_capturing", lambda device: False)
    built = tables_for(weights, False)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    assert tables_for(inputs(), False) is built, "a captured pass may find its weights at other addresses"
    tables._uploaded.cache_clear()
    assert built in tables._captured.values(), "a graph reads them at every replay"

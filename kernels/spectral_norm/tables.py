"""What the kernels need to find many matrices in one launch: where they are, and which program does what.

A `Layout` is what shapes alone decide; `Tables` puts it and the addresses in device memory. Tables are kept and found
again by the addresses, so that nothing is uploaded while tensors stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..configs import LaunchConfig, lookup_columns

WIDTHS = (128, 1024, 2304, 4608, 9216, 16384)
"""Widths of the sweep's row tiles. The 3x3 convolutions of 64 to 1024 channels fill theirs: 2304 = 2048 + 256, ...

Each width is one branch of `sweep._sweep_kernel`; those wider than the widest matrix of the list are not compiled.
"""

MAX_SIZE = 16384
"""Most rows and most columns of a matrix."""

# Columns of the table of matrices, int64. C and S say where a column's v is: columns are stored as S groups of C,
# and the element c of group s is v[c * S + s]; channels_last weights have C channels, all others one group.
FIELDS = 16
W, U, V, R, K, C, S, OUT, Z, T, PARTIAL, PARTS, CHUNKS, ALIGNED, FLAT_ALIGNED = range(15)

OFFSET_UNIT = 64  # elements: offsets are kept in these, so that the kernels know them to be multiples of 128 bytes


class Configs(NamedTuple):
    """The launch configs for one list of matrices; `scale` serves the gradient's kernels too."""

    sweep: LaunchConfig
    sweep_columns: LaunchConfig
    reduce: LaunchConfig
    scale: LaunchConfig


def configs_for(columns: int) -> Configs:
    """Return the configs for a list whose widest matrix has so many columns."""
    return Configs(*(lookup_columns(f"spectral_norm_{name}", columns) for name in Configs._fields))


def width_of(K: int) -> int:
    """Return the width of the row tiles that hold K columns, 0 for none."""
    return next(width for width in (0, *WIDTHS) if width >= K)


def vector(dtype_bytes: int) -> int:
    """Return how many elements 128 bits hold."""
    return 16 // dtype_bytes


@dataclass(frozen=True)
class Shape:
    """A matrix R x K, its columns stored as S groups of C; `aligned` if every row starts at a multiple of 16 bytes."""

    R: int
    K: int
    C: int
    S: int
    aligned: bool


def is_dense(weight: Tensor) -> bool:
    """Return whether the elements of `weight` (R, ...) lie row after row: contiguous or channels_last."""
    return weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def column_groups(weight: Tensor) -> tuple[int, int]:
    """Return C and S of a dense `weight`: its columns are stored as S groups of C."""
    columns = weight.numel() // weight.shape[0]
    if weight.is_contiguous():
        return columns, 1
    return weight.shape[1], columns // weight.shape[1]


def shape_of(weight: Tensor) -> Shape:
    """Return the shape of a dense `weight` (R, ...) as a matrix."""
    R, (C, S) = weight.shape[0], column_groups(weight)
    return Shape(R, C * S, C, S, C * S % vector(weight.element_size()) == 0 and weight.data_ptr() % 16 == 0)


def offsets(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return where vectors of `sizes` start in a flat buffer, and its size."""
    return _offsets(sizes, OFFSET_UNIT)


@dataclass(frozen=True)
class Layout:
    """Offsets, in elements, of every matrix in the buffers, and the items of every launch.

    `out` are offsets in the flat W/sigma, `z` in vectors of rows, `t` in vectors of columns, `partial` in the partial
    sums. `sweep` are (matrix, first row, rows, part), or (matrix, first column, 0, part) when mirrored; `reduce` are
    (matrix, chunk), `flat` are (matrix, chunk of scale.ELEMENTS).
    """

    configs: Configs
    shapes: tuple[Shape, ...]
    v_first: bool
    out: tuple[int, ...]
    z: tuple[int, ...]
    t: tuple[int, ...]
    partial: tuple[int, ...]
    parts: tuple[int, ...]
    chunks: tuple[int, ...]
    sizes: tuple[int, int, int, int]  # of the flat W/sigma, the rows, the columns, the partial sums
    sweep: tuple[tuple[int, int, int, int], ...]
    reduce: tuple[tuple[int, int], ...]
    flat: tuple[tuple[int, int], ...]
    flat_first: tuple[int, ...]  # first item of each matrix in `flat`
    widest_aligned: int
    widest_unaligned: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Elements, rows and columns of all matrices together."""
        return (
            sum(shape.R * shape.K for shape in self.shapes),
            sum(shape.R for shape in self.shapes),
            sum(shape.K for shape in self.shapes),
        )


def _offsets(sizes: Sequence[int], alignment: int) -> tuple[tuple[int, ...], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // alignment) * alignment
    return tuple(offsets), end


@functools.lru_cache(maxsize=64)
def layout_of(shapes: tuple[Shape, ...], v_first: bool) -> Layout:
    """Return the layout of a list of matrices; `v_first` for the mirrored sweep, by columns."""
    configs = configs_for(max((shape.K for shape in shapes), default=1))
    elements = configs.scale.ELEMENTS
    sweep, parts, chunks, partial_sizes = [], [], [], []
    for index, shape in enumerate(shapes):
        if v_first:
            count = -(-shape.K // configs.sweep_columns.BLOCK)
            sweep += [(index, part * configs.sweep_columns.BLOCK, 0, part) for part in range(count)]
        else:
            count = -(-shape.R * shape.K // configs.sweep.ELEMENTS)
            rows = -(-shape.R // count)
            count = -(-shape.R // rows)
            sweep += [(index, p * rows, min(rows, shape.R - p * rows), p) for p in range(count)]
        second = shape.R if v_first else shape.K
        parts.append(count)
        chunks.append(-(-second // configs.reduce.BLOCK))
        partial_sizes.append(count * second)
    counts = [-(-shape.R * shape.K // elements) for shape in shapes]
    flat = [(index, chunk) for index, count in enumerate(counts) for chunk in range(count)]
    out, out_size = offsets([shape.R * shape.K for shape in shapes])
    z, z_size = offsets([shape.R for shape in shapes])
    t, t_size = offsets([shape.K for shape in shapes])
    partial, partial_size = offsets(partial_sizes)
    return Layout(
        configs=configs,
        shapes=shapes,
        v_first=v_first,
        out=out,
        z=z,
        t=t,
        partial=partial,
        parts=tuple(parts),
        chunks=tuple(chunks),
        sizes=(out_size, z_size, t_size, partial_size),
        # The large ones first, so that the small fill the gaps at the end.
        sweep=tuple(sorted(sweep, key=lambda item: -shapes[item[0]].R * shapes[item[0]].K)),
        reduce=tuple((index, chunk) for index, count in enumerate(chunks) for chunk in range(count)),
        flat=tuple(flat),
        flat_first=_offsets(counts, 1)[0],
        widest_aligned=width_of(max((shape.K for shape in shapes if shape.aligned), default=0)),
        widest_unaligned=width_of(max((shape.K for shape in shapes if not shape.aligned), default=0)),
    )


@dataclass(frozen=True)
class Tables:
    """A layout in device memory: `matrices` int64 (L, FIELDS), and the items of each launch, int32."""

    layout: Layout
    matrices: Tensor
    sweep: Tensor
    reduce: Tensor
    flat: Tensor


_tables: dict[tuple[object, ...], Tables] = {}
_MOST_TABLES = 256
_captured: list[Tables] = []  # kept for good: graphs read them at every replay


def tables_for(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], v_first: bool) -> Tables:
    """Return the tables of `weights`, `us` and `vs`, built only if one of them moved since.

    Raises RuntimeError if they would have to be uploaded while a CUDA graph is captured.
    """
    device = weights[0].device
    addresses = tuple(tensor.data_ptr() for tensor in (*weights, *us, *vs))
    shapes = tuple(shape_of(weight) for weight in weights)
    key = (device, weights[0].dtype, addresses, shapes, v_first)
    found = _tables.get(key)
    if found is not None:
        if is_capturing(device):
            _captured.append(found)
        return found
    refuse_in_capture(device, "the addresses of the weights, us and vs have to be uploaded")
    layout = layout_of(shapes, v_first)
    rows = []
    for index, shape in enumerate(layout.shapes):
        fields = [0] * FIELDS
        fields[W], fields[U], fields[V] = (tensor.data_ptr() for tensor in (weights[index], us[index], vs[index]))
        fields[R], fields[K], fields[C], fields[S] = shape.R, shape.K, shape.C, shape.S
        fields[OUT], fields[Z], fields[T], fields[PARTIAL] = (
            starts[index] // OFFSET_UNIT for starts in (layout.out, layout.z, layout.t, layout.partial)
        )
        fields[PARTS] = layout.parts[index]
        fields[CHUNKS], fields[ALIGNED] = layout.chunks[index], int(shape.aligned)
        fields[FLAT_ALIGNED] = int(weights[index].data_ptr() % 16 == 0)
        rows.append(fields)
    if len(_tables) >= _MOST_TABLES:
        del _tables[next(iter(_tables))]
    _tables[key] = Tables(
        layout,
        torch.tensor(rows, dtype=torch.int64).to(device),
        *(torch.tensor(items, dtype=torch.int32).to(device) for items in (layout.sweep, layout.reduce, layout.flat)),
    )
    return _tables[key]


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(device: torch.device, what: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if is_capturing(device):
        raise RuntimeError(
            "spectral_norm: a CUDA graph must be captured after one run outside of it = a warm-up, got a capture "
            f"in which {what}"
        )


@dataclass(frozen=True)
class TileItems:
    """`tiles` (programs, 4) int32: matrix, first row, first column / 128, rows; `firsts` (L + 1,): first in `flat`."""

    tiles: Tensor
    firsts: Tensor


def tiles_of(layout: Layout) -> list[tuple[int, int, int, int]]:
    """Return (matrix, first row, first column / 128, rows) of tiles 1024 columns wide, 128 for narrow matrices."""
    tiles = []
    for index, shape in enumerate(layout.shapes):
        width = 128 if shape.K <= 128 else 1024
        rows = layout.configs.scale.ELEMENTS // width
        tiles += [
            (index, row, column // 128, min(rows, shape.R - row))
            for row in range(0, shape.R, rows)
            for column in range(0, shape.K, width)
        ]
    return tiles


_tile_items: dict[tuple[object, ...], TileItems] = {}


def tile_items(layout: Layout, device: torch.device) -> TileItems:
    """Return the items of the gradient, uploaded once for a layout; RuntimeError if that falls into a capture."""
    key = (device, layout.shapes, layout.v_first)
    if key not in _tile_items:
        refuse_in_capture(device, "the gradient's tiles have to be uploaded")
        firsts = [*layout.flat_first, len(layout.flat)]
        _tile_items[key] = TileItems(
            *(torch.tensor(items, dtype=torch.int32).to(device) for items in (tiles_of(layout), firsts))
        )
    return _tile_items[key]

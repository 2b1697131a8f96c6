"""What the kernels need to find many matrices in one launch: how each is stored, and which program does what.

All of it follows from the shapes: a `Layout`. `Tables` is a layout in device memory, uploaded once and kept. Where the
matrices are is in another table, which is written whenever one of them moved (addresses.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..configs import LaunchConfig, lookup_size

WIDTHS = (128, 1024, 2304, 4608, 9216, 16384)
"""Widths of the sweep's row tiles. The 3x3 convolutions of 64 to 1024 channels fill theirs: 2304 = 2048 + 256, ...

Each width is one branch of `sweep._sweep_kernel`; those wider than the widest matrix of the list are not compiled.
"""

MAX_COLUMNS = WIDTHS[-1]
"""Most columns of a matrix: a program of the sweep has a whole row in registers."""

MAX_CHUNKS = 16
MAX_ROWS = MAX_CHUNKS * 4096
"""Most rows of a matrix: u is divided by its length in at most MAX_CHUNKS chunks of a launch's BLOCK."""

SMALLEST_NORM = 1e-6
"""A matrix whose product with u or v is shorter than this moves neither, in `norms.spectral_norms`."""

# Columns of the table of matrices, int64. C and S say where a column's v is: columns are stored as S groups of C,
# and the element c of group s is v[c * S + s]; channels_last weights have C channels, all others one group.
FIELDS = 16
R, K, C, S, OUT, Z, T, PARTIAL, PARTS, CHUNKS, ALIGNED, FLAT_ALIGNED = range(12)

OFFSET_UNIT = 64  # elements: offsets are kept in these, so that the kernels know them to be multiples of 128 bytes


class Configs(NamedTuple):
    """The launch configs for one list of matrices; `scale` serves the gradient's kernels too."""

    sweep: LaunchConfig
    sweep_columns: LaunchConfig
    reduce: LaunchConfig
    scale: LaunchConfig


def configs_for(rows: int, columns: int, v_first: bool) -> Configs:
    """Return the configs for a list whose longest matrix has so many rows, and whose widest so many columns."""
    second = rows if v_first else columns
    sizes = {"sweep": columns, "sweep_columns": columns, "reduce": second, "scale": 0}
    return Configs(**{name: lookup_size(f"spectral_norm_{name}", size) for name, size in sizes.items()})


def width_of(K: int) -> int:
    """Return the width of the row tiles that hold K columns, 0 for none."""
    return next(width for width in (0, *WIDTHS) if width >= K)


def vector(dtype_bytes: int) -> int:
    """Return how many elements 128 bits hold."""
    return 16 // dtype_bytes


@dataclass(frozen=True)
class Shape:
    """A matrix R x K, its columns stored as S groups of C.

    `flat_aligned` if it starts at a multiple of 16 bytes, `aligned` if every row does.
    """

    R: int
    K: int
    C: int
    S: int
    aligned: bool
    flat_aligned: bool = True


def is_dense(weight: Tensor) -> bool:
    """Return whether the elements of `weight` (R, ...) lie row after row: contiguous or channels_last."""
    return weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def first_of(tensor: Tensor, is_stack: bool) -> Tensor:
    """Return the first matrix of `tensor`, or itself where it is one matrix."""
    return tensor[0] if is_stack else tensor


def matrices_of(tensor: Tensor, is_stack: bool) -> Sequence[Tensor]:
    """Return the matrices of `tensor`, as views; also u and v of each, or sigma."""
    return tensor.unbind() if is_stack else (tensor,)


def is_dense_stack(tensor: Tensor, is_stack: bool) -> bool:
    """Return whether the matrices of `tensor` lie one behind the other, each contiguous or channels_last."""
    if not is_stack:
        return is_dense(tensor)
    return is_dense(tensor[0]) and (tensor.shape[0] == 1 or tensor.stride(0) == tensor[0].numel())


def refusal_of(weight: Tensor) -> str | None:
    """Return what `weight` must be for the kernels, or None if it is that."""
    if weight.ndim < 2:
        return "have at least 2 axes"
    if not is_dense(weight):
        return "be contiguous or channels_last"
    if not (1 <= weight.shape[0] <= MAX_ROWS and 1 <= weight[0].numel() <= MAX_COLUMNS):
        return f"have 1 to {MAX_ROWS} rows and 1 to {MAX_COLUMNS} columns"
    return None


def column_groups(weight: Tensor) -> tuple[int, int]:
    """Return C and S of a dense `weight`: its columns are stored as S groups of C."""
    columns = weight.numel() // weight.shape[0]
    if weight.is_contiguous():
        return columns, 1
    return weight.shape[1], columns // weight.shape[1]


def shape_of(weight: Tensor) -> Shape:
    """Return the shape of a dense `weight` (R, ...) as a matrix."""
    R, (C, S) = weight.shape[0], column_groups(weight)
    starts = weight.data_ptr() % 16 == 0
    return Shape(R, C * S, C, S, starts and C * S % vector(weight.element_size()) == 0, starts)


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


def layout_of(shapes: tuple[Shape, ...], v_first: bool) -> Layout:
    """Return the layout of a list of matrices; `v_first` for the mirrored sweep, by columns."""
    rows, columns = (max((getattr(shape, name) for shape in shapes), default=1) for name in "RK")
    configs = configs_for(rows, columns, v_first)
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
    """A layout in device memory: `matrices` int64 (L, FIELDS), and the items of each launch, int32.

    Of the gradient's launch, `tiles` (programs, 4) are (matrix, first row, first column / 128, rows), and `firsts`
    (L + 1,) the first of each matrix in `flat`.
    """

    layout: Layout
    matrices: Tensor
    sweep: Tensor
    reduce: Tensor
    flat: Tensor
    tiles: Tensor
    firsts: Tensor


MAX_TABLES = 1024
_captured: dict[tuple[object, ...], Tables] = {}
"""Kept for good: CUDA graphs read them at every replay."""


def tables_for(weights: Sequence[Tensor], v_first: bool) -> Tables:
    """Return the tables of `weights`; they are uploaded the first time that a device sees such a list.

    Raises RuntimeError if that is while a CUDA graph is captured.
    """
    return tables_of(tuple(shape_of(weight) for weight in weights), v_first, weights[0].device)


def tables_of(shapes: tuple[Shape, ...], v_first: bool, device: torch.device) -> Tables:
    """Return the tables of matrices of these `shapes`, as `tables_for`."""
    tables = _uploaded(shapes, v_first, device)
    if is_capturing(device):
        _captured[shapes, v_first, device] = tables
    return tables


@functools.lru_cache(maxsize=MAX_TABLES)
def _uploaded(shapes: tuple[Shape, ...], v_first: bool, device: torch.device) -> Tables:
    if is_capturing(device):
        raise RuntimeError(
            "spectral_norm: a CUDA graph must be captured after one run outside of it, got a list of weights whose "
            "tables have to be uploaded"
        )
    layout = layout_of(shapes, v_first)
    rows = []
    for index, shape in enumerate(layout.shapes):
        fields = [0] * FIELDS
        fields[R], fields[K], fields[C], fields[S] = shape.R, shape.K, shape.C, shape.S
        fields[OUT], fields[Z], fields[T], fields[PARTIAL] = (
            starts[index] // OFFSET_UNIT for starts in (layout.out, layout.z, layout.t, layout.partial)
        )
        fields[PARTS], fields[CHUNKS] = layout.parts[index], layout.chunks[index]
        fields[ALIGNED], fields[FLAT_ALIGNED] = int(shape.aligned), int(shape.flat_aligned)
        rows.append(fields)
    items = (layout.sweep, layout.reduce, layout.flat, tiles_of(layout), [*layout.flat_first, len(layout.flat)])
    return Tables(
        layout,
        torch.tensor(rows, dtype=torch.int64).to(device),
        *(torch.tensor(some, dtype=torch.int32).to(device) for some in items),
    )


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


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

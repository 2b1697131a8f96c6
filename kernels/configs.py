"""Launch configs: tile sizes, warps and pipeline stages of every kernel. There is no autotuning.

The rows are data, in configs.csv. A row serves every combination of its architectures, precisions, widths and sizes,
and says where its config comes from: "from the machine code" (compiled, not timed) or "measured on DEVICE, DATE" (by
`python -m benchmarks.tune`). Of the tiles that neither spill nor exceed the shared memory, also on ragged maps, those
from the machine code need few clocks a score. docs/log.md, "Attention kernels", says what else was tried.
"""

from __future__ import annotations

import csv
import functools
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("configs.csv")

MAX_D_QK = 64
MAX_D_V = 256
"""The widest q, k and v that rows exist for. Wider tiles do not fit the registers."""

WIDTHS = ((32, 32), (16, 64), (32, 64), (32, 96), (32, 128), (32, 256), (64, 128), (64, 256))
"""Widths of the attention block's rows: D_QK up to, D_V up to. The first that holds both is taken."""

SMALL = 256
"""Maps with up to this many queries (or keys, for the kernel that owns keys) are small: small tiles fill a GPU."""

Arch = int | str
"""What kernels are compiled for: NVIDIA's compute capability times ten (90 for 9.0), or AMD's name ("gfx942")."""

MIN_ARCH = 80
"""The lowest compute capability that the attention kernels run on."""

INTERPRETED_ARCH = 90
"""The compute capability whose rows the interpreter runs."""

SERVED_BY = {80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 80, 121: 80}
"""Compute capability to the one whose rows it runs, where it has none of its own: that with the same instructions.

The rows for 80 stay below the shared memory of the smallest of them, 101376 bytes.
"""

NEEDS_TRITON = {110: (3, 7)}
"""Compute capability to the first Triton whose assembler knows it, where older ones that we support do not."""

AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
"""AMD's chips that the kernels are compiled for. All run the rows "gfx", and those for 80 where there is none."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched; a size is 0 where the kernel has no such tile.

    `BLOCK_N` queries, `BLOCK_M` keys or pooled positions and `BLOCK_C` channels a tile; `BLOCK` elements of a vector,
    or of a tile of batch norm, at a time and `ELEMENTS` of a weight a program. `maxnreg` caps the registers of a thread
    (None: the compiler's choice), so that more programs share a multiprocessor; 255, all there are, keeps the assembler
    from spilling a few for the same reason. `sum_by_product` lets the tensor cores add up each row of the softmax.
    `tf32x3` computes a float32 product as three of TF32 on the tensor cores, exact to 2**-21.
    """

    BLOCK_N: int = 0
    BLOCK_M: int = 0
    BLOCK_C: int = 0
    BLOCK: int = 0
    ELEMENTS: int = 0
    num_warps: int = 8
    num_stages: int = 2
    maxnreg: int | None = None
    sum_by_product: bool = False
    tf32x3: bool = False

    @classmethod
    def parse(cls, text: str) -> LaunchConfig:
        """Return the config that `str` turned into `text`."""
        given: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            given[name] = int(value) if value else True
        return cls(**given)

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return " ".join(name if value is True else f"{name}={value}" for name, value in given.items() if value)


COLUMNS = ("kernel", "archs", "precisions", "widths", "sizes", "config", "origin")


class Row(NamedTuple):
    """One line of configs.csv. `serves` are its architectures, precisions, widths and sizes."""

    kernel: str
    serves: tuple[tuple[str, ...], ...]
    config: LaunchConfig
    origin: str

    @property
    def keys(self) -> list[tuple[str, ...]]:
        """Return (kernel, architecture, precision, width, size) of everything that the row serves."""
        return [(self.kernel, *values) for values in product(*self.serves)]

    def without(self, key: tuple[str, ...]) -> list[Row]:
        """Return rows that together serve what this one serves, but for `key`."""
        rows, axes = [], list(self.serves)
        for i, value in enumerate(key[1:]):
            others = tuple(other for other in axes[i] if other != value)
            if others:
                rows.append(self._replace(serves=(*axes[:i], others, *axes[i + 1 :])))
            axes[i] = (value,)
        return rows


def merged(rows: Sequence[Row]) -> Sequence[Row]:
    """Return fewer rows that serve the same: those that differ in one list alone become one."""
    for axis in (2, 1, 0, 3):
        together: dict[tuple[object, ...], Row] = {}
        for row in rows:
            before, after = row.serves[:axis], row.serves[axis + 1 :]
            others = row.kernel, before, after, row.config, row.origin
            values = dict.fromkeys((*together.get(others, row).serves[axis], *row.serves[axis]))
            together[others] = row._replace(serves=(*before, tuple(values), *after))
        rows = list(together.values())
    return rows


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file as `configs.csv`."""
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [
        Row(kernel, tuple(tuple(cell.split()) for cell in lists), LaunchConfig.parse(config), origin)
        for kernel, *lists, config, origin in lines
    ]


def format_rows(rows: Sequence[Row]) -> str:
    """Return the text of the file that `read_rows` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=lambda row: row[:2]):
        writer.writerow([row.kernel, *(" ".join(values) for values in row.serves), row.config, row.origin])
    return text.getvalue()


@functools.cache
def _configs() -> dict[tuple[str, ...], LaunchConfig]:
    found: dict[tuple[str, ...], LaunchConfig] = {}
    for row in read_rows(FILE):
        for key in row.keys:
            if key in found:
                raise ValueError(f"{FILE.name}: a launch must have one row, got two for {' '.join(key)}")
            found[key] = row.config
    return found


def served_by(arch: Arch) -> Arch:
    """Return whose rows `arch` runs. An unknown compute capability runs those of the next lower known one."""
    if isinstance(arch, str):
        return MIN_ARCH
    known = sorted(SERVED_BY)
    return SERVED_BY[known[max(bisect_right(known, arch) - 1, 0)]]


def row_precision(precision: str) -> str:
    """Return the precision whose rows are run: bf16 for both 16-bit types, fp32 for fp64 (interpreter only)."""
    return {"fp16": "bf16", "fp64": "fp32"}.get(precision, precision)


def row_width(kernel: str, D_QK: int, D_V: int) -> str:
    """Return the width of the row for D_QK and D_V. Raises ValueError above `MAX_D_QK` and `MAX_D_V`."""
    for width in WIDTHS:
        if width[0] >= D_QK and width[1] >= D_V:
            return f"{width[0]}x{width[1]}"
    raise ValueError(
        f"{kernel}: D_QK and D_V must be at most {MAX_D_QK} and {MAX_D_V} (backend 'sdpa' takes any), got {D_QK}, {D_V}"
    )


def row_size(positions: int | None) -> str:
    """Return the size of the row for `positions` queries or keys; None for a kernel that has one row for all."""
    return "any" if positions is None else "small" if positions <= SMALL else "large"


@functools.cache
def lookup(kernel: str, arch: Arch, precision: str, D_QK: int, D_V: int, positions: int | None = None) -> LaunchConfig:
    """Return the config of a kernel of the attention block for `positions` queries, or keys where it owns keys.

    The rows of `arch` itself come before those of the architecture that serves it. Triton refuses `tf32x3` for
    AMD's chips, so there no row has it. Raises ValueError for widths above `MAX_D_QK` and `MAX_D_V`.
    """
    rest = (row_precision(precision), row_width(kernel, D_QK, D_V), row_size(positions))
    names = (str(arch), "gfx") if isinstance(arch, str) else (str(arch),)
    own = next((_configs()[key] for name in names if (key := (kernel, name, *rest)) in _configs()), None)
    found = own or _configs()[(kernel, str(served_by(arch)), *rest)]
    return replace(found, tf32x3=False) if isinstance(arch, str) else found


@functools.cache
def has_rows(kernel: str, precision: str, D_QK: int, D_V: int) -> bool:
    """Return whether a kernel of the attention block has rows for these widths: in some precisions no tile fits."""
    rest = (row_precision(precision), row_width(kernel, D_QK, D_V), row_size(SMALL))
    return (kernel, str(MIN_ARCH), *rest) in _configs()


@functools.cache
def lookup_size(kernel: str, size: int) -> LaunchConfig:
    """Return the config of a spectral-norm kernel for matrices of up to `size` rows or columns, on any device.

    Batch norm's kernels have one for all sizes, under 0.
    """
    widths = sorted({int(key[3]) for key in _configs() if key[0] == kernel})
    return _configs()[kernel, "any", "any", str(next(width for width in widths if width >= size)), "any"]


@functools.cache
def has_fast_float32(arch: Arch) -> bool:
    """Return whether the attention kernels' float32 products run on the tensor cores of `arch`, at every width."""
    kernels = ("attention_fwd", "attention_bwd_dkv", "attention_bwd_dq")
    return all(lookup(kernel, arch, "fp32", *width, SMALL + 1).tf32x3 for kernel in kernels for width in WIDTHS)

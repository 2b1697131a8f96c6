"""Launch configs that were measured: `python -m benchmarks.tune` writes tuned.json on a GPU.

A row holds for one compute capability and comes before the tables in the configs.py files, which were read off the
machine code. Without the file, or without a row in it, those stand.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")


def key(kernel: str, arch: int, precision: str, width: tuple[int, int], size: str) -> str:
    """Return the name of a row: `width` is a column of projection.configs.WIDTHS, `size` "small", "large" or "any"."""
    return f"{kernel} sm_{arch} {precision} {width[0]}x{width[1]} {size}"


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """Return the rows by their `key`; of each, "config" holds the fields of its config in their order."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def tuned(kernel: str, arch: int, precision: str, width: tuple[int, int], size: str = "any") -> tuple[Any, ...] | None:
    """Return the fields of the measured config of `kernel`, or None where nothing better than the table is known."""
    row = rows().get(key(kernel, arch, precision, width, size))
    return None if row is None else tuple(row["config"])

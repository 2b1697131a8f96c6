"""Memory of the CPU that the process keeps from step to step, instead of giving it back and asking for it again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt (malloc.h)."""
LARGEST_THRESHOLD = 32 << 20
"""What glibc itself raises the size from which a block is mapped anew to, in a process that frees large blocks."""


@contextmanager
def kept_memory(device_type: str) -> Iterator[bool]:
    """Let this process keep freed memory while it trains on the CPU; yield whether it does.

    glibc maps every block above 32 MB anew, and gives it back when it is freed: each map of a large batch costs a page
    fault every 4 KB. Kept memory has none. Only with glibc, and not for another `device_type` than "cpu".
    """
    mallopt = _mallopt() if device_type == "cpu" else None
    if mallopt is None:
        yield False
        return
    libc = ctypes.CDLL(None)
    mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield True
    finally:
        mallopt(M_MMAP_MAX, 65536)  # glibc's defaults
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD), mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc.mallopt if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None

import ctypes

import pytest
import torch

from sagan_fast.training.memory import _mallopt, kept_memory


class Mallinfo2(ctypes.Structure):
    """malloc.h: sizes of what the process' memory consists of; the fifth is the bytes of blocks mapped alone."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "a", "b", "c", "d", "e")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def mapped_alone():
    """Bytes that a tensor of 64 MB adds to the blocks that are mapped for themselves, and given back when freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    before = mallinfo2().hblkhd
    tensor = torch.zeros(2**24)
    return mallinfo2().hblkhd - before, tensor


@pytest.mark.skipif(_mallopt() is None or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_kept_memory_is_not_mapped_and_given_back():
    with kept_memory("cpu") as kept:
        assert kept and mapped_alone()[0] == 0
    assert mapped_alone()[0] >= 2**26


def test_other_devices_leave_it_alone():
    with kept_memory("cuda") as kept:
        assert not kept

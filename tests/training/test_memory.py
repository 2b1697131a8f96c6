import resource

import pytest
import torch

from sagan_fast.training.memory import _mallopt, kept_memory

with_glibc = pytest.mark.skipif(_mallopt() is None, reason="needs glibc")


def faults(count):
    """Page faults of `count` tensors of 64 MB, made and freed one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@with_glibc
def test_kept_memory_is_not_asked_for_again():
    with kept_memory("cpu") as kept:
        assert kept
        faults(1)
        inside = faults(8)
    assert inside < 2**12  # 64 MB are 2**14 pages
    assert faults(8) > 4 * 2**9  # given back again, in pages of 4 KB or 2 MB


def test_other_devices_leave_it_alone():
    with kept_memory("cuda") as kept:
        assert not kept

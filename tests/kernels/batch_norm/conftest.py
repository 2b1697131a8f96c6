import pytest

from sagan_fast.kernels.batch_norm import tiling
from sagan_fast.kernels.configs import LaunchConfig


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 elements and few programs: small maps then have several tiles a program, and several programs."""
    monkeypatch.setattr(tiling, "lookup_size", lambda name, size: LaunchConfig(BLOCK=64, num_warps=4))
    monkeypatch.setattr(tiling, "PROGRAMS", 6)

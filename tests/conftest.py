"""Shared by all tests: the interpreter where there is no GPU, a printed random seed, poisoned memory."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

SEED = int(os.environ.get("SAGAN_FAST_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header(config):
    return f"sagan_fast: inputs drawn with SAGAN_FAST_TEST_SEED={SEED}; torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator; a failing run is repeated with the seed printed in the header."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what torch.empty and its like return with NaN, so that an element never written shows."""

    def poisoned(allocate):
        def allocate_and_poison(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if not torch.compiler.is_compiling() and out.is_floating_point() and type(out) is torch.Tensor:
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return allocate_and_poison

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))

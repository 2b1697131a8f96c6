"""Shared by all tests: the interpreter where there is no GPU, a printed random seed, poisoned memory."""

import os
import random

import pytest
import torch

from sagan_fast.testing import teach_interpreter_bfloat16

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
    teach_interpreter_bfloat16()

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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of two steps; copy it before changing it."""
    from sagan_fast import cli

    folder = tmp_path_factory.mktemp("cli") / "run"
    what = ["--preset", "shapes-32", "--data", "shapes", "--out", str(folder), "--steps", "2", "--device", "cpu"]
    small = ["--generator.base_channels=4", "--discriminator.base_channels=4", "--batch-size", "4"]
    assert cli.main(["train", *what, *small]) == 0
    return folder


@pytest.fixture
def sentence(capsys):
    """A function that returns the one line a command left on stderr, checked to be no more than that."""

    def read():
        err = capsys.readouterr().err
        assert err.startswith("sagan-fast: ") and err.count("\n") == 1 and "Traceback" not in err
        return err

    return read

"""Shared by all tests: the interpreter where there is no GPU, a printed random seed, poisoned memory."""

import os
import random
import sys

import evidence
import hypothesis
import numpy as np
import pytest
import sanitizer
import torch
from torch.utils._device import _device_constructors

from shared_by_tests import leave_broken_device, teach_interpreter_bfloat16

if "ttsem" in sys.modules:  # `make sanitize`
    sanitizer.install()
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
    teach_interpreter_bfloat16()

_device_constructors()  # kept at the first call, so before torch.empty is replaced below

# Kept in the environment: the workers of pytest-xdist draw with the seed that the header prints.
SEED = int(os.environ.setdefault("SAGAN_FAST_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
seeds = [SEED]
draws_nothing = set()  # tests of which one seed says all


def seeds_of(given):
    numbers = [int(number) for number in given.split(",") if number]
    return numbers if "," in given else list(range(SEED, SEED + numbers[0]))


def pytest_addoption(parser):
    about = "repeat each test that draws inputs with so many seeds, or with those of a list: 1,2,3"
    parser.addoption("--seeds", type=seeds_of, default=[SEED], help=about)


def pytest_configure(config):
    seeds[:] = config.getoption("--seeds")


def pytest_sessionfinish(exitstatus):
    if exitstatus == 0 and "SAGAN_FAST_EVIDENCE" in os.environ:
        for (name, code), dtypes in sorted(sanitizer.executed.items()):
            evidence.record(name, "executed", "ttsem", code=code, dtypes=sorted(dtypes))


def pytest_report_header(config):
    return f"sagan_fast: inputs drawn with SAGAN_FAST_TEST_SEED={','.join(map(str, seeds))}; torch {torch.__version__}"


def pytest_generate_tests(metafunc):
    if len(seeds) > 1:
        metafunc.parametrize("seed", seeds, ids="seed={}".format, indirect=True)


def pytest_collection_modifyitems(items):
    if "ttsem" in sys.modules:
        skip = pytest.mark.skip(reason="says nothing under ttsem")
        for item in items:
            if any(name in item.nodeid for name in sanitizer.NOT_HERE):
                item.add_marker(skip)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed(request):
    """The seed of everything that the test draws, PyTorch's own generator and hypothesis included."""
    drawn = getattr(request, "param", seeds[0])
    test = request.node.nodeid.replace(f"seed={drawn}", "")
    if test in draws_nothing:
        pytest.skip("draws nothing")
    torch.manual_seed(drawn + 2**31)  # not what `generator` draws
    before = torch.get_rng_state()
    if by_hypothesis := hypothesis.is_hypothesis_test(request.function):
        hypothesis.seed(drawn)(request.function)
    yield drawn
    if not by_hypothesis and "generator" not in request.fixturenames and torch.equal(before, torch.get_rng_state()):
        draws_nothing.add(test)


@pytest.fixture(autouse=True)
def working_device(request):
    """End the process whose device a GPU test broke."""
    yield
    if "gpu" in request.keywords and "ttsem" not in sys.modules:
        leave_broken_device(hasattr(request.config, "workerinput"))


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A seeded CPU generator; a failing run is repeated with the seed printed in the header."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def float64():
    """Make and compute in float64: float32's rounding lets a ReLU change sides, and Adam makes whole steps of it."""
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def rng(generator):
    """A NumPy generator that follows the printed seed."""
    return np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))


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

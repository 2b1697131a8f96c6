"""The seed that the header prints is that of every test, however many processes run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import os
import pytest
import torch

@pytest.mark.parametrize("i", range(8))
def test_draws(i, seed, generator):
    with open(os.environ["SEEDS_SEEN"], "a") as file:
        print(os.getpid(), seed, int(torch.randint(2**31, (), generator=generator)), file=file)
"""


@pytest.mark.slow  # three processes import PyTorch
@pytest.mark.parametrize("given", [None, "7"])
def test_all_workers_draw_with_the_printed_seed(given, tmp_path):
    seen, probe = tmp_path / "seen", tmp_path / "test_probe.py"
    probe.write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAGAN_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "SEEDS_SEEN": str(seen)}
    environment |= {"SAGAN_FAST_TEST_SEED": given} if given else {}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "each", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(probe)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = re.search(r"SAGAN_FAST_TEST_SEED=(\d+);", done.stdout)[1]
    processes, seeds, numbers = zip(*(line.split() for line in seen.read_text().splitlines()), strict=True)
    assert len(set(processes)) == 2 and set(seeds) == {printed} and given in (None, printed)
    assert len(seeds) == 16 and len(set(numbers)) == 1

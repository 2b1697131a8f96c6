"""The measurement runs where there is no GPU, and every call launches what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_times_calls_down_to_where_the_driver_would_be():
    """In a process of its own: here kernels are imported for the interpreter, which launches nothing."""
    command = [sys.executable, "-m", "benchmarks.launch_overhead", "--samples", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed, said = done.stdout.split("\n\n", 1)
    assert "Not in these times" in said and "cuLaunchKernelEx" in said
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()[2:]}
    assert {name: row[0] for name, row in rows.items()} == {
        "module, forward": "2",
        "module, forward with grad": "2",
        "module, forward+backward": "5",
        "function, forward": "2",
        "two launchers, forward": "2",
        "nothing kept": "2",
    }
    assert all(0 < float(time) < 1e6 for row in rows.values() for time in row[1:])


COMPARE = """
import torch
import pytest

from benchmarks import launch_overhead
from sagan_fast.functional import attention
from sagan_fast.kernels import launch
driver = launch_overhead.install()
seen = []
loads = []
driver.utils.load_binary = lambda *binary, load=driver.utils.load_binary: loads.append(binary) or load(*binary)
driver.launcher_cls = lambda *_: lambda *arguments: seen.append(arguments)
parts = launch_overhead.parts()
q, k, v = (torch.randn(1, rows, width) for rows, width in ((64, 16), (16, 16), (16, 32)))
parts["attention, forward"] = lambda: attention(q, k, v, scale=0.5, backend="triton")

def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    return "metadata" if type(value).__name__ == "LazyDict" else value

for name, launches in (("module, forward", 2), ("module, forward+backward", 5), ("attention, forward", 1)):
    launch._ready.clear()
    seen.clear()
    parts[name]()
    first = [[plain(value) for value in arguments] for arguments in seen]
    seen.clear()
    loads.clear()
    parts[name]()
    assert not loads, "a stub without a module is loaded at every launch, and that would be timed"
    second = [[plain(value) for value in arguments] for arguments in seen]
    assert first == second and len(first) == launches, (first, second)
print("the same arguments")
"""


def test_a_kept_launch_passes_what_tritons_own_passes():
    """Grid, stream, function and every argument of all six kernels, the first time through Triton, then directly."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPARE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same arguments\n"

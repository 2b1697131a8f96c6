"""A cache that one process packed serves another, elsewhere; each runs in a process of its own, without interpreter."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_cache
from benchmarks.records import ROOT

ONLY = "unpooled-16x16-C128"
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0"}
SECOND = """
import sys
from pathlib import Path
from benchmarks import gpu_cache
print(gpu_cache.unpack(Path(sys.argv[1]), Path(sys.argv[2])), *gpu_cache.compile_all(sys.argv[3]))
"""


def packed(archive, *options):
    command = [sys.executable, "-m", "benchmarks.gpu_cache", "--out", str(archive), *options]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def used(archive, folder, only):
    command = [sys.executable, "-c", SECOND, str(archive), str(folder), only]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_second_process_compiles_nothing_with_the_cache_at_another_path(tmp_path):
    archive = tmp_path / "cache.tar.xz"
    made = packed(archive, "--only", f"{ONLY} bf16 forward")
    assert made.returncode == 0 and "6 kernels" in made.stdout, made.stderr
    second = used(archive, tmp_path / "elsewhere", f"{ONLY} bf16 forward")
    assert second.stdout.split() == ["True", "0", "6"], second.stdout + second.stderr
    for path in (tmp_path / "elsewhere").rglob("*.ptx"):
        pytest.fail(f"{path} is kept, and only machine code is needed")
    assert len(list((tmp_path / "elsewhere").rglob("*.cubin"))) == 6


@pytest.mark.slow
def test_a_cache_for_another_libtriton_is_said_to_be_one(tmp_path):
    """What --wheel says is hashed: as if the target had another Python."""
    import triton

    wheel = tmp_path / f"triton-{triton.__version__}-cp312.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("triton/_C/libtriton.so", b"another")
    archive = tmp_path / "cache.tar.xz"
    assert packed(archive, "--only", "no such case", "--wheel", str(wheel)).returncode == 0
    second = used(archive, tmp_path / "elsewhere", "no such case")
    assert second.stdout.split() == ["False", "0", "0"]
    assert "made for another Triton than the one here: kernels are compiled" in second.stderr


@pytest.mark.parametrize("name", ["triton-1.0.0-cp312.whl", "none"])
def test_a_wheel_that_does_not_fit_is_a_sentence(tmp_path, name):
    made = packed(tmp_path / "cache.tar.xz", "--wheel", str(tmp_path / name))
    assert made.returncode == 2 and made.stderr.startswith("benchmarks.gpu_cache: ") and made.stderr.count("\n") == 1


def test_without_an_archive_nothing_is_said(tmp_path, capsys):
    assert not gpu_cache.unpack(Path(tmp_path, "none"), tmp_path)
    assert capsys.readouterr() == ("", "")

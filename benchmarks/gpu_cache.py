"""Compiles our kernels for `make gpu` on a machine without a GPU, so that no minute of a GPU goes to compiling.

    make gpu-cache GPU_PYTHON=python3                                # writes build/gpu-cache.tar.xz
    make gpu-cache GPU_ARGS="--wheel triton-3.6.0-cp312-...whl"      # for a GPU's Python of another version

Triton's own JIT compiles them for compute capability 9.0. Only the driver is a stub. Triton finds them again if these
are the same on both machines: the files of the triton package with libtriton.so (so its version, and Python's, for
which the wheel was built), the text of the kernels, their arguments and options, and Triton's environment variables.
PyTorch's version is not among them. With --wheel, libtriton.so counts as the one of that wheel, of the same version of
Triton; then neither that Python nor another PyTorch is needed. The launchers, compiled from C, are not kept.
"""

import argparse
import hashlib
import json
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "build" / "gpu-cache.tar.xz"
UNPACKED = ROOT / "build" / "triton"
MADE_FOR = "made-for"
"""File in the archive that holds a hash of the triton package that finds the kernels."""
PARTS = ("gate", "spectral_norm", "sweep", "dtypes")
"""These launch every kernel of the others, too: the machine code does not depend on the number of images."""


def made_for() -> str:
    """Return a hash of the triton package that is installed."""
    from triton.runtime import cache

    return hashlib.sha256(cache.triton_key().encode()).hexdigest()


def take_from(wheel: Path) -> None:
    """Let Triton count the libtriton.so of `wheel` as its own in this process; ValueError for another version."""
    import triton
    from triton.runtime import cache

    if f"triton-{triton.__version__}-" not in wheel.name:
        raise ValueError(f"--wheel must be of the installed version of Triton, {triton.__version__}, got {wheel.name}")
    name = "_C/libtriton.so"
    own = hashlib.sha256((Path(triton.__file__).parent / name).read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel) as files:
        key = cache.triton_key().replace(own, hashlib.sha256(files.read(f"triton/{name}")).hexdigest())
    setattr(cache, "triton_key", lambda: key)  # noqa: B010 - mypy knows it as a function


def compile_all(text: str = "") -> tuple[int, int]:
    """Compile our kernels of all cases with `text` in their title; return how many were, and how many were cached."""
    import triton

    from benchmarks import launch_overhead, run
    from benchmarks.harness import Target
    from benchmarks.records import OURS
    from sagan_fast.ops.tf32 import tf32

    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    launch_overhead.install()
    triton.knobs.compilation.listener = listen
    for part in run.PARTS:
        for case in part.cases(Target("cpu", compile_only=True)) if part.name in PARTS else ():
            for provider in case.providers:
                if provider.name in OURS and text in case.title:
                    with tf32(case.dtype == "tf32"):
                        provider.prepare()(0)
    return hits.count(False), hits.count(True)


def unpack(archive: Path = ARCHIVE, folder: Path = UNPACKED) -> bool:
    """Unpack `archive` into `folder` and make it Triton's cache of this process and its children.

    Returns False, with a sentence, for one of another Triton, and without, where there is none.
    """
    if not archive.exists():
        return False
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    if (folder / MADE_FOR).read_text() != made_for():
        print(f"{archive} was made for another Triton than the one here: kernels are compiled", file=sys.stderr)
        return False
    for group in folder.glob("*/__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Write the archive; return 0, or 2 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cache", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="only cases with TEXT in their title")
    add("--wheel", type=Path, help="the target's wheel of the same version of Triton, for another Python")
    add("--out", type=Path, default=ARCHIVE, help="default build/gpu-cache.tar.xz")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
        try:
            if options.wheel:
                take_from(options.wheel)
        except (ValueError, OSError) as error:
            print(f"benchmarks.gpu_cache: {error}", file=sys.stderr)
            return 2
        compiled, _ = compile_all(options.only)
        Path(folder, MADE_FOR).write_text(made_for())
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(options.out, "w:xz") as files:
            files.add(folder, ".")
    print(f"{options.out}: {compiled} kernels, {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

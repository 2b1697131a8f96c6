"""Everything that wants an NVIDIA GPU in one command within nine minutes: GPU tests, then the benchmarks.

    make gpu                                   # or, on a machine where nothing can be installed:
    python -m benchmarks.gpu --only attention  # after `make gpu-path`, see the Makefile

Needs torch, triton, numpy and pytest. Records go to benchmarks/results (or --out) as they are made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.records import RESULTS, ROOT

TEST_SHARE = 0.4
"""At most this share of the time goes to the tests."""


def missing() -> str | None:
    """Return a sentence on what keeps the GPU run from starting, or None."""
    absent = [name for name in ("torch", "triton", "numpy", "pytest", "hypothesis") if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} must be installed"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, the kernels need 8.0"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the GPU tests and the benchmarks; return 0 if the tests passed, 1 if not, 2 if nothing could start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything together")
    parser.add_argument("--only", default="", help="tests, or benchmarks whose case contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--dry-run", action="store_true", help="walk through it without a GPU; nothing is recorded")
    options = parser.parse_args(argv)
    reason = None if options.dry_run else missing()
    if reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    began = time.monotonic()
    passed = True
    if options.only in ("", "tests"):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        if options.dry_run:
            command.append("--collect-only")
        passed = _run(command, options.minutes * 60 * TEST_SHARE)
    if options.only != "tests":
        left = options.minutes - (time.monotonic() - began) / 60
        command = [sys.executable, "-m", "benchmarks.run", "--minutes", f"{left - 0.5:.2f}", "--out", str(options.out)]
        command += ["--dry-run"] if options.dry_run else []
        command += ["--only", options.only] if options.only else []
        passed = _run(command, left * 60) and passed
    return 0 if passed else 1


def _run(command: Sequence[str], seconds: float) -> bool:
    print("$ " + " ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode in (0, 5)  # 5: pytest found no such test
    except subprocess.TimeoutExpired:
        print(f"benchmarks.gpu: stopped after {seconds:.0f} s: {' '.join(command)}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main())

"""Runs the GPU tests, then the benchmarks, on one NVIDIA GPU within nine minutes.

    make gpu                                   # or, on a machine where nothing can be installed:
    python -m benchmarks.gpu --only attention  # after `make gpu-path`, see the Makefile

Needs torch, triton, numpy, and for the tests pytest and hypothesis. Records are written to --out as they are made.
Beside them, tests.txt and benchmarks.txt hold what was printed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.records import RESULTS, ROOT

TEST_SHARE = 0.35
"""At most this share of the time goes to the tests."""
WARMERS = 4
"""Processes that compile the peers while the tests run."""


def missing() -> str | None:
    """Return a sentence on what keeps the run from starting, or None."""
    absent = [name for name in ("torch", "triton", "numpy") if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} must be installed"
    import torch

    from sagan_fast.kernels.configs import MIN_ARCH
    from sagan_fast.ops.backends import triton_refusal

    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    reason = triton_refusal(torch.device("cuda"), torch.bfloat16, MIN_ARCH)
    return f"the kernels cannot run here: {reason}" if reason else None


def no_tests() -> str | None:
    """Return a sentence on what keeps the tests from running, or None."""
    absent = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    return f"the tests are left out: {', '.join(absent)} must be installed" if absent else None


def test_command(dry: bool) -> list[str]:
    """Return the command of the GPU tests: all of them, however many fail, in parallel where it can."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
    if find_spec("xdist"):
        command += ["-n", "4"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", "100"]
    return [*command, *(["--collect-only", "-q"] if dry else []), "tests"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the GPU tests and the benchmarks; return 0 if all passed, 1 if not, 2 if nothing could start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    out = Path(os.environ.get("OUT") or RESULTS)
    add = parser.add_argument
    add("--minutes", type=float, default=8.5, help="for tests and benchmarks together (default 8.5)")
    add("--only", default="", metavar="TEXT", help="tests, or what `python -m benchmarks.run --only` takes")
    add("--out", type=Path, default=out, help="folder of the records (default $OUT, or benchmarks/results)")
    add("--dry-run", action="store_true", help="walk through it without a GPU, and record nothing")
    options = parser.parse_args(argv)
    reason = None if options.dry_run else missing()
    if reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.minutes * 60
    options.out.mkdir(parents=True, exist_ok=True)
    passed = True
    if options.only in ("", "tests"):
        reason = no_tests()
        if reason:
            print(f"benchmarks.gpu: {reason}", file=sys.stderr)
            passed = False
        else:
            warmers = [] if options.dry_run or options.only else _warmers()
            try:
                log = None if options.dry_run else options.out / "tests.txt"
                passed = _run(test_command(options.dry_run), options.minutes * 60 * TEST_SHARE, log)
            finally:
                for process in warmers:
                    _end(process, signal.SIGKILL)
    if options.only != "tests":
        left = (deadline - time.monotonic()) / 60
        command = [sys.executable, "-m", "benchmarks.run", "--minutes", f"{left - 0.5:.2f}", "--out", str(options.out)]
        command += ["--dry-run"] if options.dry_run else ["--device", "cuda"]
        command += ["--only", options.only] if options.only else []
        log = None if options.dry_run else options.out / "benchmarks.txt"
        passed = _run(command, left * 60, log) and passed
    return 0 if passed else 1


def _warmers() -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--warm"]
    return [
        subprocess.Popen(
            [*command, f"{i}/{WARMERS}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for i in range(WARMERS)
    ]  # fmt: skip


def _run(command: Sequence[str], seconds: float, log: Path | None = None) -> bool:
    """Run `command` for at most so many seconds, then interrupt it. What it prints goes to `log` too."""
    print("$ " + " ".join(command), flush=True)
    kept = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE, start_new_session=True) if log else None
    output = kept.stdin if kept else None
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait(timeout=seconds) in (0, 5)  # 5: pytest found no such test
    except subprocess.TimeoutExpired:
        print(f"benchmarks.gpu: stopped after {seconds:.0f} s: {' '.join(command)}", file=sys.stderr)
        return False
    finally:
        _end(process, signal.SIGINT)
        if kept and kept.stdin:
            kept.stdin.close()
            kept.wait(timeout=10)


def _end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """End the process and its children: ask, then kill."""
    for number, patience in ((first, 10), (signal.SIGKILL, 10)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())

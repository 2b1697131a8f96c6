"""Everything that wants an NVIDIA GPU in one command within nine minutes: GPU tests, then the benchmarks.

    make gpu                                   # or, on a machine where nothing can be installed:
    python -m benchmarks.gpu --only attention  # after `make gpu-path`, see the Makefile

Needs torch, triton, numpy and pytest. Records go to --out (default: the folder $OUT where that is set, else
benchmarks/results) as they are made, beside them tests.txt and benchmarks.txt with what was printed.
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
    """Return a sentence on what keeps the GPU run from starting, or None."""
    absent = [name for name in ("torch", "triton", "numpy") if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} must be installed"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, the kernels need 8.0"
    return None


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
    """Run the GPU tests and the benchmarks; return 0 if the tests passed, 1 if not, 2 if nothing could start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything together")
    parser.add_argument("--only", default="", help="tests, a part, or benchmarks whose case contains this")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="folder of the records"
    )
    parser.add_argument("--dry-run", action="store_true", help="walk through it without a GPU; nothing is recorded")
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
    """Run `command` for at most so long, what it prints going to `log` too; interrupted, so that it can sum up."""
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

"""Runs the GPU tests, then the benchmarks, on one NVIDIA GPU within nine minutes.

    make gpu                                   # or, on a machine where nothing can be installed:
    python -m benchmarks.gpu --only attention  # after `make gpu-path`, see the Makefile

Needs torch, triton, numpy, and for the tests pytest and hypothesis. Records are written to --out as they are made.
Beside them, tests.txt and benchmarks.txt hold what was printed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.journal import end, run_until
from benchmarks.records import RESULTS, ROOT

RUN = [sys.executable, "-m", "benchmarks.run"]
TEST_SHARE = 0.35
"""At most this share of the time goes to the tests."""
WARMERS = 4
"""Processes that compile the peers while the tests run."""


def missing() -> str | None:
    """Return a sentence on what keeps the run from starting, or None."""
    if reason := absent("torch", "triton", "numpy"):
        return reason
    import torch

    from sagan_fast.kernels.configs import MIN_ARCH
    from sagan_fast.ops.backends import triton_refusal

    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    reason = triton_refusal(torch.device("cuda"), torch.bfloat16, MIN_ARCH)
    return f"the kernels cannot run here: {reason}" if reason else None


def absent(*names: str) -> str | None:
    """Return a sentence on those of the packages that are not installed, or None."""
    lacking = [name for name in names if find_spec(name) is None]
    return f"{', '.join(lacking)} must be installed" if lacking else None


def test_command(dry: bool) -> list[str]:
    """Return the command of the GPU tests: all of them, however many fail, in parallel where it can."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-n", "4"] if find_spec("xdist") else []
    command += ["--timeout", "100"] if find_spec("pytest_timeout") else []
    return [*command, *(["--collect-only", "-q"] if dry else []), "tests"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the GPU tests and the benchmarks; return 0 if all passed, 1 if not, 2 if nothing could start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    out = Path(os.environ.get("OUT") or RESULTS)
    add = parser.add_argument
    add("--minutes", type=float, default=8.5, help="time limit for tests and benchmarks together (default 8.5)")
    add("--only", default="", metavar="TEXT", help="tests, or a value of `python -m benchmarks.run --only`")
    add("--out", type=Path, default=out, help="folder of the records (default $OUT, or benchmarks/results)")
    add("--dry-run", action="store_true", help="try all steps without a GPU; record nothing")
    options = parser.parse_args(argv)
    reason = None if options.dry_run else missing()
    if reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.minutes * 60
    options.out.mkdir(parents=True, exist_ok=True)
    passed = True
    if options.only in ("", "tests") and (reason := absent("pytest", "hypothesis")):
        print(f"benchmarks.gpu: the tests are left out: {reason}", file=sys.stderr)
        passed = False
    elif options.only in ("", "tests"):
        warmers = [] if options.dry_run or options.only else [_warmer(i) for i in range(WARMERS)]
        try:
            log = None if options.dry_run else options.out / "tests.txt"
            passed = _run(test_command(options.dry_run), options.minutes * 60 * TEST_SHARE, log)
        finally:
            for process in warmers:
                end(process)
    if options.only != "tests":
        left = (deadline - time.monotonic()) / 60
        command = [*RUN, "--minutes", f"{left - 0.5:.2f}", "--out", str(options.out)]
        command += ["--dry-run"] if options.dry_run else ["--device", "cuda"]
        command += ["--only", options.only] if options.only else []
        log = None if options.dry_run else options.out / "benchmarks.txt"
        passed = _run(command, left * 60, log) and passed
    return 0 if passed else 1


def _warmer(index: int) -> subprocess.Popen[bytes]:
    command = [*RUN, "--device", "cuda", "--warm", f"{index}/{WARMERS}"]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere, start_new_session=True)


def _run(command: Sequence[str], seconds: float, log: Path | None = None) -> bool:
    """Run `command` for at most so many seconds, then interrupt it. What it prints goes to `log` too."""
    print("$ " + " ".join(command), flush=True)
    tee = ["tee", str(log or os.devnull)]
    with subprocess.Popen(tee, stdin=subprocess.PIPE, start_new_session=True) as kept:
        streams = dict(stdout=kept.stdin, stderr=kept.stdin)
        status = run_until(time.monotonic() + seconds, command, first=signal.SIGINT, **streams)
    if status is None:
        print(f"benchmarks.gpu: stopped after {seconds:.0f} s: {' '.join(command)}", file=sys.stderr)
    return status in (0, 5)  # 5: pytest found no such test


if __name__ == "__main__":
    sys.exit(main())

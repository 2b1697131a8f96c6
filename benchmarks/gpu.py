"""Runs the gate, the GPU tests and the benchmarks on one NVIDIA GPU within nine minutes, the most valuable first.

    make gpu                                   # or, on a machine where nothing can be installed:
    python -m benchmarks.gpu --only attention  # after `make gpu-path`, see the Makefile

Needs torch, triton, numpy, and for the tests pytest and hypothesis. Records are written to --out as they are made.
Beside them, gpu.txt holds what was printed. Kernels compiled by `make gpu-cache` are unpacked where there are any.
"""

import argparse
import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import gpu_cache
from benchmarks.journal import GRACE, end, run_until
from benchmarks.records import RESULTS, ROOT

TESTS_S = 110.0
"""About what the tests take on an H200 with sixteen cores, four at a time; they are stopped after a fifth more."""
FIRST = ["tests/kernels", "tests/ops", "tests/layers"]
OTHERS = sorted({f"tests/{path.relative_to(ROOT).parts[1]}" for path in ROOT.glob("tests/**/test_*.py")} - {*FIRST})
"""Tests of the kernels come before all others."""


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
    return [*command, *(["--collect-only", "-q"] if dry else []), *FIRST, *OTHERS]


def main(argv: Sequence[str] | None = None) -> int:
    """Run gate, tests and benchmarks; return 0 if all passed, 1 if not, 2 if nothing could start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    given = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    add = parser.add_argument
    add("--minutes", type=float, default=8.5, help="time limit for tests and benchmarks together (default 8.5)")
    add("--only", default="", metavar="TEXT", help="tests, or a value of `python -m benchmarks.run --only`")
    add("--out", type=Path, default=given, help="folder of the records (default $OUT, or benchmarks/results)")
    add("--dry-run", action="store_true", help="try all steps without a GPU; records go to --out if that is given")
    options = parser.parse_args(argv)
    began = time.monotonic()
    reason = absent("torch", "triton", "numpy") if options.dry_run else missing()
    if reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        options.out = options.out or RESULTS
        options.out.mkdir(parents=True, exist_ok=True)
        _keep_log(options.out / "gpu.txt")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended too
    cached = gpu_cache.unpack()
    from benchmarks import run
    from benchmarks.harness import Target

    only = "" if options.only == "tests" else options.only
    arguments = ["--dry-run"] if options.dry_run else ["--device", "cuda"]
    arguments += [f"--out={options.out}"] if options.out else []
    arguments += [f"--only={only}"] if only else []
    parts, text = run.choose(run.PARTS, Target("cuda"), run.parse(arguments, run.PARTS))
    tests_s = 0.0 if only else TESTS_S
    if options.only != "tests":
        print(run.schedule(run.estimates(parts, Target("cuda"), text, cached, tests_s), options.minutes), flush=True)
    deadline = began + options.minutes * 60 - GRACE
    passed = True

    def benchmarks(parts: Sequence[run.Part]) -> bool:
        return not parts or run.supervised([part.name for part in parts], arguments, deadline)

    warmers = [_warmer(i, run.WARMERS) for i in range(run.WARMERS if not (options.dry_run or options.only) else 0)]
    try:
        if not options.only:
            passed = benchmarks([part for part in parts if not part.timed])
            parts = [part for part in parts if part.timed]
        if tests_s and (reason := absent("pytest", "hypothesis")):
            print(f"benchmarks.gpu: the tests are left out: {reason}", file=sys.stderr)
            passed = False
        elif tests_s:
            left = deadline - time.monotonic()
            most = left if options.only else min(left, 1.2 * TESTS_S)
            passed = tests(test_command(options.dry_run), most) and passed
    finally:
        for process in warmers:
            end(process)
    if options.only != "tests":
        passed = benchmarks(parts) and passed
    return 0 if passed else 1


def _warmer(index: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--warm", f"{index}/{count}"]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere, start_new_session=True)


def tests(command: Sequence[str], seconds: float) -> bool:
    """Run `command` for at most so many seconds, then interrupt it; return whether it passed."""
    print("$ " + " ".join(command), flush=True)
    status = run_until(time.monotonic() + seconds, command, first=signal.SIGINT)
    if status is None:
        print(f"benchmarks.gpu: stopped after {seconds:.0f} s: {' '.join(command)}", file=sys.stderr)
    return status in (0, 5)  # 5: pytest found no such test


def _keep_log(path: Path) -> None:
    """Write to `path` too what this process and its children print from now on."""
    tee = subprocess.Popen(["tee", str(path)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    tee.stdin.close()
    atexit.register(lambda: (sys.stdout.flush(), os.closerange(1, 3), tee.wait(5)))


if __name__ == "__main__":
    sys.exit(main())

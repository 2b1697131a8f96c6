"""A journal of what a benchmark process has done, so that another can go on after a crash or a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT, append_line

MOST_TRIES = 12
"""A process is started at most so many times."""


GRACE = 20
"""Seconds in which a process ends the case that it is at when its time is up."""


class Journal:
    """A file with a line for each provider begun, provider lost and case done. Without a path it is only in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.done: set[str] = set()
        self.lost: dict[str, dict[str, str]] = {}
        self.last: tuple[str, str] | None = None
        """the case and provider of the last line, if that says that they began"""
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._take(**json.loads(line))

    def begin(self, case: str, provider: str) -> None:
        """Say that `provider` is run on `case` next."""
        self._write(case=case, provider=provider)

    def lose(self, case: str, provider: str, why: str) -> None:
        """Say that `provider` must not be run on `case` again."""
        self._write(case=case, provider=provider, lost=why)

    def finish(self, case: str) -> None:
        """Say that `case` is done."""
        self._write(case=case)

    def _write(self, **line: str) -> None:
        self._take(**line)
        if self.path is not None:
            append_line(self.path, line)

    def _take(self, case: str, provider: str = "", lost: str = "") -> None:
        self.last = (case, provider) if provider and not lost else None
        if lost:
            self.lost.setdefault(case, {})[provider] = lost
        elif not provider:
            self.done.add(case)


def supervise(command: Sequence[str], path: Path, deadline: float, stall: float) -> bool:
    """Run `command` with its journal at `path` until it is done; start it again after a crash or a hang.

    If the process died or wrote nothing for `stall` seconds, the provider it was at is not run again on that case.
    During the timing all providers take turns, so then the case is left out. `command` is also given the --minutes
    that are left. It is killed GRACE seconds after `deadline`, a reading of time.monotonic. Returns whether all was
    done, or as much as time allowed: a slow machine is no failure.
    """
    outside = 0
    for _ in range(MOST_TRIES):
        print("$ " + " ".join(command), flush=True)
        path.touch()
        left = f"--minutes={(deadline - time.monotonic()) / 60:.2f}"
        status = run_until(deadline + GRACE, [*command, left, "--journal", str(path)], path, stall)
        if status == 0:
            return True
        if time.monotonic() >= deadline:
            print("benchmarks: stopped, time is up", flush=True)
            return True
        journal = Journal(path)
        why = f"no sign of life for {stall:.0f} s" if status is None else f"the process ended with status {status}"
        if journal.last is not None:
            case, provider = journal.last
            print(f"benchmarks: {case}: {provider}: {why}", flush=True)
            if provider == "timing":
                journal.finish(case)
            else:
                journal.lose(case, provider, why)
        else:
            outside += 1
            print(f"benchmarks: {why} outside of any case", file=sys.stderr, flush=True)
            if outside > 1:
                return False
    return False


def run_until(
    deadline: float, command: Sequence[str], sign: Path | None = None, stall: float = 0.0,
    first: signal.Signals = signal.SIGKILL, **streams: Any,
) -> int | None:  # fmt: skip
    """Run `command` and return its exit status, or None if it was stopped, with its children, by the signal `first`.

    That is at `deadline`, or where the file `sign` was not written for `stall` seconds.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    try:
        while time.monotonic() < deadline and not (sign and time.time() - sign.stat().st_mtime >= stall):
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        end(process, first)


def end(process: subprocess.Popen[Any], first: signal.Signals = signal.SIGKILL) -> None:
    """End the process and its children with the signal `first`, and kill them if they are there 10 s later."""
    for number in (first, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue

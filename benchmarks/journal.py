"""A journal of what a benchmark process has done, so that another can go on after a crash or a hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_TRIES = 12
"""A part is started at most so many times."""


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
                self._take(json.loads(line))

    def begin(self, case: str, provider: str) -> None:
        """Say that `provider` is run on `case` next."""
        self._write({"case": case, "provider": provider})

    def lose(self, case: str, provider: str, why: str) -> None:
        """Say that `provider` must not be run on `case` again."""
        self._write({"case": case, "provider": provider, "lost": why})

    def finish(self, case: str) -> None:
        """Say that `case` is done."""
        self._write({"case": case})

    def _write(self, line: dict[str, Any]) -> None:
        self._take(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        self.last = None
        if "lost" in line:
            self.lost.setdefault(line["case"], {})[line["provider"]] = line["lost"]
        elif "provider" in line:
            self.last = (line["case"], line["provider"])
        else:
            self.done.add(line["case"])


def supervise(command: Sequence[str], path: Path, deadline: float, stall: float) -> bool:
    """Run `command` with its journal at `path` until it is done; start it again after a crash or a hang.

    If the process died or wrote nothing for `stall` seconds, the provider it was at is not run again on that case.
    During the timing all providers take turns, so then the case is left out. Nothing runs after `deadline`, a reading
    of time.monotonic. Returns whether all was done, or as much as time allowed: a slow machine is no failure.
    """
    tries: dict[tuple[str, str] | None, int] = {}
    for _ in range(MOST_TRIES):
        print("$ " + " ".join(command), flush=True)
        status = _watch([*command, "--journal", str(path)], path, deadline, stall)
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
        elif status != 75:  # 75: it has said itself what was lost
            tries[None] = tries.get(None, 0) + 1
            print(f"benchmarks: {why} outside of any case", file=sys.stderr, flush=True)
            if tries[None] > 1:
                return False
    return False


def _watch(command: Sequence[str], path: Path, deadline: float, stall: float) -> int | None:
    """Return the exit status of `command`, None if it was killed because its journal stood still or time was up."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    seen, since = -1, time.monotonic()
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            size = path.stat().st_size if path.exists() else 0
            if size != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since < stall and time.monotonic() < deadline:
                continue
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise

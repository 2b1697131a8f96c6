"""Writes the log of a run: log.jsonl, TensorBoard, and lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from sagan_fast.files import explained, replacing

HEARTBEAT = 60.0
"""Seconds of silence after which a run that has no terminal says how far it is."""


class RunLog:
    """Writes lines of numbers to RUN/log.jsonl and RUN/tensorboard, and shows progress on a terminal.

    On a terminal a progress bar; elsewhere one plain line a call with the time left, and a heartbeat where lines are
    far apart. On a resumed run the lines after `step` (the checkpoint's) are dropped: they are about to be written
    again. Raises InputError where the folder cannot be written or the disk is full.
    """

    def __init__(self, run: Path, step: int, steps: int, stream: TextIO | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.stream = stream or sys.stdout
        self.steps = steps
        self.run, self.path = run, run / "log.jsonl"
        self.began = self.spoke = time.monotonic()
        self.first = step
        with self._disk():
            _drop_lines_after(self.path, step)
            self.file = self.path.open("a")
            self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]
        self.progress: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=Console(file=self.stream))
            self.task = self.progress.add_task("starting", total=steps, completed=step)
            self.progress.start()

    def line(self, step: int, values: Mapping[str, float], curves: Mapping[str, float] | None = None) -> None:
        """Record `values` at `step` everywhere, `curves` in TensorBoard alone."""
        self.scores(step, values, curves)
        short = (
            f"D loss {values['d_loss']:.3f}  G loss {values['g_loss']:+.3f}  "
            f"D real {values['d_real']:+.2f}  D fake {values['d_fake']:+.2f}  {values['images_per_s']:.0f} images/s"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=short.split("  D real")[0])
        else:
            self.say(f"step {step}/{self.steps}  {short}{self._left(step)}")

    def scores(self, step: int, values: Mapping[str, float], curves: Mapping[str, float] | None = None) -> None:
        """Write `values` of this or an earlier `step` to log.jsonl and TensorBoard, `curves` to TensorBoard only."""
        with self._disk():
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()
            for name, value in {**values, **(curves or {})}.items():
                self.board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
            self.board.flush()  # type: ignore[no-untyped-call]

    def step_done(self, step: int) -> None:
        """Move the progress bar, if there is one; else print a line after a long silence."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
        elif time.monotonic() - self.spoke > HEARTBEAT:
            pace = (time.monotonic() - self.began) / max(step - self.first, 1)
            self.say(f"step {step}/{self.steps}  {pace:.2f} s a step{self._left(step)}")

    def back_to(self, step: int) -> None:
        """Move the lines after `step` from log.jsonl to diverged.jsonl: the run went back there."""
        with self._disk():
            self.file.close()
            with (self.run / "diverged.jsonl").open("a") as kept:
                kept.writelines(f"{line}\n" for line in _drop_lines_after(self.path, step))
            self.file = self.path.open("a")
        self.first, self.began = step, time.monotonic()

    def say(self, sentence: str) -> None:
        """Show `sentence` to the person watching."""
        self.spoke = time.monotonic()
        if self.progress is not None:
            self.progress.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=self.stream, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.progress is not None:
            self.progress.stop()
        with contextlib.suppress(OSError) if error is not None else self._disk():
            try:
                self.file.close()
            finally:
                self.board.close()  # type: ignore[no-untyped-call]

    def _left(self, step: int) -> str:
        """Return the estimated time left, at the pace since the start, including sampling and saving."""
        done = step - self.first
        if done < 1 or step >= self.steps:
            return ""
        seconds = (time.monotonic() - self.began) / done * (self.steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"cannot write the log in {self.run}")


class SilentLog:
    """The log of a process that is not the main one: it has the methods of RunLog, which do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Log = RunLog | SilentLog


def _drop_lines_after(path: Path, step: int) -> list[str]:
    """Take the lines after `step`, and any that a crash cut off, out of the log `path`; return the former."""
    if not path.exists():
        return []
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text().splitlines():
        try:
            (kept if json.loads(line)["step"] <= step else dropped).append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # cut off by a crash
    with replacing(path) as file:  # or a kill in the midst would take the history with it
        file.writelines(f"{line}\n".encode() for line in kept)
    return dropped

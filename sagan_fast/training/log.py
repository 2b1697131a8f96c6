"""What a run says of itself: log.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sagan_fast.errors import InputError


class RunLog:
    """Writes lines of numbers to RUN/log.jsonl and RUN/tensorboard, and shows progress on a terminal.

    On a terminal a progress bar; elsewhere one plain line a call. On a resumed run the lines after `step` (the
    checkpoint's) are dropped: they are about to be written again.
    """

    def __init__(self, run: Path, step: int, steps: int, stream: TextIO | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.stream = stream or sys.stdout
        self.steps = steps
        self.path = run / "log.jsonl"
        try:
            _drop_lines_after(self.path, step)
            self.file = self.path.open("a")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        self.board = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]
        self.progress: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=Console(file=self.stream))
            self.task = self.progress.add_task("starting", total=steps, completed=step)
            self.progress.start()

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step` everywhere."""
        entry = {"step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        short = (
            f"D loss {values['d_loss']:.3f}  G loss {values['g_loss']:+.3f}  "
            f"D real {values['d_real']:+.2f}  D fake {values['d_fake']:+.2f}  {values['images_per_s']:.0f} images/s"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=short.split("  D real")[0])
        else:
            self.say(f"step {step}/{self.steps}  {short}")

    def step_done(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def say(self, sentence: str) -> None:
        """Show `sentence` to the person watching."""
        if self.progress is not None:
            self.progress.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=self.stream, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.file.close()
        self.board.close()  # type: ignore[no-untyped-call]


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # cut off by a crash
    path.write_text("".join(f"{line}\n" for line in kept))

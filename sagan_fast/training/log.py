"""Writes the log of a run: log.jsonl, TensorBoard, and lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from sagan_fast.files import explained, replacing

HEARTBEAT = 60.0
"""Seconds of silence after which a run that has no terminal says how far it is."""


GROUPS = {
    "d_loss": "loss/discriminator", "g_loss": "loss/generator", "d_real": "score/real", "d_fake": "score/fake",
    "r1": "penalty/r1", "r2": "penalty/r2", "gradient_penalty": "penalty/gradient_penalty", "lecam": "penalty/lecam",
    "images_per_s": "speed/images_per_s", "loader_wait": "speed/loader_wait", "memory_gib": "speed/memory_gib",
    "broken_images": "run/broken_images", "rollbacks": "run/rollbacks",
}  # fmt: skip
"""What a number of the log is called in TensorBoard, which shows what stands before the slash together."""
GLANCE = 1.0
"""Seconds between two looks at the losses of the step for the progress bar; a look waits for the device."""
WIDE = 110
"""Columns of a terminal that has room for whole words beside the bar."""


class RunLog:
    """Writes lines of numbers to RUN/log.jsonl and RUN/tensorboard, and shows progress on a terminal.

    On a terminal a progress bar with the losses and scores of the step, which stays when the run is done. Elsewhere one
    plain line a call with the time left, one after the first step, and a heartbeat where lines are far apart. On a
    resumed run the lines after `step` (the checkpoint's) are dropped: they are about to be written again.
    `batch_size` is the number of images a step. `boards` get what TensorBoard gets. Raises InputError where the folder
    cannot be written or the disk is full.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        stream: TextIO | None = None,
        *,
        batch_size: int = 0,
        boards: Sequence[Any] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.stream = stream or sys.stdout
        self.steps, self.batch_size = steps, batch_size
        self.run, self.path = run, run / "log.jsonl"
        self.began = self.spoke = time.monotonic()
        self.first = step
        self.seen = (step, -math.inf)
        with self._disk():
            _drop_lines_after(self.path, step)
            self.file = self.path.open("a")
            board = SummaryWriter(run / "tensorboard", purge_step=step + 1)  # type: ignore[no-untyped-call]
            self.boards: list[Any] = [board, *boards]
        self.progress: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(file=self.stream)
            self.wide = console.width >= WIDE
            columns = (
                *([TextColumn("step")] if self.wide else []), MofNCompleteColumn(), BarColumn(12 if self.wide else 6),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.description}"),
            )  # fmt: skip
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("starting", total=steps, completed=step, rate="")
            self.progress.start()

    def line(self, step: int, values: Mapping[str, float], curves: Mapping[str, float] | None = None) -> None:
        """Record `values` at `step` everywhere, `curves` in TensorBoard alone."""
        self.scores(step, values, curves)
        rate = self._rate(values["images_per_s"])
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=_short(values, self.wide), rate=rate)
            self.seen = step, time.monotonic()
        else:
            self.say(f"step {step}/{self.steps}  {_short(values)}  {rate}{self._left(step)}")

    def scores(self, step: int, values: Mapping[str, float], curves: Mapping[str, float] | None = None) -> None:
        """Write `values` of this or an earlier `step` to log.jsonl and TensorBoard, `curves` to TensorBoard only."""
        with self._disk():
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()
            for board in self.boards:
                for name, value in {**values, **(curves or {})}.items():
                    board.add_scalar(GROUPS.get(name, name), value, step)
                board.flush()

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Show the uint8 picture (3, h, w) in TensorBoard."""
        with self._disk():
            for board in self.boards:
                board.add_image(name, image, step)
                board.flush()

    def words(self, name: str, text: str) -> None:
        """Show `text` in TensorBoard, as it is."""
        with self._disk():
            for board in self.boards:
                board.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def step_done(self, step: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Move the progress bar, if there is one; else print a line after the first step, or after a long silence.

        `values` are the numbers of the step, which are read at most once a second.
        """
        now = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
            if values is not None and now - self.seen[1] > GLANCE:
                before, then = self.seen
                rate = self._rate((step - before) * self.batch_size / (now - then)) if before > self.first else ""
                self.progress.update(self.task, description=_short(_floats(values), self.wide), rate=rate)
                self.seen = step, now
        elif values is not None and step == self.first + 1 < self.steps:
            self.say(f"step {step}/{self.steps}  {_short(_floats(values))}")
        elif now - self.spoke > HEARTBEAT:
            pace = (now - self.began) / max(step - self.first, 1)
            self.say(f"step {step}/{self.steps}  {pace:.2f} s a step{self._left(step)}")

    def _rate(self, images_per_s: float) -> str:
        narrow = self.progress is not None and not self.wide
        return f"{images_per_s:.0f} {'img/s' if narrow else 'images/s'}"

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
                for board in self.boards:
                    board.close()

    def _left(self, step: int) -> str:
        """Return the estimated time left, at the pace since the start, including sampling and saving."""
        done = step - self.first
        if done < 1 or step >= self.steps:
            return ""
        seconds = (time.monotonic() - self.began) / done * (self.steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"cannot write the log in {self.run}")


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the numbers of a step; one transfer from the device."""
    names = ("d_loss", "g_loss", "d_real", "d_fake")
    numbers: list[float] = torch.stack([values[name].detach().float() for name in names]).tolist()
    return dict(zip(names, numbers, strict=True))


def _short(values: Mapping[str, float], wide: bool = True) -> str:
    """Return losses and scores as words, or with fewer letters where there is no room."""
    d_loss, g_loss, real, fake = (values[name] for name in ("d_loss", "g_loss", "d_real", "d_fake"))
    if wide:
        return f"D loss {d_loss:.3f}  G loss {g_loss:+.3f}  D real {real:+.2f}  D fake {fake:+.2f}"
    return f"D {d_loss:.2f} G {g_loss:+.2f} real {real:+.1f} fake {fake:+.1f}"


class SilentLog:
    """The log of a process that is not the main one: it has the methods of RunLog, which do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Log = RunLog | SilentLog


def keep_lines_after(run: Path, step: int) -> None:
    """Move the lines of RUN/log.jsonl after `step` to RUN/replaced.jsonl; InputError if that cannot be written."""
    with explained(f"cannot write the log in {run}"):
        if dropped := _drop_lines_after(run / "log.jsonl", step):
            with (run / "replaced.jsonl").open("a") as kept:
                kept.writelines(f"{line}\n" for line in dropped)


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

"""Traces some steps, for chrome://tracing or https://ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import torch

from sagan_fast.files import WRITING, explained

WARM_UP = 3
"""Steps left out first: kernels are loaded and memory is allocated in them."""


class Profile:
    """Writes RUN/profile/step-N.json, a torch.profiler trace of the `steps` steps from N on; with 0 it does nothing.

    Only the main process makes one. CPU and CUDA activity, with shapes.
    """

    def __init__(self, run: Path, steps: int) -> None:
        self.folder, self.steps = run / "profile", steps
        self.seen = self.start = 0
        self.tracing: Any = None

    def step_done(self, step: int) -> Path | None:
        """Note that `step` is done; return the trace if it has just been written."""
        if not self.steps:
            return None
        self.seen += 1
        if self.tracing is None and self.seen >= WARM_UP:
            self.tracing = torch.profiler.profile(record_shapes=True, acc_events=True)
            self.tracing.start()
            self.start = step
        elif self.tracing is not None and step - self.start >= self.steps:
            return self.close()
        return None

    def close(self) -> Path | None:
        """Write what was recorded so far, if recording is under way, and record no more; return the file."""
        tracing, self.tracing, self.steps = self.tracing, None, 0
        if tracing is None:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        tracing.stop()
        path = self.folder / f"step-{self.start + 1:07d}.json"
        with explained(f"cannot write {path}", "", WRITING):
            self.folder.mkdir(parents=True, exist_ok=True)
            tracing.export_chrome_trace(str(path))
        return path

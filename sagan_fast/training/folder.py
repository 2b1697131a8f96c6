"""The folder of a run: whether it may be used, by one run at a time, and the files that are no checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from sagan_fast.errors import InputError
from sagan_fast.training.checkpoint import Checkpoints
from sagan_fast.training.config import TrainConfig

PATIENCE = 15.0
"""Seconds to wait for a folder in use: the readers of a killed run outlive it by some."""


class RunFolder:
    """RUN, with config.yaml, log.jsonl, samples/, checkpoints/ and tensorboard/; only the main process writes there."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self._lock: int | None = None

    def check(self, resume: bool) -> None:
        """Raise InputError if the folder is a file, or holds a run and is not to be resumed."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: --out must name a folder")
        if not resume and (self.path / "config.yaml").exists():
            raise InputError(f"{self.path} already holds a run: add --resume to go on with it, or choose another --out")

    def open(self, config: TrainConfig) -> None:
        """Make the folder and write config.yaml; InputError if that fails, or another process trains here."""
        import yaml

        path = self.path / "config.yaml"
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)
        try:
            for folder in (self.path, self.path / "samples", self.checkpoints.folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._take()
            temporary = self.path / ".config.yaml"
            temporary.write_text(text)
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        self.checkpoints.clean()

    def close(self) -> None:
        """Let other processes train here."""
        if self._lock is not None:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough while a forked reader has it too
            os.close(self._lock)
            self._lock = None

    def sample_path(self, step: int) -> Path:
        """Return the file for the sample grid of `step`."""
        return self.path / "samples" / f"{step:07d}.png"

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.checkpoints.folder, os.O_RDONLY)
        deadline = time.monotonic() + PATIENCE
        # OSError but for a taken lock: a network file system that has none.
        with contextlib.suppress(OSError):
            while True:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        self.close()
                        raise InputError(
                            f"another process is training in {self.path}: end it first, or choose another --out"
                        ) from None
                    time.sleep(0.2)

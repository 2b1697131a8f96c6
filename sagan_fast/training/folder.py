"""Checks, makes and locks the folder of a run."""

from collections.abc import Callable
from pathlib import Path

from sagan_fast.errors import InputError
from sagan_fast.files import clean, explained, hold, replacing
from sagan_fast.training.checkpoint import Checkpoints
from sagan_fast.training.config import TrainConfig

PATIENCE = 15.0
"""Seconds to wait for a folder in use: a run that was asked to stop first writes its checkpoint."""


class RunFolder:
    """RUN with config.yaml, log.jsonl, samples/, checkpoints/ and tensorboard/; the main process alone writes there."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self._release: Callable[[], None] = lambda: None

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
        with explained(f"cannot write {path}"):
            for folder in (self.path, self.path / "samples", self.checkpoints.folder):
                folder.mkdir(parents=True, exist_ok=True)
            taken = f"another process is training in {self.path}: end it first, or choose another --out"
            self._release = hold(self.path / ".lock", taken, PATIENCE)
            with replacing(path) as file:
                file.write(text.encode())
        clean(self.checkpoints.folder)

    def close(self) -> None:
        """Release the folder for other runs."""
        self._release()

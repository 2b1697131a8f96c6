"""Reads what a run has left on the disk so far: its log, its pictures and its scores. Writes nothing."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagan_fast.models.checkpoint import find_checkpoint
from sagan_fast.models.generator import is_exported

_PICTURE = re.compile(r"(\d+)\.png")
Line = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A grid of samples that the trainer wrote after `step`."""

    step: int
    path: Path


class History:
    """The run in `folder`; with None, for an export or a single checkpoint, everything is empty.

    Files that are missing, damaged or not inside `folder` count as absent: a run is often looked at while it writes.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lines: list[Line] = []
        self._read = (-1, 0)  # inode and number of bytes read of the log

    def lines(self) -> list[Line]:
        """Return the lines of log.jsonl so far, each with "step"; only what is new is read."""
        path = self._inside("log.jsonl")
        if path is None:
            return []
        try:
            with path.open("rb") as file:
                found = path.stat()
                inode, done = self._read
                if found.st_ino != inode or found.st_size < done:  # the run went back, and wrote it anew
                    self._lines, done = [], 0
                file.seek(done)
                new = file.read()
        except OSError:
            return self._lines
        whole = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        self._read = (found.st_ino, done + len(whole))
        for text in whole.splitlines():
            line = _json(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                self._lines.append(line)
        return self._lines

    def pictures(self) -> list[Picture]:
        """Return the grids of samples, the earliest step first."""
        names = [] if self.folder is None else [path.name for path in self.folder.glob("samples/*.png")]
        found = [(match, self._inside("samples", name)) for name in names if (match := _PICTURE.fullmatch(name))]
        return sorted((Picture(int(m[1]), path) for m, path in found if path), key=lambda picture: picture.step)

    def picture(self, name: str) -> Path | None:
        """Return the picture `name` of `pictures`, or the run's data.png; None for every other name."""
        if name == "data.png":
            return self._inside(name)
        return next((picture.path for picture in self.pictures() if picture.path.name == name), None)

    def scores(self) -> list[dict[str, Any]]:
        """Return the results of evaluations by step: evaluation/*.json, and *.json of `evaluate --json` in the run."""
        if self.folder is None:
            return []
        paths = [path.relative_to(self.folder) for place in ("evaluation/*.json", "*.json")
                 for path in self.folder.glob(place)]  # fmt: skip
        found = [result for path in paths if (result := self._result(path)) is not None]
        return sorted(found, key=lambda result: step_of(result) or 0)

    def config(self) -> dict[str, Any]:
        """Return what config.yaml holds."""
        import yaml

        path = self._inside("config.yaml")
        try:
            values = yaml.safe_load(path.read_text()) if path else None
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def _result(self, path: Path) -> dict[str, Any] | None:
        whole = self._inside(*path.parts)
        try:
            result = _json(whole.read_bytes()) if whole else None
        except OSError:
            return None
        return result if isinstance(result, dict) and isinstance(result.get("protocol"), dict) else None

    def _inside(self, *parts: str) -> Path | None:
        """Return the file at `parts` of the folder; None if it is none, or a link leads out of the folder."""
        if self.folder is None:
            return None
        try:
            whole, root = self.folder.joinpath(*parts).resolve(), self.folder.resolve()
        except OSError:
            return None
        return whole if whole.is_relative_to(root) and whole.is_file() else None


def step_of(result: dict[str, Any]) -> int | None:
    """Return the step of the generator that the evaluation `result` is of, if it says so."""
    generated = result["protocol"].get("generated")
    step = generated.get("step") if isinstance(generated, dict) else None
    return step if isinstance(step, int) else None


def run_of(source: Path) -> Path | None:
    """Return the run folder of `source`, a run folder or a checkpoint in one; None for an export and other files."""
    if source.is_dir():
        return None if is_exported(source) else source
    folder = source.absolute().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() else None


def is_started(source: Path) -> bool:
    """Return whether `source` is a run folder with a log or configuration, be there a checkpoint yet or not."""
    return source.is_dir() and any((source / name).is_file() for name in ("log.jsonl", "config.yaml"))


def mark_of(source: Path) -> tuple[int, int, int] | None:
    """Return what changes when the weights of `source` do, or None without any; InputError if there is no such file."""
    path = source if is_exported(source) else find_checkpoint(source)
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None

"""The folder of a run: made, checked and locked; its checkpoints, which models/checkpoint.py reads."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sagan_fast.errors import InputError
from sagan_fast.files import clean, explained, hold, link, move, replacing, written
from sagan_fast.models.checkpoint import checkpoints_of, find_checkpoint, holds_checkpoints, is_whole, load_checkpoint
from sagan_fast.training.config import TrainConfig

_NAME = re.compile(r"step-(\d+)\.pt")
PATIENCE = 15.0
"""Seconds to wait for a folder in use: a run that was asked to stop first writes its checkpoint."""
_UNTOUCHED = "; the one before it is untouched"


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write `content` (tensors, numbers, strings, lists, dictionaries) to `path`: after a crash the old file remains.

    Raises InputError if the folder cannot be written or the disk is full; the old file is untouched.
    """
    with written(path, f"the checkpoint {path}", _UNTOUCHED) as file:
        torch.save(content, file)


class Checkpoints:
    """The checkpoints of a run: step-N.pt, of which the newest `keep` stay, last.pt (the newest) and best.pt.

    last.pt and best.pt are hard links to other checkpoints, or copies where the file system has no links. So each
    checkpoint is written once. Only the main process of a run uses this.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.last = folder / "last.pt"

    def path(self, step: int) -> Path:
        """Return the file of the checkpoint of `step`, which may not exist."""
        return self.folder / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """Return the steps that are there, the oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, content: dict[str, Any], step: int) -> Path:
        """Write the checkpoint of `step`, let last.pt name it and drop those beyond the newest `keep`; return last.pt.

        Raises InputError if it cannot be written; last.pt is then the one before, whole.
        """
        save_atomically(content, self.path(step))
        self._link(self.path(step), self.last)
        self._drop([s for s in self.steps() if s <= step][: -self.keep])
        return self.last

    def before(self, step: int) -> Path | None:
        """Return the newest checkpoint of at most `step`, or the oldest there is, or None without any."""
        steps = self.steps()
        early = [s for s in steps if s <= step] or steps[:1]
        return self.path(early[-1]) if early else None

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, and let last.pt name the newest that stays: the run went back."""
        if good := self.before(step):
            self._link(good, self.last)  # first: a run that is killed here goes on from there
        self._drop([s for s in self.steps() if s > step])

    def continue_from(self, chosen: Path) -> None:
        """Let last.pt name `chosen`."""
        if not (self.last.exists() and chosen.samefile(self.last)):
            self._link(chosen, self.last)

    def after(self, step: int) -> list[Path]:
        """Return the checkpoints of steps later than `step`, with best.pt and its note if the best is one of these."""
        found = [self.path(s) for s in self.steps() if s > step]
        note = self.folder / "best.json"
        try:
            is_later = json.loads(note.read_text())["step"] > step
        except (OSError, ValueError, KeyError, TypeError):
            return found
        return [*found, self.folder / "best.pt", note] if is_later else found

    def chosen(self, which: str) -> Path:
        """Return the checkpoint that `which` names: a step, "best", "newest" or a file. InputError if there is none."""
        if which == "newest":
            return find_checkpoint(self.folder.parent)
        if which in ("best", "last"):
            path = self.folder / f"{which}.pt"
        elif which.isdecimal():
            path = self.path(int(which))
        else:
            path = Path(which).expanduser()
        if path.is_dir():
            path = find_checkpoint(path)
        if not path.exists():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"there is no checkpoint {path}: {self.folder} holds those of the steps {steps}")
        return path

    def newest(self) -> tuple[Path, bytes, str] | None:
        """Return the newest checkpoint that can be read, its bytes, and what is to be said about it; None without any.

        Raises InputError if there are checkpoints, and none can be read.
        """
        run, said, failed = self.folder.parent, "", ""
        for path in checkpoints_of(run):
            try:
                load_checkpoint(path)
            except InputError as error:
                failed = failed or str(error)
                continue
            if path != self.last:
                why = "is older" if is_whole(self.last) and not failed else "is damaged or cut off"
                said = f"{self.last} {why if self.last.exists() else 'is missing'}: the run goes on from {path}"
            return path, path.read_bytes(), said
        if failed or holds_checkpoints(run):
            raise InputError(
                failed or f"no checkpoint in {self.folder} is whole: all are cut off; to start anew, move them away"
            )
        return None

    def pin_best(self, step: int, metric: str, score: float) -> bool:
        """Keep the checkpoint of `step` as best.pt if no earlier `score` was as low; return whether it is the best.

        best.json beside it holds {"step", "metric", "score"}; a best of another metric, or one that cannot be read,
        gives way. A score that is NaN is never the best. Raises InputError if that checkpoint is not there (call this
        right after it was saved) or the folder cannot be written.
        """
        path = self.path(step)
        if not path.exists():
            raise InputError(f"there is no checkpoint {path} to keep as the best")
        if score != score:
            return False
        note = self.folder / "best.json"
        try:
            best = json.loads(note.read_text())
            if best["metric"] == metric and score >= best["score"]:
                return False
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._link(path, self.folder / "best.pt")
        with written(note) as file:
            file.write(json.dumps({"step": step, "metric": metric, "score": score}).encode() + b"\n")
        return True

    def _link(self, path: Path, name: Path) -> None:
        with explained(f"cannot write the checkpoint {name}", _UNTOUCHED):
            link(path, name)

    def _drop(self, steps: list[int]) -> None:
        for step in steps:
            with contextlib.suppress(OSError):  # one file too many is no reason to end a run
                self.path(step).unlink()


class RunFolder:
    """RUN with config.yaml, log.jsonl, samples/, checkpoints/ and tensorboard/; the main process alone writes there."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self._release: Callable[[], None] = lambda: None

    def check(self, resume: bool) -> None:
        """Raise InputError if the folder is a file, or holds a run and is not to be resumed.

        What holds no checkpoint is no run: one that failed before its first does not block its folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: --out must name a folder")
        if not resume and holds_checkpoints(self.path):
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

    def set_aside(self, chosen: Path, step: int) -> tuple[Path, list[str]]:
        """Go on from the checkpoint `chosen`, of `step`: move what is later to a new folder in replaced/.

        That is checkpoints, pictures of samples and scores. Return the folder and the names of what it holds now, which
        are none if nothing was later.
        """
        self.checkpoints.continue_from(chosen)
        numbered = [*self.path.glob("samples/*.png"), *self.path.glob("evaluation/step-*")]
        later = [path for path in numbered if (n := re.search(r"\d+", path.name)) and int(n[0]) > step]
        later += self.checkpoints.after(step)
        numbers = (self.path / "replaced" / str(n) for n in itertools.count(1))
        aside = next(path for path in numbers if not path.exists())
        with explained(f"cannot write {aside}"):
            for path in later:
                place = aside / path.relative_to(self.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    move(path, place)
        return aside, sorted(str(path.relative_to(self.path)) for path in later)

    def interrupted(self) -> str:
        """Return the sentence for a run that was ended in the midst of a step."""
        steps = self.checkpoints.steps()
        kept = f"the last checkpoint is of step {steps[-1]}; --resume goes on" if steps else "nothing was saved yet"
        return f"{self.path}: interrupted; {kept}"

    def close(self) -> None:
        """Release the folder for other runs."""
        self._release()


def rng_state() -> dict[str, Any]:
    """Return the states of PyTorch's global generators, for random numbers that are not drawn from (seed, step)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set PyTorch's global generators to what `rng_state` returned, on CUDA if the number of devices is the same."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

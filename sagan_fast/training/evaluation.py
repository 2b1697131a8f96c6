"""Scores the averaged generator during training: between two steps, or in a second process."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from sagan_fast.data import ImageDataset, open_dataset
from sagan_fast.data.classes import take_order
from sagan_fast.distributed import environment_of_one
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import evaluate
from sagan_fast.evaluation.features import Extractor, open_extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.streams import GeneratedImages
from sagan_fast.files import explained, file_sha256, link, reason, written
from sagan_fast.training.log import Log
from sagan_fast.training.run import Run

NICENESS = 10


class Evaluations:
    """Evaluates a run every `eval_every` steps and at its end, and keeps the checkpoint of the lowest FID as best.pt.

    Results are RUN/evaluation/step-N.json, with their protocol, and lines eval/fid, eval/kid, ... in log.jsonl and
    TensorBoard. A failed evaluation is reported, and the run continues. The training is not affected: the averaged
    generator is only read, and global random numbers are restored. All processes must call `start` together.

    Raises InputError at once, not at the first evaluation, if features or real images cannot be had.
    """

    def __init__(self, run: Run, log: Log) -> None:
        config = run.config
        self.run, self.log = run, log
        self.folder = run.folder.path / "evaluation"
        self.beside: _Beside | None = None
        if not config.eval_every:
            return
        reference_count = config.eval_reference_count or None
        self.protocol = Protocol.preset("clean", count=config.eval_count, reference_count=reference_count)
        if "is" in config.eval_metrics.split(","):
            self.protocol.check_splits()
        world = run.world
        with _undisturbed(world.device):
            # First in one process, which may download; and in a background evaluation's stead, for its sentence.
            opened = functools.partial(open_extractor, config.eval_features, resize=self.protocol.feature_resize)
            world.by_main(opened)
            if config.eval_mode == "inline":
                self.extractor: Extractor = world.together(lambda: opened(device=_scored_on(world.device)))
            self.dataset = run.dataset
            if config.eval_data:
                self.dataset = world.together(self._open_eval_data)
        world.by_main(self._make_folder)

    def _open_eval_data(self) -> ImageDataset:
        """Return the images of `eval_data`, labelled as those of the run where they have labels."""
        config = self.run.config
        known = None if config.num_classes else 0
        dataset = open_dataset(
            config.eval_data, resolution=config.resolution, num_classes=known, on_broken=config.on_broken
        )
        if said := take_order(dataset, self.run.dataset.class_names, self.run.dataset.name):
            self.log.say(said)
        return dataset

    def due(self, step: int) -> bool:
        """Return whether the state after `step` is to be evaluated."""
        config = self.run.config
        return config.eval_every > 0 and (step % config.eval_every == 0 or step == config.steps)

    def start(self) -> float:
        """Evaluate the checkpoint just saved, or start to in the background; return the seconds it took."""
        began = time.perf_counter()
        world, step = self.run.world, self.run.state.step
        if self.run.config.eval_mode == "inline":
            self._inline(step)
        elif world.is_main:
            if step == self.run.config.steps:
                self.finish([])
            if self.beside is not None:
                self.log.say(f"step {step} is not evaluated: the evaluation of step {self.beside.step} is not done")
            else:
                try:
                    self.beside = _Beside(self.run, self.protocol, self.folder, step)
                except OSError as error:
                    self.log.say(f"the evaluation of step {step} cannot be started: {reason(error)}")
        return time.perf_counter() - began

    def poll(self) -> None:
        """Record what an evaluation in the background has found, if it is done."""
        beside = self.beside
        if beside is None or beside.process.poll() is None:
            return
        self.beside = None
        try:
            self._record(beside.step, beside.result(), beside.snapshot)
        except InputError as error:
            self.log.say(f"the evaluation of step {beside.step} failed: {error}")
        finally:
            beside.snapshot.unlink(missing_ok=True)

    def finish(self, stop: Sequence[int]) -> None:
        """Wait for an evaluation in the background, until `stop` holds a signal."""
        if self.beside is not None and not stop:
            self.log.say(f"waiting for the evaluation of step {self.beside.step}")
            while self.beside.process.poll() is None and not stop:
                time.sleep(0.1)
        self.poll()

    def close(self) -> None:
        """End an evaluation in the background that is not done."""
        if self.beside is not None:
            self.beside.end()
            self.beside = None

    def _make_folder(self) -> None:
        with explained(f"cannot write {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("step-*.pt"):  # a killed run's
                left.unlink()

    def _inline(self, step: int) -> None:
        run = self.run
        source: dict[str, Any] = {"step": step, "weights": "average"}
        path = run.folder.checkpoints.path(step)
        if run.world.is_main:
            source |= {"checkpoint": str(path), "sha256": file_sha256(path)}
        metrics = run.config.eval_metrics.split(",")
        try:
            with _undisturbed(run.world.device):
                images = GeneratedImages(run.state.ema, self.protocol)
                images.class_names = run.dataset.class_names
                result = evaluate(images, self.dataset, self.extractor, self.protocol, source=source, metrics=metrics)
        except InputError as error:  # the same in every process
            self.log.say(f"the evaluation of step {step} failed: {error}")
            return

        def write() -> None:
            with written(self.folder / f"step-{step:08d}.json") as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")
            self._record(step, result or {}, path)

        run.world.by_main(write)

    def _record(self, step: int, result: dict[str, Any], checkpoint: Path) -> None:
        """Log the scores of `step` and pin its `checkpoint` if no other had a lower FID."""
        scores = {f"eval/{name}": value for name, value in result.items() if isinstance(value, float)}
        self.log.scores(step, scores)
        checkpoints = self.run.folder.checkpoints
        path = checkpoints.path(step)
        gone = not path.exists()  # newer ones have pushed it out while it was evaluated
        if gone:
            link(checkpoint, path)
        try:
            best = checkpoints.pin_best(step, "fid", result["fid"])
        finally:
            if gone:
                path.unlink()
        told = "  ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in scores.items())
        self.log.say(f"evaluation of step {step}: {told}{'  (best so far)' if best else ''}")


class _Beside:
    """`sagan-fast evaluate` of the checkpoint of `step`, in a second process with low priority."""

    def __init__(self, run: Run, protocol: Protocol, folder: Path, step: int) -> None:
        config = run.config
        self.step = step
        self.snapshot, self.said = folder / f"step-{step:08d}.pt", folder / f"step-{step:08d}.log"
        self.target = self.snapshot.with_suffix(".json")
        self.target.unlink(missing_ok=True)
        link(run.folder.checkpoints.path(step), self.snapshot)
        options = {
            "data": config.eval_data or config.data,
            "json": self.target,
            "protocol": protocol.name,
            "count": protocol.count,
            "reference-count": protocol.reference_count,
            "features": config.eval_features,
            "metrics": config.eval_metrics,
            "on-broken": config.on_broken,
            "unlabelled": "true" if config.unlabelled and not config.eval_data else "false",
            "device": config.eval_device if config.eval_device != "auto" else str(_scored_on(run.world.device).type),
        }
        command = [sys.executable, "-m", "sagan_fast.cli", "evaluate", str(self.snapshot)]
        command += [f"--{name}={value}" for name, value in options.items() if value is not None]
        if nice := shutil.which("nice"):
            command = [nice, "-n", str(NICENESS), *command]
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment_of_one(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run, which ends it in an orderly way
            )

    def result(self) -> dict[str, Any]:
        """Return the scores; InputError with the process' last message if it failed."""
        if self.process.returncode:
            lines: list[str] = []
            with suppress(OSError):
                lines = self.said.read_text(errors="replace").strip().splitlines()
            raise InputError(lines[-1].removeprefix("sagan-fast: ") if lines else "it was killed")
        try:
            found: dict[str, Any] = json.loads(self.target.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.target} cannot be read ({error})") from error
        self.said.unlink(missing_ok=True)
        return found

    def end(self) -> None:
        """End the process, done or not."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.snapshot.unlink(missing_ok=True)


def _scored_on(device: torch.device) -> torch.device:
    """Return where a run on `device` is scored: scores are sums in float64, which mps does not have."""
    return torch.device("cpu") if device.type == "mps" else device


def _undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """Return the context that leaves PyTorch's global random numbers as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])

"""Trains FaceBoxes on annotated pictures: SGD with momentum, steps of the learning rate, the MultiBox loss."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sagan_fast.choices import Float64Device, OnBroken, check_least
from sagan_fast.distributed import pick_device
from sagan_fast.errors import Diverged, InputError
from sagan_fast.faces.average_precision import Accuracy, accuracy
from sagan_fast.faces.boxes import STRIDES, anchors
from sagan_fast.faces.detector import Detector
from sagan_fast.faces.loss import LOC_WEIGHT, multibox_loss
from sagan_fast.faces.network import FaceBoxes
from sagan_fast.faces.samples import Samples, batches
from sagan_fast.faces.wider import Picture
from sagan_fast.files import explained, written

LAST = "last.pth"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How FaceBoxes is trained; the defaults are those of the paper and of the released Caffe code."""

    steps: int = 120_000
    """number of training steps"""
    batch_size: int = 32
    """number of pictures per step"""
    size: int = 1024
    """width and height in pixels that random squares of the pictures are resized to"""
    lr: float = 1e-3
    """learning rate of the first steps"""
    decay_at: tuple[int, ...] = (80_000, 100_000)
    """steps after which the learning rate is divided by ten"""
    warmup: int = 0
    """number of first steps in which the learning rate rises from zero"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD"""
    seed: int = 0
    """random seed of the weights, of the order of the pictures and of their augmentation"""

    def __post_init__(self) -> None:
        check_least(1, self, "steps", "batch_size")
        check_least(32, self, "size")
        check_least(0, self, "warmup", "momentum", "weight_decay", "seed")
        if self.batch_size == 1 and self.size <= STRIDES[-1]:
            raise InputError(
                f"batch_size must be at least 2 at a size of {STRIDES[-1]} or less: the last map of such a picture is "
                "one pixel, which batch norm cannot normalise alone"
            )
        if not self.lr > 0:
            raise InputError(f"lr must be positive, got {self.lr}")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of `step`, from 0."""
        rate: float = self.lr * 0.1 ** sum(step >= end for end in self.decay_at)
        return rate * min(1.0, (step + 1) / self.warmup) if self.warmup else rate


def train(
    pictures: Sequence[Picture],
    recipe: Recipe,
    *,
    out: Path | None = None,
    net: FaceBoxes | None = None,
    device: Float64Device = "cpu",
    num_workers: int = 0,
    resume: bool = False,
    on_broken: OnBroken = "fail",
    log_every: int = 50,
    save_every: int = 1000,
    on_line: Callable[[int, dict[str, float]], None] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[FaceBoxes, int]:
    """Train `net` (None: a new one) on `pictures`; return it, in evaluation, and the number of steps it has.

    Args:
        out: folder for last.pth, with weights and the state of the optimizer, and for log.jsonl.
        resume: go on from out/last.pth where it is there.
        on_broken: "skip" takes another picture for one that cannot be read.
        log_every: steps between two lines of log.jsonl. The first step and the last have a line too.
        save_every: steps between two writes of last.pth. It is also written at the end, when stopped, and before an
            InputError.
        on_line: told the step, from 1, and what the line holds: the means of the losses since the line before, the
            learning rate, and the seconds of a step.
        say: told sentences about pictures that are left out, and about a resumed training.
        stop: asked after each step whether to end.

    Raises InputError for pictures without a single face, for one that cannot be read, and for a foreign last.pth;
    Diverged where the loss is not finite.
    """
    if not any(len(picture.faces) for picture in pictures):
        raise InputError("there is no face in the annotated pictures: nothing can be learned")
    if out is not None:
        with explained(f"cannot write to {out}"):
            out.mkdir(parents=True, exist_ok=True)
    where = pick_device(device)
    torch.manual_seed(recipe.seed)
    net = (net or FaceBoxes()).to(where).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    first = step = _resumed(out, net, optimizer, recipe, say) if resume and out else 0
    known = anchors(recipe.size, recipe.size).to(where)
    samples = Samples(pictures, recipe.size, recipe.seed, on_broken)
    lines = Lines(out, log_every, on_line)
    stream = batches(samples, recipe.batch_size, first, recipe.steps, num_workers, say)
    with closing(stream):
        try:
            for images, faces in stream:
                lr = recipe.lr_at(step)
                for group in optimizer.param_groups:
                    group.update(lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
                loc, conf = net(images.to(where, memory_format=torch.channels_last))
                location, confidence = multibox_loss(loc, conf, [one.to(where) for one in faces], known)
                loss = LOC_WEIGHT * location + confidence
                step += 1
                if not bool(loss.isfinite()):
                    raise Diverged(f"the loss of step {step} is {loss.item()}: try a smaller --lr, or --warmup", step)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                ended = step == recipe.steps or stop()
                values = {"loss": loss.item(), "location": location.item(), "confidence": confidence.item()}
                lines.add(step, values, lr, due=ended or step == first + 1)
                if out is not None and (ended or step % save_every == 0):
                    _save(out, net, optimizer, recipe, step)
                if ended:
                    break
        except InputError:
            if out is not None and step > first:
                _save(out, net, optimizer, recipe, step)
            raise
    return net.eval(), step


class Lines:
    """Adds up the numbers of the steps; writes their means to log.jsonl in the folder `out`, and tells `on_line`."""

    def __init__(
        self, out: Path | None, every: int, on_line: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        self.path, self.every, self.on_line = None if out is None else out / LOG, every, on_line
        self.sums, self.steps, self.began = dict[str, float](), 0, time.monotonic()

    def add(self, step: int, values: Mapping[str, float], lr: float, due: bool) -> None:
        """Take the `values` of `step`; the line is written if it is `due` or `step` is a multiple of `every`."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.steps += 1
        if not due and step % self.every:
            return
        now = time.monotonic()
        line = {name: total / self.steps for name, total in self.sums.items()}
        line |= {"lr": lr, "seconds": (now - self.began) / self.steps}
        self.sums, self.steps, self.began = {}, 0, now
        if self.path is not None:
            with explained(f"cannot write {self.path}"), self.path.open("a") as log:
                log.write(json.dumps({"step": step, "time": round(time.time(), 1), **line}) + "\n")
        if self.on_line is not None:
            self.on_line(step, line)


def score(
    net: FaceBoxes,
    pictures: Sequence[Picture],
    min_score: float = 0.05,
    max_side: int | None = None,
    on_broken: OnBroken = "fail",
    say: Callable[[str], None] = lambda sentence: None,
) -> Accuracy:
    """Return the accuracy of `net` on annotated `pictures` at their own size, at an overlap of 0.5.

    With `on_broken` "skip" a picture that cannot be read is left out, and `say` is told; else it is an InputError.
    """
    detector = Detector(net, min_score=min_score, max_side=max_side)
    found, faces = [], []
    for picture in pictures:
        try:
            found.append(detector(picture.read()))
        except InputError as error:
            if on_broken == "fail":
                raise
            say(f"left out: {error}")
            continue
        faces.append(torch.from_numpy(picture.faces))
    return accuracy([b for b, _ in found], [s for _, s in found], faces)


def _save(out: Path, net: FaceBoxes, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    state = {"network": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "recipe": asdict(recipe)}
    with written(out / LAST) as file:
        torch.save(state, file)


def _resumed(
    out: Path, net: FaceBoxes, optimizer: torch.optim.Optimizer, recipe: Recipe, say: Callable[[str], None]
) -> int:
    """Load what `_save` wrote, if it is there, drop later lines of the log, and return the step."""
    path = out / LAST
    if not path.exists():
        say(f"there is no {path} yet: the training starts at step 0")
        return 0
    net.load_weights(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" not in state or "step" not in state:
        raise InputError(f"{path} holds weights without the state of a training: give them with --weights")
    optimizer.load_state_dict(state["optimizer"])
    step = int(state["step"])
    before, now = state.get("recipe", {}), asdict(recipe)
    changed = [f"{name} {before[name]} is now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    say(f"{path}: going on at step {step}" + "".join(f"; {words}" for words in changed))
    _drop_lines_after(out / LOG, step)
    return step


def _drop_lines_after(log: Path, step: int) -> None:
    """Remove the lines of `log` after `step`, and any that a crash cut off."""
    kept = []
    with explained(f"cannot read {log}"):
        for line in log.read_text().splitlines() if log.exists() else ():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
    with written(log) as file:
        file.writelines(f"{line}\n".encode() for line in kept)

"""Trains FaceBoxes on annotated pictures: SGD with momentum, steps of the learning rate, the MultiBox loss."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sagan_fast.choices import Float64Device, check_least
from sagan_fast.data.loader import epoch_order
from sagan_fast.distributed import pick_device
from sagan_fast.errors import Diverged, InputError
from sagan_fast.faces.augment import augment
from sagan_fast.faces.average_precision import Accuracy, accuracy
from sagan_fast.faces.boxes import anchors
from sagan_fast.faces.detector import Detector
from sagan_fast.faces.loss import LOC_WEIGHT, multibox_loss
from sagan_fast.faces.network import FaceBoxes
from sagan_fast.faces.wider import Picture
from sagan_fast.files import explained, written

LAST = "last.pth"


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
        if not self.lr > 0:
            raise InputError(f"lr must be positive, got {self.lr}")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of `step`, from 0."""
        rate: float = self.lr * 0.1 ** sum(step >= end for end in self.decay_at)
        return rate * min(1.0, (step + 1) / self.warmup) if self.warmup else rate


Sample = tuple[Tensor, Tensor]
"""The network's input (3, S, S) and the faces in it (N, 4)."""


_order = functools.lru_cache(maxsize=2)(epoch_order)  # one for all samples of an epoch


class Augmented(Dataset[Sample | str]):
    """Sample p of a run: a picture of the p-th place of endless epochs, augmented by a random state of its own.

    So what is drawn depends on the seed and on p alone, not on the number of processes that read. A picture that cannot
    be read is a sentence, since an exception would leave a process of the loader with its whole traceback.
    """

    def __init__(self, pictures: Sequence[Picture], size: int, seed: int) -> None:
        self.pictures, self.size, self.seed = pictures, size, seed

    def __getitem__(self, index: int) -> Sample | str:
        count = len(self.pictures)
        place = int(_order(count, self.seed, index // count)[index % count])
        picture = self.pictures[place]
        try:
            pixels = picture.read()
        except InputError as error:
            return str(error)
        return augment(pixels, picture.faces, self.size, np.random.default_rng([self.seed, index]))


def train(
    pictures: Sequence[Picture],
    recipe: Recipe,
    *,
    out: Path | None = None,
    net: FaceBoxes | None = None,
    device: Float64Device = "cpu",
    num_workers: int = 0,
    resume: bool = False,
    save_every: int = 1000,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FaceBoxes:
    """Train `net` (None: a new one) on `pictures` and return it, in evaluation.

    Args:
        out: folder for last.pth, with weights and the state of the optimizer, and for log.jsonl.
        resume: go on from out/last.pth where it is there.
        save_every: steps between two writes of last.pth; it is also written at the end and when stopped.
        on_step: told the step, from 1, and its losses and learning rate.
        stop: asked after each step whether to end.

    Raises InputError for pictures without a single face, for one that cannot be read, and for a foreign last.pth;
    Diverged where the loss is not finite.
    """
    if not any(len(picture.faces) for picture in pictures):
        raise InputError("there is no face in the annotated pictures: nothing can be learned")
    where = pick_device(device)
    torch.manual_seed(recipe.seed)
    net = (net or FaceBoxes()).to(where).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    first = _resumed(out / LAST, net, optimizer) if resume and out else 0
    known = anchors(recipe.size, recipe.size).to(where)
    for step, (images, faces) in enumerate(_batches(pictures, recipe, first, num_workers), first):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        loc, conf = net(images.to(where, memory_format=torch.channels_last))
        location, confidence = multibox_loss(loc, conf, [one.to(where) for one in faces], known)
        loss = LOC_WEIGHT * location + confidence
        if not bool(loss.isfinite()):
            raise Diverged(f"the loss of step {step + 1} is {loss.item()}: try a smaller --lr, or --warmup", step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        values = {"loss": loss.item(), "location": location.item(), "confidence": confidence.item()}
        if on_step is not None:
            on_step(step + 1, {**values, "lr": recipe.lr_at(step)})
        ended = step + 1 == recipe.steps or stop()
        if out is not None and (ended or (step + 1) % save_every == 0):
            _save(out, net, optimizer, recipe, step + 1, values)
        if ended:
            break
    return net.eval()


def score(
    net: FaceBoxes, pictures: Sequence[Picture], min_score: float = 0.05, max_side: int | None = None
) -> Accuracy:
    """Return the accuracy of `net` on annotated `pictures` at their own size, at an overlap of 0.5."""
    detector = Detector(net, min_score=min_score, max_side=max_side)
    found = [detector(picture.read()) for picture in pictures]
    return accuracy([b for b, _ in found], [s for _, s in found], [torch.from_numpy(p.faces) for p in pictures])


def _batches(
    pictures: Sequence[Picture], recipe: Recipe, first: int, num_workers: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the images (B, 3, S, S) and the faces of the steps from `first` to the last."""
    loader: Any = DataLoader(
        Augmented(pictures, recipe.size, recipe.seed),
        batch_size=recipe.batch_size,
        sampler=range(first * recipe.batch_size, recipe.steps * recipe.batch_size),
        num_workers=num_workers,
        collate_fn=_collated,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


def _collated(samples: Sequence[Sample | str]) -> tuple[Tensor, list[Tensor]] | str:
    whole = [sample for sample in samples if not isinstance(sample, str)]
    if len(whole) < len(samples):
        return next(sample for sample in samples if isinstance(sample, str))
    return torch.stack([image for image, _ in whole]), [faces for _, faces in whole]


def _save(
    out: Path, net: FaceBoxes, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, values: dict[str, float]
) -> None:
    state = {"network": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "recipe": asdict(recipe)}
    with written(out / LAST) as file:
        torch.save(state, file)
    with explained(f"cannot write {out / 'log.jsonl'}"), (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")


def _resumed(path: Path, net: FaceBoxes, optimizer: torch.optim.Optimizer) -> int:
    """Load what `_save` wrote, if it is there, and return its step."""
    if not path.exists():
        return 0
    net.load_weights(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" not in state or "step" not in state:
        raise InputError(f"{path} holds weights without the state of a training: give them with --weights")
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

"""GAN-test: the share of generated images whose class a classifier of real images recognises.

Source: Shmelkov et al. 2018, "How good is my GAN?" (https://arxiv.org/abs/1807.09499): a classifier is trained on real
images and tested on generated ones. It measures whether images show their class, not whether they vary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.data import ImageDataset
from sagan_fast.data.classes import differences
from sagan_fast.data.loader import epoch_order
from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import Progress, shared_classes, with_scores
from sagan_fast.evaluation.protocol import GAN_TEST
from sagan_fast.evaluation.statistics_file import StatisticsFile
from sagan_fast.evaluation.streams import Images, StoredImages
from sagan_fast.words import list_some

SIDE = 64
"""Larger images are reduced to this many pixels for the classifier."""
MAX_REAL = 20_000
"""Real images used, about, at most: of each class as many as the others where it has them, a random choice."""
LEAST_OF_A_CLASS = 5
"""Real images that a class needs; one in five is held out."""
IMAGES_SEEN, EPOCHS, BATCH = 14_000, 3, 64
"""The training goes over the real images at least EPOCHS times, and over at least IMAGES_SEEN images."""


class Classifier(nn.Sequential):
    """Maps images (B, 3, R, R) in [-1, 1], R from 8 to 64, to logits (B, num_classes): four convolutions."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if after < 8 * width else [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        super().__init__(*layers, nn.Linear(32 * width, num_classes))
        self.num_classes = num_classes


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0, progress: Progress | None = None
) -> tuple[nn.Module, float]:
    """Return a classifier of `images` (n, 3, R, R) uint8 with `labels` (n,), in eval mode, and its held-out accuracy.

    One in five images of each class is held out. The same seed gives the same classifier on the same machine. It is on
    the device of `images`. Raises ValueError if a class has fewer than five images.
    """
    if (fewest := int(labels.bincount(minlength=num_classes).min())) < LEAST_OF_A_CLASS:
        raise ValueError(f"train_classifier: labels must have at least {LEAST_OF_A_CLASS} of a class, got {fewest}")
    shuffled = torch.from_numpy(epoch_order(len(labels), seed, 0)).to(labels.device)
    is_held = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(num_classes):
        is_held[shuffled[labels[shuffled] == label][::5]] = True
    held, used = is_held.nonzero().flatten(), (~is_held).nonzero().flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(num_classes)
    network = network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    epochs = max(EPOCHS, -(-IMAGES_SEEN // len(used)))
    advance = progress("classifier", epochs * len(used)) if progress else lambda done: None
    batches = -(-len(used) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        order = used[torch.from_numpy(epoch_order(len(used), seed, epoch)).to(used.device)]
        for chosen in order.tensor_split(batches):
            loss = F.cross_entropy(network(_prepared(images[chosen])), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            advance(len(chosen))
    network.eval()
    found = torch.cat([recognised(network, images[chosen]) for chosen in torch.split(held, 256)])
    return network, float((found == labels[held]).double().mean())


@torch.no_grad()
def recognised(network: nn.Module, images: Tensor) -> Tensor:
    """Return the classes (B,) that `network` sees in `images` (B, 3, R, R), in [0, 255]."""
    found: Tensor = network(_prepared(images)).argmax(1)
    return found


def with_gan_test(
    result: dict[str, Any] | None, what: Mapping[str, Any], world: World, progress: Progress
) -> dict[str, Any] | None:
    """Return `result` of `evaluate` with gan_test, the share of generated images recognised as of their class, 0 to 1.

    gan_test_of is the number of these images, gan_test_per_class the share by class, gan_test_real the share of
    held-out real images that the classifier recognises. An empty `result` gets a protocol of its own; None, of
    processes but the first, stays None. `what` holds the arguments of `evaluate`.

    Raises InputError where real or generated images have no classes, none in common, or too few images of one.
    """
    generated, dataset, protocol = what["generated"], what["dataset"], what["protocol"]
    pairs = _compared(generated, dataset)
    real = StoredImages(
        dataset,
        per_class=max(MAX_REAL // dataset.num_classes, LEAST_OF_A_CLASS),
        seed=protocol.seed,
        batch_size=protocol.batch_size,
        num_workers=what["num_workers"],
    )
    counts = real.labels.bincount(minlength=dataset.num_classes)
    if few := [dataset.class_names[i] for i in (counts < LEAST_OF_A_CLASS).nonzero().flatten().tolist()]:
        raise InputError(
            f"{GAN_TEST} needs at least {LEAST_OF_A_CLASS} real images of each class, and {dataset.name} has fewer of "
            f"{list_some(few)}"
        )

    def trained() -> tuple[dict[str, Tensor], float]:
        images = torch.cat([_reduced(batch) for batch in real.units(range(real.num_units))]).to(world.device)
        labels = real.labels.to(world.device)
        network, share = train_classifier(images, labels, dataset.num_classes, seed=protocol.seed, progress=progress)
        return {name: value.cpu() for name, value in network.state_dict().items()}, share

    weights, on_real = world.from_main(trained)
    network = Classifier(dataset.num_classes)
    network.load_state_dict(weights)
    network.to(world.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    tallies = world.gather(_tally(network, generated, pairs, world, progress))
    if failures := [sentence for _, sentence in tallies if sentence]:
        raise InputError(failures[0])
    right, of = torch.stack([tally for tally, _ in tallies]).sum(0)
    if result is None or not world.is_main:
        return None
    shares = {dataset.class_names[i]: int(right[i]) / int(of[i]) for i in of.nonzero().flatten().tolist()}
    scores = {
        "gan_test": int(right.sum()) / int(of.sum()),
        "gan_test_of": int(of.sum()),
        "gan_test_real": on_real,
        "gan_test_per_class": shares,
    }
    entry = {"classifier": "four convolutions", "real_images": real.count, "seed": protocol.seed, "size": SIDE}
    return with_scores(result, what, scores, gan_test=entry)


def _compared(generated: Images, dataset: ImageDataset) -> dict[int, int]:
    """Return the labels of `generated` with those of the same classes in `dataset`; InputError if there are none."""
    if isinstance(dataset, StatisticsFile):
        raise InputError(f"{GAN_TEST} needs real images with classes, and {dataset.name} are statistics")
    if dataset.num_classes < 2:
        raise InputError(f"{GAN_TEST} needs real images of two or more classes, and {dataset.name} has no such classes")
    if generated.num_classes == 0:
        raise InputError(f"{GAN_TEST} needs generated images with classes, and these have none")
    pairs = shared_classes(generated, dataset)
    if not pairs:
        raise InputError(
            f"{GAN_TEST} compares classes by name, and no class of the generated images is one of {dataset.name}: "
            f"{differences(generated.class_names, dataset.class_names)}"
        )
    return pairs


def _tally(
    network: Classifier, images: Images, pairs: Mapping[int, int], world: World, progress: Progress
) -> tuple[Tensor, str]:
    """Return, of this process' share of `images`, right and all by class (2, num_classes), and why it failed, or ""."""
    label_of = torch.full((max(images.num_classes, 1),), -1)
    label_of[list(pairs)] = torch.tensor(list(pairs.values()))
    tally = torch.zeros(2, network.num_classes, dtype=torch.int64)
    advance, units = progress("generated images", images.count), range(world.rank, images.num_units, world.size)
    try:
        for unit, batch in zip(units, images.units(units), strict=True):
            labels = label_of[images.labels[images.unit_range(unit)]]
            found = recognised(network, batch.to(world.device)).cpu()
            right, known = found == labels, labels >= 0
            tally += torch.stack([labels[each].bincount(minlength=network.num_classes) for each in (right, known)])
            advance(len(batch))
    except InputError as error:
        return tally, str(error)
    return tally, ""


def _reduced(images: Tensor) -> Tensor:
    """Return `images` (B, 3, R, R) in [0, 255] as uint8, with at most SIDE pixels a side."""
    if images.shape[-1] > SIDE:
        images = F.interpolate(images.float(), size=[SIDE, SIDE], mode="bilinear", antialias=True)
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte()


def _prepared(images: Tensor) -> Tensor:
    return _reduced(images).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)

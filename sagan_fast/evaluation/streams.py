"""Streams the images to be scored, real or generated, and their features in order; processes share the work."""

import copy
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sagan_fast.data import ImageDataset
from sagan_fast.data.loader import epoch_order, images_in_order
from sagan_fast.distributed import current_world
from sagan_fast.errors import InputError
from sagan_fast.evaluation.features import Extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.sampling import classes, latents
from sagan_fast.models.generator import Generator
from sagan_fast.words import counted


class Images:
    """Images in batches, here called units; a unit is the same whichever process makes it.

    Attributes:
        labels: int64 (count,), in the order of the samples.
        num_classes: 0 if the labels mean nothing.
        class_names: one a class where they are known, else empty.
        drawn: whether a generator made them, as the protocol says.
    """

    drawn = False

    def __init__(self, labels: Tensor, num_classes: int, batch_size: int) -> None:
        self.class_names: list[str] = []
        self.labels, self.num_classes, self.batch_size = labels, num_classes, batch_size

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def num_broken(self) -> int:
        """Number of images that could not be read so far, and that others stand in for."""
        return 0

    @property
    def num_units(self) -> int:
        """Number of batches, the last of which may be short."""
        return -(-self.count // self.batch_size)

    def unit_range(self, unit: int) -> range:
        """Return the samples of batch `unit`."""
        return range(unit * self.batch_size, min((unit + 1) * self.batch_size, self.count))

    def units(self, numbers: range) -> Iterator[Tensor]:
        """Yield the images (b, 3, R, R) of the batches `numbers`, uint8 or float32 in [0, 255]."""
        raise NotImplementedError


class GeneratedImages(Images):
    """The samples of a generator under `protocol`, equally many of each class.

    They are those of `sagan-fast sample` for the same seed. The generator is copied where its batch norms must change;
    spectral norm's u and v never move.
    """

    drawn = True

    def __init__(self, generator: Generator, protocol: Protocol) -> None:
        self.generator, self.quantise = generator, protocol.quantise
        count, batch_size, num_classes = protocol.count, protocol.batch_size, generator.config.num_classes
        # Batches whose statistics count are all whole: what is over is drawn and left out.
        mixed = protocol.batch_norm == "batch"
        whole = -(-count // batch_size) * batch_size if mixed else count
        self._z = latents(whole, generator.config.z_dim, protocol.seed, protocol.truncation)
        y = classes(whole, num_classes)
        if y is not None and mixed:
            y = y[torch.from_numpy(epoch_order(whole, protocol.seed, 0))]
        self._y = y
        super().__init__(torch.zeros(count, dtype=torch.int64) if y is None else y[:count], num_classes, batch_size)
        self.class_names = list(generator.class_names)
        if protocol.batch_norm != "running":
            self.generator = _with_statistics(generator, protocol)

    @torch.no_grad()
    def units(self, numbers: range) -> Iterator[Tensor]:
        device = next(self.generator.parameters()).device
        for unit in numbers:
            samples = self.unit_range(unit)
            rows = slice(samples.start, min(samples.start + self.batch_size, len(self._z)))
            y = None if self._y is None else self._y[rows].to(device)
            images = self.generator(self._z[rows].to(device), y)[: len(samples)].float()
            if not bool(images.isfinite().all()):
                raise InputError("the generator makes images that are not finite: this checkpoint cannot be scored")
            pixels = images.add(1).mul(127.5)
            yield pixels.round().clamp(0, 255).byte() if self.quantise == "uint8" else pixels


class StoredImages(Images):
    """`count` images of a data set (None: all), in order of class; fewer than all are a fixed random choice.

    `per_class`, in place of `count`, chooses at most so many images of each class.

    Raises InputError if there are not as many, and (from `units`) if one cannot be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        count: int | None = None,
        *,
        per_class: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if count is not None and not 0 < count <= len(dataset):
            raise InputError(f"{dataset.name} has {counted(len(dataset), 'image')}, and {count} are asked for")
        chosen = np.arange(len(dataset), dtype=np.int64)
        if count is not None and count < len(dataset):
            chosen = np.sort(epoch_order(len(dataset), seed, 0)[:count])
        elif per_class is not None:
            order = epoch_order(len(dataset), seed, 0)
            each = [order[dataset.labels[order] == label][:per_class] for label in np.unique(dataset.labels)]
            chosen = np.sort(np.concatenate(each))
        self.indices: npt.NDArray[np.int64] = chosen[np.argsort(dataset.labels[chosen], kind="stable")]
        super().__init__(torch.from_numpy(dataset.labels[self.indices]), dataset.num_classes, batch_size)
        self.class_names = dataset.class_names
        self.dataset, self.num_workers = dataset, num_workers

    @property
    def num_broken(self) -> int:
        return self.dataset.num_broken

    def units(self, numbers: range) -> Iterator[Tensor]:
        batches = [self.indices[list(self.unit_range(unit))].tolist() for unit in numbers]
        return images_in_order(self.dataset, batches, self.num_workers)


def features_in_order(images: Images, extractor: Extractor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (start, features (b, F), logits (b, C)) of all of `images`, in order, on every process.

    Under torch.distributed unit u is made by process u modulo their number, and what it made is sent to the others:
    no sample is left out, repeated or padded, and the numbers do not depend on how many processes there are.

    Raises InputError on every process if one of them fails with it.
    """
    world = current_world(extractor.device)
    mine = images.units(range(world.rank, images.num_units, world.size))
    for first in range(0, images.num_units, world.size):
        own = torch.zeros(images.batch_size, extractor.num_features + extractor.num_logits, device=extractor.device)
        failure = ""
        if first + world.rank < images.num_units:
            try:
                found = torch.cat(extractor(next(mine)), 1)
                own[: len(found)] = found
            except InputError as error:
                failure = str(error)
        if failures := [sentence for sentence in world.gather(failure) if sentence]:
            raise InputError(failures[0])
        for unit, rows in zip(range(first, images.num_units), world.gather_tensors(own), strict=False):
            samples = images.unit_range(unit)
            rows = rows[: len(samples)]
            yield samples.start, rows[:, : extractor.num_features], rows[:, extractor.num_features :]


@torch.no_grad()
def _with_statistics(generator: Generator, protocol: Protocol) -> Generator:
    """Return a copy whose batch norms take the statistics of each batch, or standing ones.

    Standing statistics are running averages that are plain means over batches of samples, classes mixed.
    """
    generator = copy.deepcopy(generator)
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
    if protocol.batch_norm == "batch":
        return generator
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    device = next(generator.parameters()).device
    rng = torch.Generator().manual_seed(protocol.seed + 1)  # not the samples that are scored
    for batch in range(protocol.standing_batches):
        seed = protocol.seed + (batch + 1) * 1_000_003
        z = latents(protocol.batch_size, generator.config.z_dim, seed, protocol.truncation)
        y = None
        if generator.config.num_classes:
            y = torch.randint(generator.config.num_classes, (protocol.batch_size,), generator=rng).to(device)
        generator(z.to(device), y)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return generator.eval()

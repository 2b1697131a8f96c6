"""Measures images/s of the loader for packed sets and JPEG folders, by number of workers.

    python -m benchmarks.bench_loader --help  # the options of benchmarks.run

The data are made up and lie in a temporary folder: a packed set of random images of 128x128, and JPEGs of 500x375,
ImageNet's usual size. All is read from the page cache. On a GPU the batches go through pinned memory to the device, as
in training.

A sample opens a loader, takes what its workers may have read ahead, and times the batches that follow. Its time is for
256 images, whatever the batch. Decoding JPEGs is so much slower that its batches are smaller.
"""

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Target
from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.data.loader import epoch_order
from sagan_fast.data.packed_writer import Chunk, PackedWriter

IMAGES = 256
"""What a record's time is for."""


@dataclass(frozen=True)
class Size:
    """How much is made and read: images of the packed set, JPEG files, batches in a sample of either."""

    resolution: int = 128
    packed: int = 8192
    files: int = 512
    batch: int = 256
    batches: int = 40
    file_batch: int = 32
    file_batches: int = 8
    workers: Sequence[int] = (0, 1, 2, 4, 8)


TINY = Size(resolution=16, packed=64, files=8, batch=8, batches=2, file_batch=4, file_batches=1, workers=(0, 2))


def cases(target: Target, size: Size | None = None) -> Iterator[Case]:
    """Yield a case for each number of workers, with the packed set, the same in processes, and JPEG files."""
    size = size or (TINY if target.dry_run else Size())
    with tempfile.TemporaryDirectory() as folder:
        opened = functools.cache(functools.partial(data_set, Path(folder), size))
        for workers in size.workers:
            yield case(opened, size, workers, target)


def data_set(folder: Path, size: Size, name: str) -> ImageDataset:
    """Return the made-up data set of the provider `name`, written into `folder` where it is not there yet."""
    kind, write = ("folder", write_jpegs) if name == "folder-jpeg" else ("packed", write_packed)
    path = folder / kind
    if not path.exists():
        write(path, size, np.random.default_rng(0))
    opened = open_dataset(f"{kind}:{path}", resolution=size.resolution)
    if name == "packed-processes":
        opened.in_threads = False
    return opened


def case(opened: Callable[[str], ImageDataset], size: Size, workers: int, target: Target) -> Case:
    """Return the case of so many workers: results are the first batch, held against the images read one by one."""

    def provider(name: str) -> Provider:
        seeds = itertools.count(1)
        batch, number = (size.file_batch, size.file_batches) if name == "folder-jpeg" else (size.batch, size.batches)

        def prepare() -> Run:
            dataset = opened(name)
            return lambda i: first_batch(dataset, workers, batch)

        def truth() -> list[Tensor]:
            dataset = opened(name)
            images, labels = zip(*(dataset[int(i)] for i in epoch_order(len(dataset), 0, 0)[:batch]), strict=True)
            return [torch.stack(images), torch.tensor(labels)]

        def timer() -> float:
            took = seconds_of_a_batch(opened(name), workers, number, target.device, batch, next(seeds))
            return took / batch * IMAGES * 1e6

        return Provider(name, prepare, truth=truth, timer=timer)

    names = ["packed", *(["packed-processes"] if workers else []), "folder-jpeg"]
    on_gpu = target.device == "cuda"
    return Case(
        "loader", f"{size.resolution}x{size.resolution}", "uint8", f"workers-{workers}", [*map(provider, names)], list,
        tolerance=0.0, methods=("wall",), most_rounds=5,
        config={"images": IMAGES, "workers": workers, "to_device": on_gpu, "processors": os.cpu_count()},
    )  # fmt: skip


def first_batch(dataset: ImageDataset, workers: int, batch_size: int) -> Sequence[Tensor]:
    """Return images and labels of the first batch of seed 0."""
    stream: Any = batches(dataset, batch_size=batch_size, seed=0, num_workers=workers)
    with closing(stream):
        return next(stream)


def seconds_of_a_batch(
    dataset: ImageDataset, workers: int, number: int, device: str, batch_size: int, seed: int
) -> float:
    """Return the time of a batch, the mean of `number` or more after those that the workers have read ahead."""
    on_gpu = device == "cuda"
    stream: Any = batches(dataset, batch_size=batch_size, seed=seed, num_workers=workers, pin_memory=on_gpu)

    def take(batches: int) -> float:
        for _ in range(batches):
            for tensor in next(stream):
                tensor.to(device, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    number = max(number, 2 * workers)
    with closing(stream):
        began = take(2 * workers + 1)
        return (take(number) - began) / number


def write_jpegs(folder: Path, size: Size, rng: np.random.Generator) -> None:
    """Write `size.files` JPEGs of 500x375 in two classes, blurred noise of about 100 KB, as ImageNet's are."""
    from PIL import Image

    for label in "ab":
        (folder / label).mkdir(parents=True)
    for i in range(size.files):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        image = noise.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / "ab"[i % 2] / f"{i:05}.jpg", quality=95)


def write_packed(folder: Path, size: Size, rng: np.random.Generator) -> None:
    """Write a packed set of `size.packed` images of random bytes in two classes."""
    source: Any = SimpleNamespace(
        kind="made up", path="-", class_names=["a", "b"], first_label=0, labels_from="", passed_over={}
    )
    writer = PackedWriter(folder, {"kind": source.kind, "fingerprint": ""}, size.resolution)
    shape = (64, 3, size.resolution, size.resolution)
    for done in range(64, size.packed + 1, 64):
        writer.append(Chunk(64, done, rng.integers(0, 256, shape, dtype=np.uint8), [0, 1] * 32, [], []))
    writer.finish(source, None)
    writer.close()


if __name__ == "__main__":
    command = [sys.executable, "-m", "benchmarks.run", "--only", "loader", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)

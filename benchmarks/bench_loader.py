"""Images a second from the loader: packed sets and JPEG folders, by number of workers.

    python -m benchmarks.bench_loader --help

The data are made up and lie in a temporary folder: a packed set of random images of 128x128, and JPEGs of 500x375,
ImageNet's usual size. All is read from the page cache. On a GPU the batches go through pinned memory to the device, as
in training.

A sample opens a loader, takes what its workers may have read ahead, and times the batches that follow. Its time is for
256 images, whatever the batch. Decoding JPEGs is so much slower that its batches are smaller.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        sets = data_sets(Path(folder), size)
        for workers in size.workers:
            yield case(sets, size, workers, target)


def data_sets(folder: Path, size: Size) -> dict[str, Callable[[], ImageDataset]]:
    """Return, by provider, what opens its made-up data set in `folder`. A set is written when it is first opened."""

    @functools.cache
    def written() -> Path:
        write_packed(folder / "packed", size, np.random.default_rng(0))
        return folder / "packed"

    @functools.cache
    def packed(in_threads: bool) -> ImageDataset:
        opened = open_dataset(f"packed:{written()}", resolution=size.resolution)
        opened.in_threads = in_threads
        return opened

    @functools.cache
    def jpegs() -> ImageDataset:
        write_jpegs(folder / "jpegs", size.files, np.random.default_rng(0))
        return open_dataset(f"folder:{folder}/jpegs", resolution=size.resolution)

    return {"packed": lambda: packed(True), "packed-processes": lambda: packed(False), "folder-jpeg": jpegs}


def case(sets: Mapping[str, Callable[[], ImageDataset]], size: Size, workers: int, target: Target) -> Case:
    """Return the case of so many workers: results are the first batch, held against the images read one by one."""

    def provider(name: str) -> Provider:
        opened, seeds = sets[name], itertools.count(1)
        batch, number = (size.file_batch, size.file_batches) if name == "folder-jpeg" else (size.batch, size.batches)

        def prepare() -> Run:
            dataset = opened()
            return lambda i: first_batch(dataset, workers, batch)

        def truth() -> list[Tensor]:
            dataset = opened()
            items = [dataset[int(i)] for i in epoch_order(len(dataset), 0, 0)[:batch]]
            return [torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])]

        def timer() -> float:
            took = seconds_of_a_batch(opened(), workers, number, target.device, batch, next(seeds))
            return took / batch * IMAGES * 1e6

        return Provider(name, prepare, truth=truth, timer=timer)

    return Case(
        "loader", f"{size.resolution}x{size.resolution}", "uint8", f"workers-{workers}",
        [provider(name) for name in sets if workers or name != "packed-processes"], list,
        tolerance=0.0, methods=("wall",), most_rounds=5,
        config={
            "images": IMAGES, "workers": workers, "to_device": target.device == "cuda", "processors": os.cpu_count(),
        },
    )  # fmt: skip


def first_batch(dataset: ImageDataset, workers: int, batch_size: int) -> list[Tensor]:
    """Return images and labels of the first batch of seed 0."""
    stream: Any = batches(dataset, batch_size=batch_size, seed=0, num_workers=workers)
    try:
        images, labels = next(stream)
        return [images, labels]
    finally:
        stream.close()


def seconds_of_a_batch(
    dataset: ImageDataset, workers: int, number: int, device: str, batch_size: int, seed: int
) -> float:
    """Return the time of a batch, the mean of `number` or more after those that the workers have read ahead."""
    stream: Any = batches(dataset, batch_size=batch_size, seed=seed, num_workers=workers, pin_memory=device == "cuda")
    number = max(number, 2 * workers)
    try:
        for _ in range(2 * workers + 1):
            _use(next(stream), device)
        _wait(device)
        began = time.perf_counter()
        for _ in range(number):
            _use(next(stream), device)
        _wait(device)
        return (time.perf_counter() - began) / number
    finally:
        stream.close()


def _use(batch: tuple[Tensor, Tensor], device: str) -> None:
    for tensor in batch if device == "cuda" else ():
        tensor.to(device, non_blocking=True)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def write_jpegs(folder: Path, number: int, rng: np.random.Generator) -> None:
    """Write `number` JPEGs of 500x375 in two classes, blurred noise of about 100 KB, as ImageNet's are."""
    from PIL import Image

    for label in "ab":
        (folder / label).mkdir(parents=True)
    for i in range(number):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        image = noise.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / "ab"[i % 2] / f"{i:05}.jpg", quality=95)


def write_packed(folder: Path, size: Size, rng: np.random.Generator) -> None:
    """Write a packed set of `size.packed` images of random bytes in two classes."""
    source: Any = SimpleNamespace(kind="made up", path="-", class_names=["a", "b"], first_label=0)
    writer = PackedWriter(folder, {"kind": source.kind, "fingerprint": ""}, size.resolution)
    shape = (64, 3, size.resolution, size.resolution)
    for done in range(64, size.packed + 1, 64):
        writer.append(Chunk(64, done, rng.integers(0, 256, shape, dtype=np.uint8), [0, 1] * 32, []))
    writer.finish(source, None)
    writer.close()


if __name__ == "__main__":
    command = [sys.executable, "-m", "benchmarks.run", "--only", "loader", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)

"""Images a second from the loader: packed sets and JPEG folders, by workers, and what training steps ask for.

python -m benchmarks.bench_loader [options of benchmarks.run]. The data are made up and lie in a temporary folder: a
packed set of random images of 128x128, and JPEGs of 500x375, ImageNet's usual size. All is read from the page cache.
On a GPU the batches go through pinned memory to the device, as in training.

A sample opens a loader, takes what its workers may have read ahead, and times the batches that follow; its time is for
256 images, whatever the batch. Decoding JPEGs is so much slower that its batches are smaller.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Effort
from benchmarks.records import Record, gpus, read, results_file
from benchmarks.text import table
from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.data.packed_writer import Chunk, PackedWriter

IMAGES = 256
"""What a record's time is for."""
MAX_ROUNDS = 5


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


FULL = Size()
TINY = Size(resolution=16, packed=64, files=8, batch=8, batches=2, file_batch=4, file_batches=1, workers=(0, 2))


def records(device: str, effort: Effort, size: Size = FULL) -> Iterator[list[Record]]:
    """Yield, for each number of workers, a record of each provider: packed, packed in processes, JPEG files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_packed(Path(folder, "packed"), size, rng)
        packed, in_processes = (open_dataset(f"packed:{folder}/packed", resolution=size.resolution) for _ in range(2))
        in_processes.in_threads = False
        providers: dict[str, ImageDataset] = {"packed": packed, "packed-processes": in_processes}
        failed: list[Record] = []
        try:
            write_jpegs(Path(folder, "jpegs"), size.files, rng)
            providers["folder-jpeg"] = open_dataset(f"folder:{folder}/jpegs", resolution=size.resolution)
        except ImportError as error:
            failed.append(_record("folder-jpeg", 0, device, size, error=f"cannot run: {error}"))
        for workers in size.workers:
            yield failed + _measured(providers, workers, device, min(effort.rounds, MAX_ROUNDS), size)
            failed = []


def _measured(providers: dict[str, ImageDataset], workers: int, device: str, rounds: int, size: Size) -> list[Record]:
    samples: dict[str, list[float]] = {name: [] for name in providers if workers or name != "packed-processes"}
    for turn in range(rounds):
        order = list(samples)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            batch, number = size.batch, size.batches
            if name == "folder-jpeg":
                batch, number = size.file_batch, size.file_batches
            took = seconds_of_a_batch(providers[name], workers, number, device, batch, seed=turn)
            samples[name].append(took / batch * IMAGES * 1e6)
    made = []
    for name, times in samples.items():
        p20, p50, p80 = (float(np.quantile(times, q)) for q in (0.2, 0.5, 0.8))
        values = dict(p20_us=p20, p50_us=p50, p80_us=p80, samples=len(times), note=f"{IMAGES / p50 * 1e6:.0f} images/s")
        made.append(_record(name, workers, device, size, **values))
    return made


def _record(provider: str, workers: int, device: str, size: Size, **values: Any) -> Record:
    config = {"images": IMAGES, "workers": workers, "to_device": device == "cuda", "processors": os.cpu_count()}
    shape = f"{size.resolution}x{size.resolution}"
    return Record("loader", shape, "uint8", f"workers-{workers}", provider, "wall", config=config, **values)


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


def _use(batch: tuple[torch.Tensor, torch.Tensor], device: str) -> None:
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


def summary(found: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> str:
    """Return images/s of the loader's records in `found`, and what the train_step records in `steps` ask for.

    Both are records as `benchmarks.records.read` returns them: of this machine, and of GPUs.
    """
    rows = []
    for record in found:
        if record["benchmark"] == "loader" and record["p50_us"] is not None:
            rate, workers = IMAGES / record["p50_us"] * 1e6, record["config"]["workers"]
            busy = min(max(workers, 1), record["config"]["processors"])
            rows.append(
                [record["provider"], workers, f"{rate:.0f}", f"{rate / busy:.0f}", record["device"], record["date"]]
            )
    header = ["provider", "workers", "images/s", "a core", "device", "date"]
    parts = [table(header, rows) if rows else "loader: not measured"]
    asked = [
        f"{r['config']['batch_size'] / r['p50_us'] * 1e6:.0f} images/s ({r['shape']}, {r['device']})"
        for r in steps
        if r["benchmark"] == "train_step" and r["provider"] == "ours" and r["p50_us"] is not None
    ]
    return "\n".join([*parts, "training steps on a GPU ask for: " + (", ".join(asked) or "not measured")])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device at hand, append the records, print the summary; see benchmarks/run.py for the options."""
    from benchmarks.run import main as run

    status = run(["--only", "loader", *(sys.argv[1:] if argv is None else argv)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(summary(read(results_file(device)), [record for records in gpus().values() for record in records]))
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Yields endless batches in an order that depends only on the seed and the number of samples consumed.

Sample p of a run, counted over all ranks, is image `epoch_order(n, seed, p // n)[p % n]`. So a run resumed at p
continues bit for bit with any number of workers, and no epoch is padded with duplicates or cut short.
"""

import atexit
import functools
import signal
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sagan_fast.data.dataset import ImageDataset
from sagan_fast.errors import InputError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
BATCHES_AHEAD = 2
"""Batches that a worker may be ahead, as in DataLoader."""
Batch = tuple[Tensor, Tensor, dict[int, str]]
"""Images, labels, and what is broken: index and sentence."""


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[tuple[Tensor, Tensor]]:
    """Return an endless generator of (images uint8 (batch_size, 3, R, R), labels int64 (batch_size,)).

    Every epoch is a fresh permutation of the data set; a batch runs on into the next epoch, so none is short. Neither
    the global random state nor the number of workers matters. The first `next` starts the workers; `close()` ends
    them, and so does dropping the generator.

    Args:
        batch_size: images per rank and batch; a global batch is `batch_size * world_size` consecutive samples.
        start: samples consumed by all ranks together since the beginning of the run.
        num_workers: processes that read images (threads, where the set is read by copying); 0 reads in this one.
        rank: takes samples rank, rank + world_size, ... of every global batch.
        pin_memory: return batches in page-locked memory (where there is a CUDA device).

    Raises ValueError if an argument is out of range. `next` raises InputError if an image is broken and the data set
    was opened with `on_broken="fail"`.
    """
    for name, value, low in (
        ("len(dataset)", len(dataset), 1),
        ("batch_size", batch_size, 1),
        ("start", start, 0),
        ("num_workers", num_workers, 0),
        ("world_size", world_size, 1),
    ):
        if value < low:
            raise ValueError(f"batches: {name} must be at least {low}, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"batches: rank must be in range(world_size), range({world_size}), got {rank}")
    order = sample_order(len(dataset), batch_size, seed, start, rank, world_size)
    pin_memory = pin_memory and torch.cuda.is_available()
    if dataset.in_threads and num_workers:
        found = _read_ahead(dataset, order, num_workers, pin_memory)
    else:
        found = load(functools.partial(_read_batch, dataset), order, num_workers, ignore_stop_signals, pin_memory)
    stream = _noted(dataset, found)
    if num_workers:
        atexit.register(_close_if_alive, weakref.ref(stream))
    return stream


def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the permutation of `range(num_samples)` for one epoch, int64 (num_samples,).

    It sorts raw Philox words keyed by (seed, epoch): NumPy guarantees those never to change, unlike
    `Generator.permutation` (https://numpy.org/neps/nep-0019-rng-policy.html).
    """
    key = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    words = np.random.Philox(key=key).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64)


def sample_order(
    num_samples: int, batch_size: int, seed: int, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[int]]:
    """Yield the indices of one rank's batches, without end; arguments as in `batches`."""
    share = rank + world_size * np.arange(batch_size, dtype=np.int64)
    position, epoch, order = start, -1, np.empty(0, np.int64)
    while True:
        indices = np.empty(batch_size, np.int64)
        epochs, offsets = np.divmod(position % num_samples + share, num_samples)
        for ahead in np.unique(epochs):
            if position // num_samples + int(ahead) != epoch:
                epoch = position // num_samples + int(ahead)
                order = epoch_order(num_samples, seed, epoch)
            indices[epochs == ahead] = order[offsets[epochs == ahead]]
        yield indices.tolist()
        position += batch_size * world_size


def _read_batch(dataset: ImageDataset, indices: list[int]) -> Batch | InputError:
    """Read a batch. A bad file comes back as a value: DataLoader would wrap an exception in a traceback."""
    try:
        return dataset.read_batch(np.array(indices, np.int64))
    except InputError as error:
        return InputError(*error.args)


def _read_ahead(
    dataset: ImageDataset, order: Iterator[list[int]], num_threads: int, pin_memory: bool
) -> Generator[Batch]:
    """Yield batches that threads read ahead, in order: they only copy memory, without the interpreter lock."""

    def read(indices: npt.NDArray[np.int64], out: Tensor) -> Batch:
        images, labels, broken = dataset.read_batch(indices, out)
        return images, labels.pin_memory() if pin_memory else labels, broken

    def submit() -> Future[Batch]:
        indices = np.array(next(order), np.int64)
        # allocated here: what one thread frees of another's memory goes back to the system, to be mapped anew
        shape = (len(indices), 3, dataset.resolution, dataset.resolution)
        return pool.submit(read, indices, torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory))

    pool = ThreadPoolExecutor(num_threads, "loader")
    try:
        ahead = deque(submit() for _ in range(num_threads * BATCHES_AHEAD))
        while True:
            batch = ahead.popleft().result()
            ahead.append(submit())
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _noted(dataset: ImageDataset, batches: Generator[Batch | InputError]) -> Generator[tuple[Tensor, Tensor]]:
    """Yield images and labels of `batches`, and note in `dataset` what is broken."""
    with closing(batches):
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            images, labels, broken = batch
            dataset.note_broken(broken)
            yield images, labels


def images_in_order(dataset: ImageDataset, batches: Sequence[list[int]], num_workers: int = 0) -> Iterator[Tensor]:
    """Yield the images uint8 (B, 3, R, R) of each batch of indices; InputError if one cannot be read."""
    found = load(functools.partial(_read_batch, dataset), batches, num_workers)
    return (images for images, _ in _noted(dataset, found))


def load(
    read: Callable[[list[Any]], Any],
    batches: Iterable[list[Any]],
    num_workers: int,
    begin: Callable[[int], None] | None = None,
    pin_memory: bool = False,
) -> Generator[Any]:
    """Yield what `read` gives for each of `batches`, read in `num_workers` processes.

    `begin` is called in each process at its start. SIGINT and SIGTERM are held back from it until then. The processes
    end when the generator is closed or dropped.
    """
    loader = DataLoader(
        _Items(),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=read,
        worker_init_fn=begin,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # or it draws a number from the global generator
    )
    held = begin is not None and hasattr(signal, "pthread_sigmask")  # which Windows lacks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if held else set()
    try:
        iterator: Any = iter(loader)
    finally:
        if held:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from iterator
    finally:
        # By name, not by dropping it: a traceback that someone keeps may hold it, and with it the workers.
        if num_workers:
            iterator._shutdown_workers()


class _Items(Dataset[Any]):
    """Gives the items of a batch as they are, to `read`."""

    def __getitems__(self, items: list[Any]) -> list[Any]:
        return items


def ignore_stop_signals(worker_id: int) -> None:
    """Make a worker process ignore SIGINT and SIGTERM."""
    # Ctrl-C and schedulers signal every process of a run, and a dead worker would break the main process in the midst
    # of the step or checkpoint that it wants to finish. Workers end when the iterator closes or the main process dies.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _close_if_alive(stream: "weakref.ref[Generator[Any]]") -> None:
    # multiprocessing ends its workers with SIGTERM at exit, which ours ignore
    if (alive := stream()) is not None:
        alive.close()

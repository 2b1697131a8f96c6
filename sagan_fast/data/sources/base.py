"""Base classes of the data sets that `prepare` reads: one process lists the items, many decode them."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from sagan_fast.data.images import BrokenImageError, crop_and_resize, to_tensor
from sagan_fast.data.labels import counted_from
from sagan_fast.files import explained, reason

Image = npt.NDArray[np.uint8]
GZIP = b"\x1f\x8b"
UNLABELLED = "--unlabelled true reads the images without labels"
"""Advice for a source whose labels cannot be read."""


class Source(ABC):
    """A data set to be packed; the object is sent to the worker processes.

    Attributes:
        kind: "folder", "tar", "tfrecord" or "hdf5".
        path: as the user gave it.
        class_names: where the format has them; None where labels are numbers only, [] where there are no labels.
        num_items: how many there are; None where only reading to the end would tell.
        first_label: the number that labels are counted from.
        labels_from: what the labels were read from, in words.
        label_counts: number of images of each label, where all labels have been read; else None.
        passed_over: number of what lies beside the images and is not read, by kind.
        has_stamps: whether `stamp` tells that an item has changed; where not, `fingerprint` tells.
        faults: names and reasons of items that are known to be broken before the work begins.
        total: the `position` of the end.
        items_per_task: how many items are best read at once; None leaves it to the caller.
    """

    kind: str
    path: str
    class_names: list[str] | None = None
    num_items: int | None = None
    first_label: int = 0
    labels_from: str = ""
    label_counts: Mapping[int, int] | None = None
    passed_over: Mapping[str, int] = {}
    faults: Sequence[tuple[str, str]] = ()
    has_stamps = False
    total: int = 0
    items_per_task: int | None = None

    def items(self) -> Iterator[Any]:
        """Return all items in order; an item is small and says where a worker finds one sample.

        They are indices unless a source says otherwise.
        """
        return iter(range(self.total))

    def position(self, item: Any) -> int:
        """Return how much of `total` is done after `item`."""
        return int(item) + 1

    @abstractmethod
    def name_of(self, item: Any) -> str:
        """Return the name of `item` for the list of broken images."""

    @abstractmethod
    def read(self, item: Any, resolution: int) -> tuple[Image, int]:
        """Return image uint8 (3, resolution, resolution) and label of `item`; BrokenImageError where it has none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of what is to be read; an unfinished preparation compares it when it continues."""

    def stamp(self, item: Any) -> str:
        """Return what changes when the content of `item` changes; only where `has_stamps`."""
        return ""

    def read_many(self, items: Sequence[Any], resolution: int) -> Iterator[tuple[Image, int] | BrokenImageError]:
        """Yield what `read` returns or raises for each of `items`."""
        for item in items:
            try:
                yield self.read(item, resolution)
            except BrokenImageError as error:
                yield error


class FilesSource(Source):
    """Samples from several files, in the order of the files and within them; `total` is bytes.

    An item has `file`, the number of its file, and `position`, the bytes up to its end. In a compressed file, which can
    only be read from the beginning, `position` is the bytes up to the file.
    """

    def __init__(self, path: str, files: Sequence[str], first_label: int) -> None:
        self.path, self.files, self.first_label = path, list(files), first_label
        statuses = [os.stat(file) for file in self.files]
        self._sizes, self._times = [s.st_size for s in statuses], [s.st_mtime_ns for s in statuses]
        self.total = sum(self._sizes)

    @abstractmethod
    def items_of(self, file: int, before: int) -> Iterator[Any]:
        """Return the items of one file; the files before it have `before` bytes."""

    def items(self) -> Iterator[Any]:
        """Return the items of all files; plain files are not read whole, only where each item begins and ends."""
        for file in range(len(self.files)):
            yield from self.items_of(file, sum(self._sizes[:file]))

    def position(self, item: Any) -> int:
        return int(item.position)

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and times of modification."""
        return fingerprint_of([*map(os.path.basename, self.files), *self._sizes, *self._times])

    def bytes_at(self, file: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file, fewer at its end; BrokenImageError if it cannot be read."""
        try:
            with open(self.files[file], "rb") as opened:
                opened.seek(offset)
                return opened.read(size)
        except OSError as error:
            raise BrokenImageError(reason(error)) from error


def fingerprint_of(parts: Iterable[object]) -> str:
    """Return a digest of the texts of `parts`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(os.fsencode(str(part)) + b"\0")
    return digest.hexdigest()


def check_label(label: Any, first_label: int) -> int:
    """Return the class number of `label` in any form, counted from `first_label`; BrokenImageError if it is none."""
    try:
        return counted_from(label, first_label)
    except ValueError as error:
        raise BrokenImageError(str(error)) from None


def fit(image: Image, resolution: int) -> Image:
    """Return pixels (H, W, 3), cropped and resized as an image file's are, as (3, resolution, resolution)."""
    if image.shape[:2] == (resolution, resolution):
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    return to_tensor(crop_and_resize(Pillow.fromarray(np.ascontiguousarray(image)), resolution)).numpy()


def start_of(path: str) -> bytes:
    """Return the first 4096 bytes of `path`, which tell its kind; InputError says why it cannot be read."""
    with explained(f"{path} cannot be opened"), open(path, "rb") as file:
        return file.read(4096)

"""HDF5 files of BigGAN-PyTorch and StudioGAN: `imgs`, uint8, and `labels`.

BigGAN-PyTorch (make_hdf5.py) and StudioGAN at first store (N, 3, R, R), today's StudioGAN (src/utils/hdf5.py)
(N, R, R, 3); both are read.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sagan_fast.data.images import BrokenImageError
from sagan_fast.data.labels import SUSPICIOUS
from sagan_fast.data.sources.base import UNLABELLED, Image, Source, check_label, fingerprint_of, fit
from sagan_fast.errors import InputError
from sagan_fast.files import explained
from sagan_fast.words import list_some

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_ITEMS_PER_TASK = 512


class HDF5Source(Source):
    """The images of one file; items are indices.

    Raises InputError if h5py is not installed, or the file is not laid out as those.
    """

    kind = "hdf5"

    def __init__(self, path: str, file: str, first_label: int | None = None, unlabelled: bool = False) -> None:
        self.path, self.file, self.first_label = path, file, first_label or 0
        self._opened: Any = None
        opened = self._open()
        images, labels = opened.get("imgs"), opened.get("labels")
        shape: Sequence[int] = getattr(images, "shape", ())
        if len(shape) != 4 or images.dtype != np.uint8 or 3 not in (shape[1], shape[3]):
            what = ", ".join(sorted(opened)) or "nothing"
            raise InputError(
                f"{file} must hold imgs, uint8 of (N, 3, H, W) or (N, H, W, 3), as BigGAN-PyTorch and StudioGAN write "
                f"it; it holds {what if images is None else f'imgs, {images.dtype} of {shape}'}"
            )
        self.num_items = self.total = shape[0]
        self._channels_first = shape[1] == 3
        self._labels: list[int | str] | None = None
        others = sorted(name for name in opened if name != "imgs")
        if labels is not None and not unlabelled:
            self._labels = self._read_labels(labels)
            others.remove("labels")
        elif not unlabelled and (hints := [name for name in others if SUSPICIOUS.search(name) or name == "y"]):
            raise InputError(
                f"{file} has no labels, and it holds {list_some(hints)}: call the labels labels; {UNLABELLED}"
            )
        self.passed_over = {"array": len(others)} if others else {}
        self.class_names = [] if self._labels is None else None
        self.labels_from = "nothing: no labels" if self._labels is None else "labels"
        if images.chunks is not None:  # a chunk is read whole, whatever is wanted of it
            self.items_per_task = min(images.chunks[0], MAX_ITEMS_PER_TASK)
        self._described = (shape, images.id.get_storage_size(), self._labels is None)
        opened.close()
        self._opened = None

    def name_of(self, item: int) -> str:
        return f"{self.file}, image {item}"

    def read(self, item: int, resolution: int) -> tuple[Image, int]:
        (result,) = self.read_many([item], resolution)
        if isinstance(result, BrokenImageError):
            raise result
        return result

    def read_many(self, items: Sequence[int], resolution: int) -> Iterator[tuple[Image, int] | BrokenImageError]:
        """Yield image and label of each of the consecutive `items`, from one read; where that fails, one by one."""
        try:
            file = self._open()
            images = file["imgs"][items[0] : items[-1] + 1]
        except (OSError, KeyError, RuntimeError, InputError) as error:
            if len(items) > 1:
                for item in items:
                    yield from self.read_many([item], resolution)
            else:
                yield BrokenImageError(" ".join(str(error).split()))
            return
        for item, image in zip(items, images, strict=True):
            label = 0 if self._labels is None else self._labels[item]
            if isinstance(label, str):
                yield BrokenImageError(label)
            else:
                yield fit(image.transpose(1, 2, 0) if self._channels_first else image, resolution), label

    def fingerprint(self) -> str:
        """Return a digest of the file's name, size and time of modification, and of the arrays' shapes."""
        status = os.stat(self.file)
        return fingerprint_of([os.path.basename(self.file), status.st_size, status.st_mtime_ns, *self._described])

    def _read_labels(self, stored: Any) -> list[int | str]:
        """Return the class of every image, or what is wrong with its label; InputError if all are wrong."""
        if stored.shape[:1] != (self.total,) or len(stored.shape) > 2:
            raise InputError(f"{self.file} must hold as many labels as imgs, {self.total}, and holds {stored.shape}")
        with explained(f"the labels of {self.file} cannot be read", kinds=(OSError, RuntimeError)):
            rows = stored[...]
        labels: list[int | str] = []
        faults = []
        for item, row in enumerate(rows):
            try:
                labels.append(check_label(row, self.first_label))
            except BrokenImageError as error:
                labels.append(str(error))
                faults.append((self.name_of(item), str(error)))
        if len(faults) == self.total:
            raise InputError(f"{self.file}: no label is a class; of the first image, {labels[0]}; {UNLABELLED}")
        self.faults = faults
        self.label_counts = Counter(label for label in labels if isinstance(label, int))
        return labels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _open(self) -> Any:
        if self._opened is None:
            try:
                import h5py
            except ImportError:
                raise InputError("HDF5 files need the package h5py: pip install 'sagan_fast[hdf5]'") from None
            with explained(f"{self.file} cannot be opened as HDF5"):
                self._opened = h5py.File(self.file, "r")
        return self._opened

"""The base class of data sets: square uint8 images with integer labels, and the treatment of broken files."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from sagan_fast.choices import OnBroken
from sagan_fast.errors import InputError
from sagan_fast.words import counted, list_some

logger = logging.getLogger(__name__)

MAX_BROKEN_IN_A_ROW = 100
"""So many mean a lost disk, a wrong folder or option, not a few bad files."""


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of one size with their labels; `dataset[i]` is (uint8 tensor (3, R, R), int label).

    Attributes:
        name: the spec it was opened with.
        resolution: R, in pixels.
        class_names: one name per label; empty for an unconditional set, whose labels are all 0.
        labels: int64 array (len(dataset),).
        order_given: whether the user gave the order of the classes.
        labels_from: what the labels were read from, in words.
        passed_over: what lies beside the images and was not read: kind, such as ".txt", and number.
        in_threads: whether batches are read by threads, not processes: reading is copying, without the interpreter.
        preprocessing: how its images were cropped and resized, in words or as a mapping of words.
    """

    in_threads = False
    order_given = False
    labels_from = ""
    preprocessing: Any = "largest centred square, Pillow's bilinear with antialiasing to the resolution, RGB uint8"

    def __init__(
        self,
        name: str,
        *,
        resolution: int,
        class_names: Sequence[str],
        labels: npt.NDArray[np.int64],
        on_broken: OnBroken = "fail",
    ) -> None:
        self.name = name
        self.resolution = resolution
        self.class_names = list(class_names)
        self.labels = labels if self.class_names else np.zeros(len(labels), np.int64)
        self.on_broken = on_broken
        self.passed_over: Mapping[str, int] = {}
        self._broken: dict[int, str] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when unconditional."""
        return len(self.class_names)

    @property
    def num_broken(self) -> int:
        """Number of broken files skipped so far, including those found by the loader's workers."""
        return len(self._broken)

    def reorder_classes(self, class_names: Sequence[str]) -> None:
        """Label the same classes in the order of `class_names`; each image keeps its class."""
        place = {name: label for label, name in enumerate(class_names)}
        self.labels = np.array([place[name] for name in self.class_names], np.int64)[self.labels]
        self.class_names = list(class_names)

    def why_unlabelled(self) -> str:
        """Return what may be wrong where a set was read without labels and classes were expected; "" if nothing."""
        return ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label, _ = self.read(range(len(self))[index])
        return image, label

    def read(self, index: int) -> tuple[Tensor, int, dict[int, str]]:
        """Return image and label of `index`, and the broken images that were skipped, as {index: sentence}.

        With `on_broken="skip"` a broken file gives way to the next readable one of its class, always the same one.
        Raises InputError if the file is broken and `on_broken` is "fail", or too many in a row are.
        """
        broken: dict[int, str] = {}
        candidate = index
        while True:
            if candidate not in self._broken:
                try:
                    return self.load(candidate), int(self.labels[index]), broken
                except InputError as error:
                    if self.on_broken == "fail":
                        raise
                    self.note_broken({candidate: str(error)})
            broken[candidate] = self._broken[candidate]
            same = np.flatnonzero(self.labels == self.labels[index])
            candidate = int(same[(np.searchsorted(same, candidate) + 1) % len(same)])
            if candidate == index or len(broken) == MAX_BROKEN_IN_A_ROW:
                said = f"{len(broken)} images in a row could not be read; the first: {broken[index]}"
                raise InputError(f"{self.name}: {said}")

    def read_batch(
        self, indices: npt.NDArray[np.int64], out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Return images uint8 (B, 3, R, R), labels int64 (B,) and what is broken, as `read` does.

        The images are in `out`, where that is given: uint8, of their shape.
        """
        images, broken = [], {}
        for index in indices.tolist():
            image, _, found = self.read(index)
            images.append(image)
            broken.update(found)
        return torch.stack(images, out=out), torch.from_numpy(self.labels[indices]), broken

    def note_broken(self, broken: Mapping[int, str]) -> None:
        """Count the files of `broken` (index: sentence); log each once, in the main process."""
        for index, sentence in broken.items():
            if index not in self._broken:
                self._broken[index] = sentence
                if get_worker_info() is None:
                    logger.warning("%s; it is skipped and another image of its class is read instead", sentence)

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R).

        Raises InputError if the image is broken; the sentence names the file and the reason.
        """

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes whenever the images or their labels may have changed."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update(json.dumps([type(self).__name__, self.resolution, self.class_names]).encode())
        for part in self._identity():
            digest.update(part)
        return digest.hexdigest()

    def _identity(self) -> Iterator[bytes]:
        """Yield what tells these images from others: all their pixels, unless the set has something shorter."""
        return (self.load(index).numpy().tobytes() for index in range(len(self)))


def match_classes(name: str, class_names: Sequence[str], num_classes: int | None) -> list[str]:
    """Return the classes the model is to learn: all of `class_names`, or none when `num_classes` is 0.

    Raises InputError if `num_classes` is neither None, 0 nor the number of classes found.
    """
    if num_classes == 0:
        return []
    if num_classes is not None and num_classes != len(class_names):
        raise InputError(
            f"{name} has {counted(len(class_names), 'class')} ({list_some(class_names)}), but the model is "
            f"made for {num_classes}: give a data set of {num_classes}, or train with `--num-classes "
            f"{len(class_names)}`, which changes the model"
        )
    return list(class_names)

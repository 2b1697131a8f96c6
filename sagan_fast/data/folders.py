"""Reads a folder of images as a data set: one sub-folder per class, labels in a file, or flat without labels.

Listing opens no image and asks the system for nothing but the folders' entries, so ImageNet's 1.28 million take
seconds. layouts.py decides what the labels are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from sagan_fast.choices import OnBroken
from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.data.images import BrokenImageError, image_size, read_image
from sagan_fast.data.layouts import layout_of
from sagan_fast.data.listing import EXTENSIONS, Tree, read_tree
from sagan_fast.errors import InputError
from sagan_fast.files import explained, reason
from sagan_fast.words import counted

_RESIZE = "give --resolution R to have all images cropped and resized"
MAX_LOOKED_AT = 100
"""Entries looked at beside a folder to tell whether it is one of many classes."""


class FolderDataset(ImageDataset):
    """Images of a folder, centre-cropped and resized, with the labels of `layout_of`.

    A class takes the images anywhere below its folder. `passed_over` counts what was not read: hidden files, folders
    that systems make, and files that are no images by their names. Links are followed.

    Args:
        path: the folder; `~` is the home folder.
        resolution: R; None takes the images as they are, all as large as the first, and refuses any other.
        unlabelled: take all images, at any depth, without labels.

    Attributes:
        labels_from: what the labels were read from, in words.

    Raises InputError with one sentence that says what was found instead and what to do.
    """

    def __init__(
        self,
        path: str,
        *,
        resolution: int | None,
        num_classes: int | None = None,
        on_broken: OnBroken = "fail",
        unlabelled: bool = False,
    ) -> None:
        name = f"folder:{path}"
        self.root = os.path.expanduser(path)
        layout = layout_of(
            name,
            _list_root(name, self.root),
            lambda file: _content(os.path.join(self.root, file)),
            wants_labels=num_classes != 0,
            unlabelled=unlabelled,
        )
        if not layout.class_names:
            _check_flat(name, self.root, len(layout.files), num_classes)
        class_names = match_classes(name, layout.class_names, num_classes)
        super().__init__(
            name, resolution=resolution or 1, class_names=class_names, labels=layout.labels, on_broken=on_broken
        )
        self.passed_over, self.labels_from = layout.passed_over, layout.labels_from
        self._files = np.array([os.fsencode(file) for file in layout.files])  # a list's references would be copied
        self._as_they_are = resolution is None
        if resolution is None:
            self.resolution = self._first_size()

    def path_of(self, index: int) -> str:
        """Return the path of the file of image `index`."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))

    def why_unlabelled(self) -> str:
        """Return the folder above, where this one looks like one of its classes."""
        return "" if self.class_names else _too_deep(self.root)

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R); InputError names the file and says what is wrong with it."""
        path, R = self.path_of(index), self.resolution
        if self._as_they_are and (size := image_size(path)) not in (None, (R, R)):
            raise InputError(f"{path} has {size[0]}x{size[1]} pixels where {R}x{R} are expected: {_RESIZE}")
        way_round = "; on_broken=skip leaves such images out" if self.on_broken == "fail" else ""
        with explained(f"{path} cannot be read", way_round, kinds=(BrokenImageError,)):
            return read_image(path, R)

    def _first_size(self) -> int:
        """Return the side of the first image that can be read; InputError if it is not square, or none can."""
        for index in range(len(self)):
            if (size := image_size(path := self.path_of(index))) is None:
                continue  # reading it will say why
            if size[0] != size[1]:
                raise InputError(f"{path} has {size[0]}x{size[1]} pixels and is not square: {_RESIZE}")
            return size[0]
        raise InputError(f"{self.name} holds no image that Pillow can read, {self.path_of(0)} for one")

    def _identity(self) -> Iterator[bytes]:
        """Yield names, sizes and modification times of the files."""
        for index in range(len(self)):
            path = self.path_of(index)
            with explained(f"{path} cannot be read"):
                status = os.stat(path)
            relative = os.path.relpath(path, self.root)
            yield f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")


def _content(path: str) -> bytes:
    with explained(f"{path} cannot be read"):
        return Path(path).read_bytes()


def _list_root(name: str, root: str) -> Tree:
    """Return what the folder `root` holds; InputError if it cannot be listed."""
    if not os.path.exists(root):
        raise InputError(f"{name} does not exist: check the path (relative ones start at {os.getcwd()})")
    if not os.path.isdir(root):
        raise InputError(f"{name} is a file: give the folder that holds the images (unpack it first if it is packed)")
    try:
        return read_tree(root)
    except OSError as error:
        raise InputError(f"{name}: {error.filename} cannot be listed: {reason(error)}") from error


def _check_flat(name: str, root: str, images: int, num_classes: int | None) -> None:
    """Raise InputError if a flat folder of images is given to a model with classes."""
    if not num_classes:
        return
    flat = f"{name} is a flat folder of {counted(images, 'image')}, but the model has {counted(num_classes, 'class')}"
    if deep := _too_deep(root):
        raise InputError(f"{flat}: {deep}")
    raise InputError(
        f"{flat}: give a folder with one sub-folder of images per class, or set `num_classes: 0` in the config for an "
        "unconditional model"
    )


def _too_deep(root: str) -> str:
    parent = os.path.dirname(os.path.abspath(root))
    if _has_class_beside(parent, os.path.basename(os.path.abspath(root))):
        return f"it seems to be one class of folder:{parent}, a level too deep; give that one"
    return ""


def _has_class_beside(parent: str, name: str) -> bool:
    """Return whether another folder of `parent` holds images directly; looks at a few entries of each only."""
    with suppress(OSError), os.scandir(parent) as siblings:  # a hint only: the parent may be closed to us
        for sibling in itertools.islice(siblings, MAX_LOOKED_AT):
            if sibling.name != name and not sibling.name.startswith(".") and sibling.is_dir():
                with os.scandir(sibling.path) as entries:
                    if any(e.name.lower().endswith(EXTENSIONS) for e in itertools.islice(entries, MAX_LOOKED_AT)):
                        return True
    return False

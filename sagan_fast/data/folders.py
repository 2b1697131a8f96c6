"""Reads a folder of images as a data set: one sub-folder per class, or flat for an unconditional model.

Listing opens no file and asks the system for nothing but the folders' entries, so ImageNet's 1.28 million take
seconds. Any other layout is refused with a sentence that says what was found. Otherwise the usual mistake, a
folder one level too high, would train on a single class unnoticed.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sagan_fast.choices import OnBroken
from sagan_fast.data.dataset import ImageDataset, count, list_some, match_classes
from sagan_fast.data.images import BrokenImageError, image_size, read_image
from sagan_fast.errors import InputError
from sagan_fast.files import explained, reason

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "training", "train_images", "val", "valid", "validation", "test", "testing", "dev", "eval")
"""Names that sub-folders have when they are parts of a data set, not classes of one; the preferred first."""
NOT_DATA = ("__macosx",)
_RESIZE = "give --resolution R to have all images cropped and resized"
MAX_LOOKED_AT = 100
"""Entries looked at beside a folder to tell whether it is one of many classes."""


class FolderDataset(ImageDataset):
    """Images of a folder, centre-cropped and resized; classes are the sub-folders, sorted by name.

    A class takes the images anywhere below its folder. Hidden files and folders, `__MACOSX` and files that are not
    JPEG, PNG or WebP by their name are left out; `num_ignored` counts them. Links are followed.

    Args:
        path: the folder; `~` is the home folder.
        resolution: R; None takes the images as they are, all as large as the first, and refuses any other.

    Raises InputError with one sentence that says what was found instead and what to do.
    """

    def __init__(
        self, path: str, *, resolution: int | None, num_classes: int | None = None, on_broken: OnBroken = "fail"
    ) -> None:
        name = f"folder:{path}"
        self.root = os.path.expanduser(path)
        tree = _list_root(name, self.root)
        if tree.files:
            _check_flat(name, self.root, len(tree.files), num_classes)
            classes, class_names = {"": tree.files}, []
        else:
            classes = {folder: inner.all_files() for folder, inner in tree.folders.items()}
            empty = [folder for folder, inside in classes.items() if not inside]
            if empty and num_classes != 0:
                raise InputError(
                    f"{name}: {len(empty)} of its {len(classes)} class folders ({list_some(empty)}) "
                    f"{'has' if len(empty) == 1 else 'have'} no JPEG, PNG or WebP images: fill or remove what is empty"
                )
            class_names = match_classes(name, list(classes), num_classes)
        files = [file for inside in classes.values() for file in inside]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(inside) for inside in classes.values()])
        super().__init__(name, resolution=resolution or 1, class_names=class_names, labels=labels, on_broken=on_broken)
        self.num_ignored = tree.total_ignored()
        self._files = np.array([os.fsencode(file) for file in files])  # reference counts would copy a list a worker
        self._as_they_are = resolution is None
        if resolution is None:
            self.resolution = self._first_size()
        logger.info(
            "%s: %s in %s, %s ignored",
            name,
            count(len(self), "image", "images"),
            count(self.num_classes, "class", "classes") if self.num_classes else "no classes",
            count(self.num_ignored, "other file", "other files"),
        )

    def path_of(self, index: int) -> str:
        """Return the path of the file of image `index`."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R); InputError names the file and says what is wrong with it."""
        path, R = self.path_of(index), self.resolution
        if self._as_they_are and (size := image_size(path)) not in (None, (R, R)):
            raise InputError(f"{path} has {size[0]}x{size[1]} pixels where {R}x{R} are expected: {_RESIZE}")
        with explained(f"{path} cannot be read", kinds=(BrokenImageError,)):
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


@dataclass
class _Tree:
    """The images at and below one folder, as sorted paths relative to the root."""

    files: list[str]  # directly in it
    folders: dict[str, _Tree]  # its sub-folders by name, the empty ones too
    num_ignored: int

    def all_files(self) -> list[str]:
        return sorted([*self.files, *(file for tree in self.folders.values() for file in tree.all_files())])

    def inhabited(self) -> dict[str, _Tree]:
        return {name: tree for name, tree in self.folders.items() if tree.files or tree.inhabited()}

    def total_ignored(self) -> int:
        return self.num_ignored + sum(tree.total_ignored() for tree in self.folders.values())


def _read_tree(root: str, relative: str = "", ancestors: tuple[tuple[int, int], ...] = ()) -> _Tree:
    tree = _Tree([], {}, 0)
    status = os.stat(os.path.join(root, relative))
    here = (status.st_dev, status.st_ino)
    if here in ancestors:  # a link to a folder that holds it
        return tree
    subfolders = []
    with os.scandir(os.path.join(root, relative)) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith(".") and entry.name.lower() not in NOT_DATA:
                    subfolders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                tree.files.append(os.path.join(relative, entry.name))
            else:
                tree.num_ignored += 1
    tree.files.sort()
    for name in sorted(subfolders):
        tree.folders[name] = _read_tree(root, os.path.join(relative, name), (*ancestors, here))
    return tree


def _list_root(name: str, root: str) -> _Tree:
    """Return what `root` holds, which is class folders or a flat folder of images, or raise InputError."""
    if not os.path.exists(root):
        raise InputError(f"{name} does not exist: check the path (relative ones start at {os.getcwd()})")
    if not os.path.isdir(root):
        raise InputError(f"{name} is a file: give the folder that holds the images (unpack it first if it is packed)")
    try:
        tree = _read_tree(root)
    except OSError as error:
        raise InputError(f"{name}: {error.filename} cannot be listed: {reason(error)}") from error
    folders = tree.inhabited()
    if not tree.files and not folders:
        raise InputError(
            f"{name} holds no images: neither in it nor below it is a JPEG, PNG or WebP file, only "
            f"{count(tree.total_ignored(), 'other file', 'other files')}"
        )
    if tree.files and folders:
        raise InputError(
            f"{name} holds both images ({os.path.basename(tree.files[0])}, ...) and folders of images "
            f"({list_some(list(folders))}): move the images into class folders, or give one of the folders"
        )
    if folders and (why := _why_too_high(folders)):
        meant = os.path.join(name, _probably_meant(folders))
        raise InputError(f"{name} is a level too high: {why}; give {meant}")
    return tree


def _why_too_high(folders: dict[str, _Tree]) -> str:
    """Return what the sub-folders are instead of classes, or nothing if they are classes."""
    if all(folder.lower() in SPLITS for folder in folders):
        return f"its folders ({list_some(list(folders))}) are parts of a data set, not classes"
    nested = {folder: tuple(tree.inhabited()) for folder, tree in folders.items() if not tree.files}
    if len(folders) > 1 and len(nested) == len(folders) and len(set(nested.values())) == 1:
        (inner,) = set(nested.values())
        if len(inner) == 1:  # CLASS/images/FILE for every class, as in the original tiny-imagenet-200
            return ""
    if nested:
        folder, inner = max(nested.items(), key=lambda item: len(item[1]))
        return f"its folder {folder} holds no images but {count(len(inner), 'folder', 'folders')} ({list_some(inner)})"
    return ""


def _probably_meant(folders: dict[str, _Tree]) -> str:
    """Return the path of the first folder below that holds classes or images, the training part where there is one."""

    def rank(item: tuple[str, _Tree]) -> tuple[int, int]:
        name, tree = item
        preferred = SPLITS.index(name.lower()) if name.lower() in SPLITS else len(SPLITS)
        return preferred, -len(tree.inhabited())

    name, tree = min(folders.items(), key=rank)
    inner = tree.inhabited()
    if tree.files or not _why_too_high(inner):
        return name
    return os.path.join(name, _probably_meant(inner))


def _check_flat(name: str, root: str, images: int, num_classes: int | None) -> None:
    """Raise InputError if a flat folder of images is given to a model with classes."""
    if not num_classes:
        return
    flat = f"{name} is a flat folder of {count(images, 'image', 'images')}, but the model has {num_classes} classes"
    parent = os.path.dirname(os.path.abspath(root))
    if _has_class_beside(parent, os.path.basename(os.path.abspath(root))):
        raise InputError(f"{flat}: it seems to be one class of folder:{parent}, a level too deep; give that one")
    raise InputError(
        f"{flat}: give a folder with one sub-folder of images per class, or set `num_classes: 0` in the config for an "
        "unconditional model"
    )


def _has_class_beside(parent: str, name: str) -> bool:
    """Return whether another folder of `parent` holds images directly; looks at a few entries of each only."""
    with suppress(OSError), os.scandir(parent) as siblings:  # a hint only: the parent may be closed to us
        for sibling in itertools.islice(siblings, MAX_LOOKED_AT):
            if sibling.name != name and not sibling.name.startswith(".") and sibling.is_dir():
                with os.scandir(sibling.path) as entries:
                    if any(e.name.lower().endswith(EXTENSIONS) for e in itertools.islice(entries, MAX_LOOKED_AT)):
                        return True
    return False

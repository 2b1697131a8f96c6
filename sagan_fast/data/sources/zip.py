"""Zip archives of images, laid out as a folder: class folders, labels in a file, or flat."""

import io
import os
import zipfile
import zlib
from typing import Any

from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.layouts import layout_of
from sagan_fast.data.listing import Tree, tree_of
from sagan_fast.data.sources.base import Image, Source, fingerprint_of
from sagan_fast.files import explained, reason

DAMAGE = (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, KeyError)
"""What reading raises: RuntimeError for a password or an unknown compression, KeyError for a name that is not there."""


class ZipSource(Source):
    """The images of one archive with the labels of `layout_of`; items are indices.

    One folder that holds everything else counts as the top. Raises InputError if it is no whole zip archive or laid out
    otherwise.
    """

    kind = "zip"

    def __init__(self, path: str, file: str, unlabelled: bool = False) -> None:
        self.path, self.file = path, file
        self._opened: Any = None
        names = [info.filename for info in self._open().infolist() if not info.is_dir()]
        top, tree = _below_one_folder(tree_of(names))
        shown = f"{path}/{top}".rstrip("/")
        layout = layout_of(shown, _without(tree, top), lambda name: self._content(top + name), unlabelled=unlabelled)
        self._names, self._labels = [top + name for name in layout.files], layout.labels
        self.class_names, self.passed_over = layout.class_names, layout.passed_over
        self.labels_from = layout.labels_from
        self.num_items = self.total = len(self._names)
        self._opened = None

    def name_of(self, item: int) -> str:
        return f"{self.file}/{self._names[item]}"

    def read(self, item: int, resolution: int) -> tuple[Image, int]:
        try:
            data = self._open().read(self._names[item])
        except DAMAGE as error:
            raise BrokenImageError(reason(error)) from error
        return read_image(io.BytesIO(data), resolution).numpy(), int(self._labels[item])

    def fingerprint(self) -> str:
        """Return a digest of the archive's name, size and time of modification."""
        status = os.stat(self.file)
        return fingerprint_of([os.path.basename(self.file), status.st_size, status.st_mtime_ns])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _open(self) -> Any:
        if self._opened is None:
            with explained(f"{self.file} cannot be opened as a zip archive", kinds=DAMAGE):
                self._opened = zipfile.ZipFile(self.file)
        return self._opened

    def _content(self, name: str) -> bytes:
        with explained(f"{self.file}/{name} cannot be read", kinds=DAMAGE):
            return bytes(self._open().read(name))


def _below_one_folder(tree: Tree) -> tuple[str, Tree]:
    """Return the folder, "" or with a slash at its end, down to which there is nothing but one folder, and its tree."""
    top = ""
    while not tree.files and not tree.others and len(tree.folders) == 1:
        ((name, inner),) = tree.folders.items()
        if not inner.files and not inner.folders:
            break
        top, tree = f"{top}{name}/", inner
    return top, tree


def _without(tree: Tree, top: str) -> Tree:
    """Return `tree` with its paths relative to the folder `top`."""
    return Tree(
        [file.removeprefix(top) for file in tree.files],
        {name: _without(inner, top) for name, inner in tree.folders.items()},
        [file.removeprefix(top) for file in tree.others],
        tree.passed_over,
    )

"""Image folders as a source: exactly the images, labels and order of `folder:PATH`."""

import os

from sagan_fast.data.folders import FolderDataset
from sagan_fast.data.images import read_image
from sagan_fast.data.sources.base import Image, Source, fingerprint_of


class FolderSource(Source):
    """Class folders or one flat folder; items are indices.

    Raises InputError if the folder is laid out otherwise (see `FolderDataset`).
    """

    kind = "folder"
    has_stamps = True

    def __init__(self, path: str, unlabelled: bool = False) -> None:
        self.path = path
        self._dataset = FolderDataset(path, resolution=1, unlabelled=unlabelled)
        self.class_names = self._dataset.class_names
        self.passed_over, self.labels_from = self._dataset.passed_over, self._dataset.labels_from
        self.num_items = self.total = len(self._dataset)

    def name_of(self, item: int) -> str:
        return self._dataset.path_of(item)

    def read(self, item: int, resolution: int) -> tuple[Image, int]:
        return read_image(self._dataset.path_of(item), resolution).numpy(), int(self._dataset.labels[item])

    def fingerprint(self) -> str:
        """Return a digest of the files' names; what is not packed yet may be repaired meanwhile."""
        root = len(os.path.join(self._dataset.root, ""))
        return fingerprint_of(self._dataset.path_of(i)[root:] for i in range(self.total))

    def stamp(self, item: int) -> str:
        """Return the size, the time of modification and the class of a file; "" if it cannot be found."""
        try:
            status = os.stat(self._dataset.path_of(item))
        except OSError:
            return ""
        names, label = self._dataset.class_names, int(self._dataset.labels[item])
        return f"{status.st_size} {status.st_mtime_ns} {names[label] if names else ''}"

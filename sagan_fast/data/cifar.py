"""The 50,000 training images of CIFAR-10 or CIFAR-100, from their Python archives.

https://www.cs.toronto.edu/~kriz/cifar.html
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.data.images import crop_and_resize, to_tensor
from sagan_fast.errors import InputError

ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class CifarDataset(ImageDataset):
    """A CIFAR training set, resized where `resolution` is neither 32 nor None; nothing is downloaded.

    The classes of CIFAR-100 are the 100 fine ones.

    Args:
        kind: "cifar10" or "cifar100".
        path: the folder that holds the unpacked archive's folder, such as cifar-10-batches-py, or that folder itself.

    Raises InputError if the archive is not there, its checksums are wrong, or `num_classes` is neither None, 0 nor
    the number of classes.
    """

    def __init__(self, kind: str, path: str, *, resolution: int | None, num_classes: int | None = None) -> None:
        archive = ARCHIVES[kind]
        name = f"{kind}:{path}"
        root = Path(path).expanduser()
        if root.name == archive.base_folder and not (root / archive.base_folder).exists():
            root = root.absolute().parent
        if not (root / archive.base_folder).is_dir():
            raise InputError(
                f"{name} holds no folder {archive.base_folder}: unpack {archive.filename} there (from {archive.url}), "
                "or give the folder it was unpacked in"
            )
        try:
            source = archive(str(root), train=True, download=False)
        except RuntimeError as error:
            raise InputError(
                f"{name} lacks a file, or its checksum is wrong: unpack {archive.filename} again"
            ) from error
        super().__init__(
            name,
            resolution=resolution or source.data.shape[1],
            class_names=match_classes(name, source.classes, num_classes),
            labels=np.array(source.targets, np.int64),
        )
        self._images = source.data  # uint8 (50000, 32, 32, 3)

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R)."""
        return to_tensor(crop_and_resize(Image.fromarray(self._images[index]), self.resolution))

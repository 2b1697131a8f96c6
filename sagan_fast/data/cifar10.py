"""CIFAR-10's 50,000 training images from its Python archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.data.images import crop_and_resize, to_tensor
from sagan_fast.errors import InputError


class Cifar10Dataset(ImageDataset):
    """The training set of CIFAR-10, resized where `resolution` is neither 32 nor None; nothing is downloaded.

    Args:
        path: the folder that holds cifar-10-batches-py, or that folder itself.

    Raises InputError if the archive is not there, its checksums are wrong, or `num_classes` is neither None, 0 nor 10.
    """

    def __init__(self, path: str, *, resolution: int | None, num_classes: int | None = None) -> None:
        name = f"cifar10:{path}"
        root = Path(path).expanduser()
        if root.name == CIFAR10.base_folder and not (root / CIFAR10.base_folder).exists():
            root = root.absolute().parent
        if not (root / CIFAR10.base_folder).is_dir():
            raise InputError(
                f"{name} holds no folder {CIFAR10.base_folder}: unpack {CIFAR10.filename} there (from {CIFAR10.url}), "
                "or give the folder it was unpacked in"
            )
        try:
            source = CIFAR10(str(root), train=True, download=False)
        except RuntimeError as error:
            raise InputError(
                f"{name} lacks a file, or its checksum is wrong: unpack {CIFAR10.filename} again"
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

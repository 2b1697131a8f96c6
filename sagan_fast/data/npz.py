"""Images in NumPy's .npz, as guided diffusion (`arr_0`, `arr_1`) and BigGAN-PyTorch (`x`, `y`) write samples."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.data.images import crop_and_resize, to_tensor
from sagan_fast.data.labels import class_number
from sagan_fast.errors import InputError
from sagan_fast.files import explained
from sagan_fast.words import counted

IMAGES, LABELS = ("arr_0", "x"), ("arr_1", "y")
DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class NpzDataset(ImageDataset):
    """The images of one .npz file, all in memory, resized where `resolution` is neither theirs nor None.

    Raises InputError if it holds no uint8 images (N, H, W, 3) or (N, 3, H, W), labels that are not theirs, or other
    classes than wanted.
    """

    def __init__(self, path: str, *, resolution: int | None, num_classes: int | None = None) -> None:
        name = f"npz:{path}"
        images, labels = _arrays(name, Path(path).expanduser())
        if images.shape[3] != 3:
            images = images.transpose(0, 2, 3, 1)
        numbers = np.zeros(len(images), np.int64)
        names: list[str] = []
        if labels is not None and num_classes != 0:
            try:
                numbers = np.array([class_number(label) for label in labels], np.int64)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            if numbers.min() < 0:
                raise InputError(f"{name}: its label {numbers.min()} is negative")
            names = [str(label) for label in range(int(numbers.max()) + 1)]
        super().__init__(
            name,
            resolution=resolution or images.shape[1],
            class_names=match_classes(name, names, num_classes),
            labels=numbers,
        )
        self._images = images
        self.labels_from = "labels in the file" if names else "nothing: no labels"

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R)."""
        return to_tensor(crop_and_resize(Image.fromarray(np.ascontiguousarray(self._images[index])), self.resolution))


def _arrays(name: str, path: Path) -> tuple[Any, Any]:
    with explained(f"{name} cannot be read", kinds=DAMAGE), np.load(path, allow_pickle=False) as file:
        if isinstance(file, np.ndarray):
            raise ValueError("it is one array, not an .npz file")
        images = next((file[key] for key in IMAGES if key in file), None)
        labels = next((file[key] for key in LABELS if key in file), None)
        held = ", ".join(file.files)
    shape: Sequence[int] = getattr(images, "shape", ())
    fits = len(shape) == 4 and shape[0] > 0 and 3 in (shape[1], shape[3])
    if images is None or images.dtype != np.uint8 or not fits:
        what = held if images is None else f"{images.dtype} of {shape}"
        wanted = f"{' or '.join(IMAGES)}, uint8 of (N, H, W, 3) or (N, 3, H, W)"
        raise InputError(f"{name} must hold {wanted}; it holds {what}")
    if labels is not None and (labels.shape[:1] != shape[:1] or labels.ndim > 2):
        raise InputError(f"{name} holds {counted(shape[0], 'image')} and labels of {labels.shape}")
    return images, labels

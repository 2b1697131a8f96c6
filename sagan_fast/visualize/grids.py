"""Images as PNG files, one by one or in a grid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sagan_fast.files import written
from sagan_fast.visualize import drawing


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as uint8 on the CPU, rounded and clipped to [0, 255]."""
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()


def save_png(image: Tensor, path: Path) -> None:
    """Write the uint8 image (3, H, W) to the PNG `path`; InputError if it cannot be written."""
    with written(path, durable=False) as file:  # a picture can be drawn again, and there may be thousands
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")


def save_npz(images: Tensor, labels: Tensor | None, path: Path) -> None:
    """Write uint8 images (B, 3, H, W) as `arr_0` (B, H, W, 3), and their labels as `arr_1` if there are any, to `path`.

    This is the form of guided diffusion's evaluations. Raises InputError if it cannot be written.
    """
    arrays = [images.permute(0, 2, 3, 1).numpy(), *([] if labels is None else [labels.numpy()])]
    with written(path) as file:
        np.savez(file, *arrays)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) in [-1, 1] to the PNG `path`, as `grid` arranges them."""
    save_png(grid(images, columns), path)


def grid(images: Tensor, columns: int) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as one uint8 picture with `columns` images in a row.

    Two white pixels are between them. Images under 64 pixels are enlarged to at least 64 without smoothing.
    """
    from torchvision.utils import make_grid

    picture: Tensor = make_grid(drawing.enlarged(to_uint8(images), 64), nrow=columns, padding=2, pad_value=255)
    return picture


def labelled_grid(images: Tensor, labels: Sequence[str]) -> Tensor:
    """Return images (rows * columns, 3, R, R) in [-1, 1] as one uint8 picture (3, h, w), labelled on the left.

    Images under 64 pixels are enlarged to at least 64 without smoothing. A long label takes several lines.
    """
    pixels = drawing.enlarged(to_uint8(images), 64)
    size, letters = pixels.shape[-1], max(12, min(28, pixels.shape[-1] // 5))
    words = [_fitted(label, letters, 2 * size, size) for label in labels]
    width = max((word.shape[2] for word in words), default=0)
    rows = []
    for word, row in zip(words, pixels.chunk(len(words)), strict=True):
        height, top = word.shape[1], (size - word.shape[1]) // 2
        cell = F.pad(word, (width - word.shape[2], 0, top, size - height - top), value=255)  # beside the row it names
        rows.append(drawing.beside([drawing.beside([cell, row[0]], 8), *row[1:]], 2))
    return drawing.framed(drawing.below(rows, 2), 6)


def _fitted(words: str, letters: int, width: int, height: int) -> Tensor:
    """Return `words` in lines on a picture of at most `width` x `height`; what is still too long ends in "..."."""
    lines = drawing.paragraph(words, letters, width)
    return lines if lines.shape[1] <= height else drawing.text(drawing.shortened(words, letters, width), letters)


def grid_by_class(images: Tensor, y: Tensor | None, names: Sequence[str], columns: int) -> Tensor:
    """Return images (B, 3, R, R) in [-1, 1] as one uint8 picture, `columns` in a row, with the names of their classes.

    A row of one class has its name on the left. Where rows hold several classes, there is a name under each image.
    `y` (B,) None draws no names; a class that `names` does not know is "class 7".
    """
    if y is None:
        return grid(images, columns)
    labels = [names[k] if k < len(names) else f"class {k}" for k in y.tolist()]
    rows = [labels[i : i + columns] for i in range(0, len(labels), columns)]
    if len(labels) % columns == 0 and all(len(set(row)) == 1 for row in rows):
        return labelled_grid(images, [row[0] for row in rows])
    pixels = drawing.enlarged(to_uint8(images), 64)
    size, letters = pixels.shape[-1], max(10, min(20, pixels.shape[-1] // 6))
    lines = [_fitted(label, letters, size, 2 * round(1.4 * letters)) for label in labels]
    height = max(line.shape[1] for line in lines)
    cells = [
        F.pad(torch.cat([image, F.pad(line, (0, size - line.shape[2], 0, height - line.shape[1]), value=255)], 1),
              (0, 2, 0, 2), value=255)
        for image, line in zip(pixels, lines, strict=True)
    ]  # fmt: skip
    blank = [torch.full_like(cells[0], 255)] * (-len(cells) % columns)
    filled = [*cells, *blank]
    picture = [drawing.beside(filled[i : i + columns], 0) for i in range(0, len(filled), columns)]
    return drawing.framed(drawing.below(picture, 0), 4)

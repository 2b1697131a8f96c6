"""Images in [-1, 1] as PNG files, one by one or in a grid."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from sagan_fast.errors import InputError


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as uint8 in [0, 255], rounded, on the CPU; values outside are clipped."""
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()


def save_png(image: Tensor, path: Path) -> None:
    """Write the uint8 image (3, H, W) to `path`, whole or not at all; InputError if the place cannot be written."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) in [-1, 1] to the PNG `path`, `columns` in a row, two white pixels between them.

    Images under 64 pixels are enlarged to at least 64 without smoothing, so that a screen shows them.
    """
    from torchvision.utils import make_grid

    pixels = to_uint8(images)
    enlarge = max(1, 64 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    save_png(make_grid(pixels, nrow=columns, padding=2, pad_value=255), path)

"""Pictures as pixels, from a file or an array, and as the input of the network."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sagan_fast.data.images import BrokenImageError, read_whole, to_rgb
from sagan_fast.errors import InputError
from sagan_fast.files import explained

MEAN = (104.0, 117.0, 123.0)
"""Subtracted from blue, green and red in 0 to 255, as in the published training."""

Pixels = npt.NDArray[np.uint8]
"""RGB (H, W, 3)."""


def as_input(pixels: Pixels) -> Tensor:
    """Return RGB `pixels` (H, W, 3) as the network's input (1, 3, H, W) but in the order red, green, blue, float32.

    It is channels_last in memory.
    """
    height, width, _ = pixels.shape
    # whole rows at a time: sums of three numbers each are not vectorised
    rows = pixels.reshape(height, width * 3).astype(np.float32)
    rows -= _mean_of_a_row(width)
    return torch.from_numpy(rows).view(1, height, width, 3).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=32)
def _mean_of_a_row(width: int) -> npt.NDArray[np.float32]:
    return np.tile(np.array(MEAN[::-1], np.float32), width)


def read_picture(path: str | os.PathLike[str]) -> Pixels:
    """Return the picture in the file `path`, upright, as RGB uint8 (H, W, 3); InputError if it cannot be read."""
    with explained(f"{path} cannot be read", kinds=(BrokenImageError,)):
        return np.asarray(read_whole(path))


def as_pixels(image: Any) -> Pixels:
    """Return `image`, uint8 (H, W), (H, W, 3) or (H, W, 4), as RGB (H, W, 3); InputError for anything else."""
    found = np.asarray(image)
    if found.dtype == np.uint16:
        found = (found >> 8).astype(np.uint8)
    if found.dtype != np.uint8 or found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] not in (1, 3, 4)):
        raise InputError(f"a picture must be uint8 (H, W, 3) in RGB, got {found.dtype} {found.shape}")
    if 0 in found.shape:
        raise InputError(f"a picture must have at least one pixel, got {found.shape}")
    if found.ndim == 3 and found.shape[2] == 3:
        return np.ascontiguousarray(found)
    return np.asarray(to_rgb(Image.fromarray(found[:, :, 0] if found.shape[-1] == 1 and found.ndim == 3 else found)))

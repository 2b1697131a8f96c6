"""The augmentation of FaceBoxes' training: a random square of the picture, in other colours, perhaps mirrored.

It follows data/data_augment.py of the published PyTorch port. Pillow resizes with antialiasing, which OpenCV does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sagan_fast.faces.pictures import MEAN, Pixels, as_input
from sagan_fast.faces.wider import Faces

TRIES = 250
"""Squares drawn until one holds a whole face; then the whole picture is taken, padded to a square."""
LEAST = 16.0
"""Pixels, at the size of training, that the shorter side of a face must exceed for it to be learned."""
FILTERS = tuple(Image.Resampling[name] for name in ("BILINEAR", "BICUBIC", "BOX", "NEAREST", "LANCZOS"))

Rng = np.random.Generator


def augment(pixels: Pixels, faces: Faces, size: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """Return the network's input (3, size, size), float32, blue green red minus the mean, and its faces (N, 4).

    `pixels` are RGB (H, W, 3), `faces` x1 y1 x2 y2 (M, 4) in them. A face is kept whose centre is inside the square,
    clipped to it, and so it is if its shorter side is over 16 pixels of the result.
    """
    square, kept = random_square(pixels, faces, size, rng)
    square = distorted(square, rng)
    height, width = square.shape[:2]
    if height != width:
        padded = np.empty((max(height, width), max(height, width), 3), np.uint8)
        padded[:] = MEAN[::-1]
        padded[:height, :width] = square
        square = padded
    side = square.shape[0]
    if rng.integers(2):
        square = square[:, ::-1]
        kept = np.stack([side - kept[:, 2], kept[:, 1], side - kept[:, 0], kept[:, 3]], 1)
    image = Image.fromarray(np.ascontiguousarray(square))
    resized = np.asarray(image.resize((size, size), FILTERS[rng.integers(len(FILTERS))]))
    found = torch.from_numpy(np.ascontiguousarray(kept * (size / side), dtype=np.float32))
    return as_input(resized)[0].flip(0).contiguous(), found


def random_square(pixels: Pixels, faces: Faces, size: int, rng: Rng) -> tuple[Pixels, Faces]:
    """Return a square part that holds a whole face, and its faces; the whole picture where none is found.

    Its side is that of the shorter side of the picture with probability 0.2, else 0.3 to 1 of it.
    """
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    for _ in range(TRIES if len(faces) else 1):
        share = 1.0 if rng.random() <= 0.2 else rng.uniform(0.3, 1.0)
        side = max(1, int(share * shorter))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        square = pixels[top : top + side, left : left + side]
        if not len(faces):
            return square, faces
        area = np.array([left, top, left + side, top + side], np.float32)
        whole = (faces[:, :2] >= area[:2]).all(1) & (faces[:, 2:] <= area[2:]).all(1)
        if not whole.any():
            continue
        kept = faces_inside(faces, area)
        kept = kept[(kept[:, 2:] - kept[:, :2]).min(1) / side * size > LEAST]
        if len(kept):
            return square, kept
    return pixels, faces


def faces_inside(faces: Faces, area: npt.NDArray[np.float32]) -> Faces:
    """Return those of `faces` whose centre is inside `area` (x1 y1 x2 y2), clipped to it and relative to its corner."""
    centres = (faces[:, :2] + faces[:, 2:]) / 2
    kept = faces[((area[:2] < centres) & (centres < area[2:])).all(1)]
    clipped = np.concatenate([np.maximum(kept[:, :2], area[:2]), np.minimum(kept[:, 2:], area[2:])], 1)
    return clipped - np.tile(area[:2], 2)


def distorted(pixels: Pixels, rng: Rng) -> Pixels:
    """Return RGB `pixels` in other colours: brightness by up to 32, contrast and saturation by 0.5 to 1.5, hue by 36°.

    Each happens with probability 0.5; contrast comes before or after saturation and hue.
    """
    first = bool(rng.integers(2))
    pixels = _scaled(pixels, 1.0, rng.uniform(-32, 32)) if rng.integers(2) else pixels
    if first and rng.integers(2):
        pixels = _scaled(pixels, rng.uniform(0.5, 1.5), 0.0)
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    if rng.integers(2):
        hsv[..., 1] = _scaled(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
    if rng.integers(2):
        hsv[..., 0] += np.uint8(int(rng.integers(-25, 26)) % 256)  # 256 are 360°
    pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if not first and rng.integers(2):
        pixels = _scaled(pixels, rng.uniform(0.5, 1.5), 0.0)
    return pixels


def _scaled(values: Pixels, factor: float, offset: float) -> Pixels:
    return (values.astype(np.float32) * factor + offset).clip(0, 255).astype(np.uint8)

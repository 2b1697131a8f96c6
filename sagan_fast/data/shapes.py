"""The built-in data set: 5000 drawn pictures in ten classes, half of them several shapes that match each other.

Single shapes are large and near the middle. In the other classes the first shape says what the others are: its mirror
image, a copy in the opposite corner, a frame around it, each in the same colour. A discriminator can check this only by
comparing distant places. At 32 pixels all classes are easy to tell apart, also where outlines are blurred.
Coverage comes from signed distances, so edges are antialiased at any resolution. Parameters are raw Philox words and
the drawing uses only + - * / and sqrt in float64: every machine draws the same bytes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.errors import InputError

Array = npt.NDArray[np.float64]

NUM_IMAGES = 5000
MIN_RESOLUTION, MAX_RESOLUTION = 16, 256
CLASS_NAMES = (
    "circle", "square", "triangle", "ring", "cross",
    "mirrored circles", "diagonal squares", "mirrored triangles", "circle in square", "four dots",
)  # fmt: skip
BACKGROUNDS = np.array(
    [  # top and bottom colour; all darker than any foreground
        [(18, 32, 74), (44, 82, 140)],
        [(10, 66, 66), (24, 116, 104)],
        [(66, 20, 74), (122, 48, 118)],
    ],
    np.float64,
)
FOREGROUNDS = np.array([(255, 209, 84), (244, 244, 238), (126, 224, 255), (255, 172, 222)], np.float64)
NUM_PARAMETERS = 6
BLOCK = 100  # images drawn at once: their pixels stay in the cache


class ShapesDataset(ImageDataset):
    """5000 images of drawn shapes, class `index % 10`, all held as one uint8 tensor (5000, 3, R, R).

    Raises InputError if `resolution` is not in 16..256, or `num_classes` is neither None, 0 nor 10.
    """

    def __init__(self, *, resolution: int | None, num_classes: int | None = None) -> None:
        if resolution is None:
            raise InputError("shapes is drawn with any number of pixels: --resolution R must be given")
        if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
            raise InputError(
                f"shapes is drawn with {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels a side, not with {resolution}: set "
                "a resolution in this range or give another data set"
            )
        super().__init__(
            "shapes",
            resolution=resolution,
            class_names=match_classes("shapes", CLASS_NAMES, num_classes),
            labels=np.arange(NUM_IMAGES, dtype=np.int64) % len(CLASS_NAMES),
        )
        images = np.empty((NUM_IMAGES, 3, resolution, resolution), np.uint8)
        for label, shape in enumerate(SHAPES):
            indices = np.arange(label, NUM_IMAGES, len(SHAPES))
            for block in np.split(indices, range(BLOCK, len(indices), BLOCK)):
                images[block] = draw(block, shape, resolution)
        self._images = torch.from_numpy(images)

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R)."""
        return self._images[index].clone()


def draw(indices: npt.NDArray[np.int64], shape: Callable[..., Array], resolution: int) -> npt.NDArray[np.uint8]:
    """Return the images `indices` showing `shape`, uint8 (len(indices), 3, resolution, resolution)."""
    words = np.random.Philox(key=np.array([2018, 8], np.uint64)).random_raw(NUM_IMAGES * NUM_PARAMETERS)
    unit = (words >> np.uint64(11)).astype(np.float64) / 2**53
    parameters = unit.reshape(NUM_IMAGES, NUM_PARAMETERS)[indices].T[..., None, None]  # each (B, 1, 1), in [0, 1)
    centres = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    x, y = centres[None, None, :], centres[None, :, None]
    distance = shape(x, y, *parameters[:4])  # (B, R, R), in half image sides
    coverage = np.clip(0.5 - distance * (resolution / 2), 0, 1)[:, None]

    background = BACKGROUNDS[(parameters[4, :, 0, 0] * len(BACKGROUNDS)).astype(np.int64)][..., None, None]
    colour = FOREGROUNDS[(parameters[5, :, 0, 0] * len(FOREGROUNDS)).astype(np.int64)][..., None, None]
    ground = background[:, 0] + (background[:, 1] - background[:, 0]) * ((y[:, None] + 1) / 2)
    return np.floor(ground + (colour - ground) * coverage + 0.5).astype(np.uint8)


def _between(unit: Array, low: float | Array, high: float | Array) -> Array:
    return low + (high - low) * unit


def _disc(x: Array, y: Array, radius: Array) -> Array:
    return np.sqrt(x * x + y * y) - radius


def _box(x: Array, y: Array, half_width: Array, half_height: Array) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: Array, y: Array, size: Array) -> Array:
    """Distance to an isosceles triangle, its tip at y = -size and its base from (-size, size) to (size, size)."""
    return np.maximum((2 * np.abs(x) - y - size) / np.sqrt(5.0), y - size)


def _single(form: Callable[[Array, Array, Array], Array]) -> Callable[..., Array]:
    def shape(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
        size = _between(a, 0.6, 0.7)
        return form(x - 0.2 * (2 * b - 1), y - 0.2 * (2 * c - 1), size)

    return shape


def _ring(x: Array, y: Array, size: Array) -> Array:
    return np.abs(_disc(x, y, 0.78 * size)) - 0.22 * size


def _cross(x: Array, y: Array, size: Array) -> Array:
    return np.minimum(_box(x, y, size, 0.3 * size), _box(x, y, 0.3 * size, size))


def _mirrored_circles(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
    size = _between(a, 0.32, 0.38)
    away = _between(b, size + 0.06, 0.92 - size)
    return _disc(np.abs(x) - away, y - 0.25 * (2 * c - 1), size)


def _corner(size: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """A place in the upper half, on the left or, where d >= 1/2, on the right."""
    away = _between(b, size + 0.08, 0.92 - size)
    return np.where(d < 0.5, -away, away), -_between(c, size + 0.08, 0.92 - size)


def _diagonal_squares(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
    size = _between(a, 0.32, 0.38)
    left, top = _corner(size, b, c, d)
    return np.minimum(_box(x - left, y - top, size, size), _box(x + left, y + top, size, size))


def _mirrored_triangles(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
    size = _between(a, 0.36, 0.42)
    away = _between(b, size + 0.02, 0.9 - size)
    return _triangle(x - 0.25 * (2 * c - 1), np.abs(y) - away, size)


def _circle_in_square(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
    size = _between(a, 0.66, 0.74)
    x, y = x - 0.15 * (2 * b - 1), y - 0.15 * (2 * c - 1)
    frame = np.abs(_box(x, y, 0.88 * size, 0.88 * size)) - 0.12 * size
    return np.minimum(frame, _disc(x, y, 0.45 * size))


def _four_dots(x: Array, y: Array, a: Array, b: Array, c: Array, d: Array) -> Array:
    size = _between(a, 0.24, 0.3)
    across, down = _between(b, size + 0.12, 0.9 - size), _between(c, size + 0.12, 0.9 - size)
    return _disc(np.abs(x) - across, np.abs(y) - down, size)


SHAPES: tuple[Callable[..., Array], ...] = (
    _single(_disc),
    _single(lambda x, y, size: _box(x, y, 0.9 * size, 0.9 * size)),
    _single(_triangle),
    _single(_ring),
    _single(_cross),
    _mirrored_circles,
    _diagonal_squares,
    _mirrored_triangles,
    _circle_in_square,
    _four_dots,
)
"""Signed distance functions (x, y, then four numbers in [0, 1)), one per class name."""

"""DiffAugment: the discriminator sees real and generated images through the same random, differentiable changes.

Source: Zhao et al. 2020, https://arxiv.org/abs/2006.10738, §4 and appendix, with the amounts of the authors' code. Few
images are then not learned by heart, and the generator does not learn the changes, as its gradient passes through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagan_fast.choices import DiffAugment, several
from sagan_fast.kernels.launch import accumulator_dtype

NUMBERS = 7
"""Random numbers an image: three for its colour, two for its translation, two for its cutout."""


def augment(images: Tensor, policy: str, numbers: Tensor | None) -> Tensor:
    """Return `images` (B, 3, H, W), each with random changes of its own; the gradient passes, twice too.

    `numbers` (B, NUMBERS) are uniform in [0, 1), and the same for any `policy`; without them the images are returned as
    they are. Images in half precision are changed in float32. Raises InputError for a change that there is not.
    """
    if numbers is None:
        return images
    names = several("diffaugment", policy, DiffAugment)
    images = images.to(accumulator_dtype(images.dtype))
    if "color" in names:
        images = recoloured(images, numbers[:, :3])
    kept = None
    if "translation" in names:
        images, kept = translated(images, numbers[:, 3:5])
    if "cutout" in names:
        uncut = outside_square(images, numbers[:, 5:7])
        kept = uncut if kept is None else kept & uncut
    return images if kept is None else images * kept


def recoloured(images: Tensor, numbers: Tensor) -> Tensor:
    """Return `images` with other brightness, saturation and contrast, from `numbers` (B, 3) in [0, 1).

    The brightness moves by -0.5 to 0.5. The distance from a pixel's gray is multiplied by 0 to 2, and then that from
    the image's mean by 0.5 to 1.5.
    """
    brightness, saturation, contrast = numbers.to(images.dtype)[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2.0 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translated(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return `images` moved by up to 1/8 of their height and width, and where they are, (B, 1, H, W) booleans.

    `numbers` (B, 2) in [0, 1) give the rows and columns. What is outside holds border pixels: make it 0.
    """
    B, C, H, W = images.shape
    rows, row_inside = _sources(H, numbers[:, 0])
    columns, column_inside = _sources(W, numbers[:, 1])
    # A gather from flat planes: its backward is the fastest of the ways to index, on the CPU by a factor of two.
    index = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W).expand(B, C, H * W)
    moved = images.reshape(B, C, H * W).gather(2, index).view(B, C, H, W)
    return moved, (row_inside[:, :, None] & column_inside[:, None, :])[:, None]


def outside_square(images: Tensor, numbers: Tensor) -> Tensor:
    """Return (B, 1, H, W) booleans, False in a square of half the height and width of `images`, cut at the border.

    `numbers` (B, 2) in [0, 1) give its centre, anywhere in the image.
    """
    _, _, H, W = images.shape
    rows, columns = _covered(H, numbers[:, 0]), _covered(W, numbers[:, 1])
    return ~(rows[:, :, None] & columns[:, None, :])[:, None]


def _sources(size: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place (B, size) that each place takes its pixel from, and whether that is inside."""
    most = int(size / 8 + 0.5)
    places = torch.arange(size, device=numbers.device) - (_whole(numbers, 2 * most + 1)[:, None] - most)
    return places.clamp(0, size - 1), (places >= 0) & (places < size)


def _covered(size: int, numbers: Tensor) -> Tensor:
    """Return which of `size` places (B, size) a stretch of half of them covers."""
    length = int(size / 2 + 0.5)
    first = _whole(numbers, size + 1 - length % 2)[:, None] - length // 2
    places = torch.arange(size, device=numbers.device)
    return (places >= first) & (places < first + length)


def _whole(numbers: Tensor, count: int) -> Tensor:
    """Return whole numbers below `count`, as often each, from uniform ones in [0, 1)."""
    return (numbers * count).long().clamp_max(count - 1)  # a product of float32 may be rounded up to count

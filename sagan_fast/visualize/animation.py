"""Writes animations as GIF, or as PNG with all colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.files import written

SUFFIXES = (".gif", ".apng", ".png")


def save_animation(frames: Sequence[Tensor], path: Path, frames_per_second: float = 12.0) -> None:
    """Write uint8 `frames` (3, h, w) of one size to `path`, whole or not at all, repeating for ever.

    The name decides: `.gif` (at most 256 colours, chosen once for all frames so that nothing flickers), `.apng` or
    `.png` (an animated PNG, every colour). Raises InputError for another name or a place that cannot be written.
    """
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"an animation must be a {', '.join(SUFFIXES)} file, got {path}")
    images = [Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy())) for frame in frames]
    if suffix == ".gif":
        sample = images[:: max(1, len(images) // 8)]
        strip = Image.fromarray(np.concatenate([np.asarray(image)[::2, ::2] for image in sample]))
        palette = strip.quantize(256, kmeans=1)  # without k-means small bright things, such as dots, go dull
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    with written(path, durable=False) as file:
        images[0].save(
            file,
            format="GIF" if suffix == ".gif" else "PNG",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / frames_per_second),
            loop=0,
        )

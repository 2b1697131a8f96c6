"""Frames as an animation: GIF, animated PNG or MP4."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.files import written

SUFFIXES = (".gif", ".apng", ".png", ".mp4")
"""Names of animations end so."""
SIDE = 512
"""Pixels that the longer side is enlarged to, or near it: frames of 68 are hard to see, and players blur them."""
QUALITY = "16"
"""x264's constant rate factor: no loss that is seen."""


def check_animation(path: Path, option: str) -> None:
    """Raise InputError unless `path`, the value of --`option`, is named as an animation that can be written here."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--{option} must name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path}")
    if path.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise InputError(f"an .mp4 file needs the package {error.name}: pip install 'sagan_fast[video]'") from error


def save_animation(frames: Sequence[Tensor], path: Path, frames_per_second: int = 12) -> None:
    """Write uint8 `frames` (3, h, w) of one size to `path`, whole or not at all.

    Small frames are enlarged by a whole factor to about SIDE pixels. The name decides: `.gif` (at most
    256 colours, chosen once for all frames so that nothing flickers), `.apng` or `.png` (an animated PNG, every
    colour), both repeating for ever, or `.mp4` (H.264, played once; a white line makes an odd size even). Raises
    InputError for another name, a missing package, or a place that cannot be written.
    """
    check_animation(path, "out")
    images = [Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy())) for frame in frames]
    kind = path.suffix.lower()
    content = (
        _mp4(images, frames_per_second) if kind == ".mp4" else _repeating(images, kind == ".gif", frames_per_second)
    )
    with written(path, durable=False) as file:
        file.write(content)


def _enlarged(image: Image.Image) -> Image.Image:
    times = max(1, round(SIDE / max(image.size)))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def _repeating(images: Sequence[Image.Image], is_gif: bool, rate: int) -> bytes:
    if is_gif:
        sample = images[:: max(1, len(images) // 8)]
        strip = Image.fromarray(np.concatenate([np.asarray(image)[::2, ::2] for image in sample]))
        palette = strip.quantize(256, kmeans=1)  # without k-means small bright things, such as dots, go dull
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    out = io.BytesIO()
    first, *others = map(_enlarged, images)  # last, as the colours stay the same
    kind = "GIF" if is_gif else "PNG"
    first.save(out, format=kind, save_all=True, append_images=others, duration=round(1000 / rate), loop=0)
    return out.getvalue()


def _mp4(images: Sequence[Image.Image], rate: int) -> bytes:
    import av

    width, height = _enlarged(images[0]).size
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("h264", Fraction(rate), options={"crf": QUALITY})
        stream.height, stream.width = height + height % 2, width + width % 2  # colours are stored for 2 x 2 pixels
        stream.pix_fmt = "yuv420p"  # what every player reads
        for image in images:
            even = Image.new("RGB", (stream.width, stream.height), "white")
            even.paste(_enlarged(image))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(even), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()

"""Turns an image file into the square RGB tensor that the discriminator sees.

The crop is the largest centred square, the filter Pillow's bilinear, which is antialiased when shrinking: what
BigGAN-PyTorch (utils.py, `CenterCropLongEdge` then `Resize`) and mimicry do. Other filters move FID by points.
"""

import os
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sagan_fast.files import reason

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""


class BrokenImageError(Exception):
    """A file is not a readable image; the message is the reason, without the file's name."""


def read_image(path: str | os.PathLike[str] | IO[bytes], resolution: int) -> Tensor:
    """Return the image in `path`, a file or an open one, as uint8 (3, resolution, resolution), RGB.

    It is turned upright by its EXIF orientation; of an animation it is the first frame. Raises BrokenImageError if the
    file is missing, cut short, or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_tensor(crop_and_resize(to_rgb(ImageOps.exif_transpose(image)), resolution))
    except MemoryError:
        raise
    except Exception as error:  # decoders meet bad bytes with nearly every kind of exception
        unknown = isinstance(error, UnidentifiedImageError)  # whose own words name the file a second time
        raise BrokenImageError("it is not an image that Pillow can read" if unknown else reason(error)) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return (width, height) of an image file from its header; None if the file is broken."""
    try:
        with Image.open(path) as image:
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size[::-1] if on_its_side else image.size
    except Exception:  # decoders meet bad bytes with nearly every kind of exception
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB.

    Gray becomes three equal channels (16-bit gray keeps its upper 8 bits), a palette its colours, CMYK the plain
    conversion without a colour profile; transparency, of a palette too, is laid over white.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything over 255 to white
        gray = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, resolution: int) -> Image.Image:
    """Return the largest centred square of `image`, resized to (resolution, resolution) with antialiasing.

    The square's corner is rounded as `torchvision.transforms.CenterCrop` rounds it; a square of the right size is
    returned as it is.
    """
    width, height = image.size
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    square = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return square
    return square.resize((resolution, resolution), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB `image` of size (W, H) as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

"""Turns an image file into the square RGB tensor that the discriminator sees.

The crop is the largest centred square, the filter Pillow's bilinear, which is antialiased when shrinking: what
BigGAN-PyTorch (utils.py, `CenterCropLongEdge` then `Resize`) and mimicry do. Other filters move FID by points.
"""

import os
import warnings
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from sagan_fast.files import reason

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns an image upright, by its EXIF orientation. Pillow's own function writes the other tags anew as well, and
fails where one of them is odd."""


class BrokenImageError(Exception):
    """A file is not a readable image; the message is the reason, without the file's name."""


def read_image(path: str | os.PathLike[str] | IO[bytes], resolution: int) -> Tensor:
    """Return the image in `path`, a file or an open one, as uint8 (3, resolution, resolution), RGB.

    It is turned upright by its EXIF orientation; of an animation it is the first frame. Raises BrokenImageError if the
    file is missing, cut short, or not an image.
    """
    return to_tensor(crop_and_resize(read_whole(path), resolution))


def read_whole(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Return the image in `path`, a file or an open one, upright and in mode RGB; see `read_image`."""
    try:
        with Image.open(path) as image:
            if _has_wide_transparency(image):
                whole = _over_white(image)
            else:
                image.load()
                whole = to_rgb(image)
            turn = UPRIGHT.get(orientation(image))
            return whole if turn is None else whole.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # decoders meet bad bytes with nearly every kind of exception
        unknown = isinstance(error, UnidentifiedImageError)  # whose own words name the file a second time
        raise BrokenImageError("it is not an image that Pillow can read" if unknown else reason(error)) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return (width, height) of an image file from its header; None if the file is broken."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if orientation(image) in (5, 6, 7, 8) else image.size
    except Exception:  # decoders meet bad bytes with nearly every kind of exception
        return None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of `image`, 1 to 8; 1 (upright) where there is none that makes sense."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # other tags may be damaged in any way, and say nothing about the picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _has_wide_transparency(image: ImageFile.ImageFile) -> bool:
    """Return whether `image`, not loaded yet, is a PNG of 16 bits a channel with a transparent colour (tRNS)."""
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return False
    return "16" in str(image.tile[0][3])


def _over_white(image: ImageFile.ImageFile) -> Image.Image:
    """Return a PNG of 16 bits, not loaded yet, in mode RGB, its transparent colour white.

    Pillow keeps 8 bits, and so takes other colours for the transparent one, or none (Pillow 13.0.0).
    """
    from torchvision.io import decode_png

    file = image.fp
    assert file is not None
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a buffer that cannot be written
        wide = decode_png(torch.frombuffer(file.read(), dtype=torch.uint8)).numpy()  # uint16 (1 or 3, H, W)
    colour = np.asarray(image.info["transparency"], np.int64).reshape(-1, 1, 1)
    pixels = (wide >> 8).astype(np.uint8)
    pixels[:, (wide.astype(np.int64) == colour).all(0)] = 255
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (3, *wide.shape[1:])).transpose(1, 2, 0)))


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

"""Images as people have them, for the tests of data sets in other formats."""

import numpy as np
import pytest
from PIL import Image


def random_pixels(rng, *shape):
    """Smooth random uint8, so that JPEG keeps most of it and resizing has something to blur."""
    coarse = rng.integers(0, 256, (*(-(-n // 4) for n in shape[:2]), *shape[2:]), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]]


def save_kinds(folder, rng):
    """Write one image of each kind that decoders treat differently; returns the names in sorted order."""
    rgb = Image.fromarray(random_pixels(rng, 21, 30, 3))
    rgb.save(folder / "a plain.jpg", quality=90)
    rgb.convert("CMYK").save(folder / "cmyk.jpeg")
    rgb.convert("L").save(folder / "gray.jpg")
    rgb.convert("P").save(folder / "palette.png")
    Image.fromarray(random_pixels(rng, 17, 12, 4), "RGBA").save(folder / "rgba ü’&;$.png")
    Image.fromarray(rng.integers(0, 65536, (19, 19), dtype=np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.save(folder / "webp.webp", lossless=True)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def image_folder(tmp_path, rng):
    """A folder of two classes of eight images each, no two alike."""
    for name in ("cat", "dög 2"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        save_kinds(folder, rng)
    return tmp_path / "images"

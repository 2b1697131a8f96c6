"""Files to tensors: torchvision's crop and resize as the truth, every colour mode, broken files."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from sagan_fast.data.images import BrokenImageError, crop_and_resize, image_size, read_image, to_rgb


def noise(*size):
    return torch.randint(256, size, dtype=torch.uint8).numpy()


@pytest.mark.parametrize("size", [(40, 40), (41, 64), (63, 40), (64, 41), (100, 33), (32, 90), (20, 9), (7, 1)])
@pytest.mark.parametrize("resolution", [32, 9])
def test_crop_and_resize_are_torchvisions(size, resolution):
    image = Image.fromarray(noise(size[1], size[0], 3))
    expected = transforms.Compose([transforms.CenterCrop(min(size)), transforms.Resize((resolution, resolution))])
    assert np.array_equal(np.asarray(crop_and_resize(image, resolution)), np.asarray(expected(image)))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(crop_and_resize(Image.fromarray(stripes), 16)).astype(int)
    assert np.abs(small - 127.5).max() < 20


def test_png_of_the_right_size_is_read_exactly(tmp_path):
    pixels = noise(16, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 16)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert np.array_equal(image.numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_formats(tmp_path, name):
    Image.new("RGB", (20, 30), (200, 40, 90)).save(tmp_path / name)
    image = read_image(tmp_path / name, 8)
    assert (image.float() - torch.tensor([200.0, 40, 90])[:, None, None]).abs().max() <= 4


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("I;16", (4, 4), 77 * 256 + 255), (77, 77, 77)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 0, 0)), (255, 0, 255)),
        (Image.new("RGB", (4, 4), (10, 150, 250)).quantize(4), (10, 150, 250)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_colour_modes(image, expected, tmp_path):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and np.asarray(rgb)[2, 2].tolist() == list(expected)
    name = tmp_path / ("a.jpg" if image.mode == "CMYK" else "a.png")
    image.save(name)
    assert read_image(name, 4)[:, 2, 2].tolist() == pytest.approx(expected, abs=3)


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png", 4)[:, 0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_turns_the_image_upright(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned clockwise: white to the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = read_image(tmp_path / "a.jpg", 16).float().mean(0)
    assert shown[:, 9:].mean() > 240 and shown[:, :7].mean() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows_own(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(noise(9, 16, 3)).save(data, "PNG", exif=exif)
    image = Image.open(data)
    assert image_size(data) == ((9, 16) if orientation > 4 else (16, 9))
    expected = crop_and_resize(ImageOps.exif_transpose(image), 9)
    assert np.array_equal(read_image(data, 9).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_damaged_exif_costs_no_image(rng):
    """Bytes of the tags are changed at random: the picture is read, and turned where the orientation is whole."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x8769] = 6, "maker", 72.0, {0x9003: "2020:01:01 00:00:00"}
    data = io.BytesIO()
    Image.fromarray(noise(8, 16, 3)).save(data, "JPEG", exif=exif, quality=95)
    whole = data.getvalue()
    start = whole.index(b"Exif\0\0") + 6
    size = int.from_bytes(whole[start - 8 : start - 6], "big") - 8
    upright = [read_image(io.BytesIO(whole), 8)]
    tag = whole.index(b"\x01\x12\x00\x03", start)
    orientation = range(tag, tag + 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the tags
        for _ in range(300):
            changed = bytearray(whole)
            places = [p for p in (start + 10 + rng.integers(0, size - 10, 3)).tolist() if p not in orientation]
            for place in places:
                changed[place] = rng.integers(0, 256)
            found = read_image(io.BytesIO(bytes(changed)), 8)
            assert found.shape == (3, 8, 8)
            upright.append(found)
    assert sum(torch.equal(found, upright[0]) for found in upright) > 250
    odd = whole[: tag + 8] + b"\x03\xe7" + whole[tag + 10 :]  # orientation 999
    assert image_size(io.BytesIO(odd)) == (16, 8)


def png_of_16_bits(pixels, transparent):
    """A PNG of uint16 `pixels` (H, W, C), C 1 or 3, with a transparent colour: what Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return io.BytesIO(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes())
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_is_white_and_only_that(channels):
    narrow = noise(6, 6, channels)
    narrow[0, :3] = narrow[0, 0]
    wide = narrow.astype(np.uint16) * 257
    found = read_image(png_of_16_bits(wide, wide[0, 0]), 6).permute(1, 2, 0).numpy()
    data, colour = io.BytesIO(), tuple(narrow[0, 0].tolist())
    Image.fromarray(narrow.squeeze()).save(data, "PNG", transparency=colour[0] if channels == 1 else colour)
    assert np.array_equal(found, read_image(data, 6).permute(1, 2, 0).numpy()) and (found[0, 0] == 255).all()
    wide[0, 1] += 1  # opaque, though its upper bytes are those of the transparent colour
    found = read_image(png_of_16_bits(wide, wide[0, 0]), 6).permute(1, 2, 0).numpy()
    assert (found[0, 1] == narrow[0, 1] + (wide[0, 1] >> 8) - narrow[0, 1]).all() and (found[0, 2] == 255).all()


def test_broken_files_say_why(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name, reason in [
        ("text.jpg", "not an image that Pillow can read"),
        ("empty.png", "not an image that Pillow can read"),
        ("cut.jpg", "truncated"),
        ("gone.jpg", "No such file"),
    ]:
        with pytest.raises(BrokenImageError, match=reason):
            read_image(tmp_path / name, 8)

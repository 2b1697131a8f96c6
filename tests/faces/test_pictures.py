"""The network's input is blue, green, red minus the mean, here in the order red, green, blue."""

import numpy as np
import torch

from sagan_fast.faces.pictures import MEAN, as_input, as_pixels, read_picture


def test_the_input_is_the_pixels_minus_the_mean(rng):
    pixels = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    before = pixels.copy()
    found = as_input(pixels)
    expected = torch.from_numpy(pixels.astype(np.float32) - np.array(MEAN[::-1], np.float32)).permute(2, 0, 1)[None]
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(pixels, before)
    assert torch.equal(as_input(pixels[::-1, ::2]), expected.flip(2)[..., ::2])  # any strides


def test_pixels_of_an_array_are_not_copied_in_vain(rng):
    pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    assert np.shares_memory(as_pixels(pixels), pixels)


def test_a_picture_is_turned_upright(tmp_path, rng):
    from PIL import Image

    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), np.rot90(pixels, -1))

"""Crops are the pixels around the boxes, mirrored beyond the border, in a folder that `folder:` reads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.faces.crops import MANIFEST, crop, crop_folder, photographs, square_of


class Finds:
    """Stands for a detector: the boxes of each size of picture."""

    sha256 = None

    def __init__(self, by_width):
        self.by_width = by_width

    def __call__(self, pixels):
        found = self.by_width.get(pixels.shape[1], [])
        return torch.tensor(found).reshape(-1, 4), torch.linspace(0.99, 0.9, len(found))


def test_a_square_inside_is_the_pixels_themselves(rng):
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(crop(pixels, 7, 5, 16, 16), pixels[5:21, 7:23])
    assert square_of([10.0, 20, 30, 60], 0.25) == (-10.0, 10.0, 60.0)


@pytest.mark.parametrize(("x", "y", "side"), [(-5, -9, 20), (40, 33, 20), (-60, -70, 200)])
def test_beyond_the_border_is_the_mirror_image(x, y, side, rng):
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    around = np.pad(pixels, ((200, 200), (200, 200), (0, 0)), mode="reflect")
    assert np.array_equal(crop(pixels, x, y, side, side), around[200 + y : 200 + y + side, 200 + x : 200 + x + side])


def test_a_crop_is_antialiased_and_its_corner_lies_between_pixels(rng):
    checked = np.indices((120, 120)).sum(0) % 2 * 255
    pixels = np.repeat(checked[:, :, None], 3, 2).astype(np.uint8)
    small = crop(pixels, 10, 10, 96, 12)
    assert small.shape == (12, 12, 3) and np.abs(small.astype(int) - 127).max() < 12
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    assert crop(ramp, 10.5, 3, 20, 20)[5, 5, 0] == pytest.approx(4 * 15.5, abs=1)


def test_one_pixel_wide():
    assert crop(np.full((1, 1, 3), 9, np.uint8), -3, -2, 6, 4).tolist() == [[[9, 9, 9]] * 4] * 4


@pytest.fixture
def album(tmp_path, rng):
    """Pictures in class folders: two faces at width 80, one at 81, none at 82."""
    for name, width in (("a/one.png", 80), ("a/two.jpg", 82), ("b/one.png", 81), ("b/one.jpg", 81)):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, width, 3), dtype=np.uint8)).save(tmp_path / "album" / name)
    return tmp_path / "album"


FACES = {80: [[5.0, 5, 45, 45], [40, 10, 45, 15]], 81: [[20.0, 10, 60, 50]]}


def test_a_folder_of_photographs(album, tmp_path):
    out = tmp_path / "crops"
    told = []
    done = crop_folder(album, out, Finds(FACES), size=24, on_progress=lambda done, total: told.append(total))
    assert (done.photographs, done.without, done.crops, done.too_small) == (4, 1, 3, 1) and told == [4] * 4
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a/one-0.png", "b/one-0.png", "b/one-0.1.png"]
    assert [line["source"] for line in lines] == ["a/one.png", "b/one.jpg", "b/one.png"]
    assert lines[0]["box"] == [5, 5, 45, 45] and lines[0]["square"] == [-7, -7, 64]
    pixels = np.asarray(Image.open(album / "a" / "one.png"))
    assert np.array_equal(np.asarray(Image.open(out / "a" / "one-0.png")), crop(pixels, -7, -7, 64, 24))
    dataset = open_dataset(f"folder:{out}", resolution=24)
    assert len(dataset) == 3 and dataset.class_names == ["a", "b"]
    with pytest.raises(InputError, match="is not an empty folder"):
        crop_folder(album, out, Finds(FACES))


def test_a_flat_folder_gives_a_flat_one(album, tmp_path):
    crop_folder(album / "a", tmp_path / "flat", Finds(FACES), size=24, min_size=0)
    dataset = open_dataset(f"folder:{tmp_path / 'flat'}", resolution=24, num_classes=0)
    assert len(dataset) == 2 and not dataset.class_names


def test_broken_photographs(album, tmp_path):
    (album / "a" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.png cannot be read: .*; --on-broken skip leaves such pictures out"):
        crop_folder(album, tmp_path / "x", Finds(FACES))
    done = crop_folder(album, tmp_path / "y", Finds(FACES), on_broken="skip")
    assert done.photographs == 4 and list(done.broken) == ["a/bad.png"]


def test_what_is_no_album(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        photographs(tmp_path / "none")
    with pytest.raises(InputError, match="holds no pictures"):
        photographs(tmp_path)
    for options in ({"size": 0}, {"margin": -1}, {"min_size": -1}):
        with pytest.raises(InputError, match="size must be at least 1, margin 0 to 4 and min_size at least 0"):
            crop_folder(tmp_path, tmp_path / "out", Finds({}), **options)

"""The augmentation moves faces with their pixels, and keeps what can be learned."""

import numpy as np
import pytest
import torch
from face_pictures import drawn_picture

from sagan_fast.faces.augment import LEAST, augment, distorted, faces_inside, random_square
from sagan_fast.faces.pictures import MEAN


def marked(rng, height=90, width=140):
    """A dark picture with one bright square as its face, and its box."""
    pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    side = int(rng.integers(20, 60))
    x, y = int(rng.integers(width - side)), int(rng.integers(height - side))
    pixels[y : y + side, x : x + side] = 255
    return pixels, np.array([[x, y, x + side, y + side]], np.float32)


def test_faces_stay_on_their_pixels(rng):
    """Whatever square, mirror image and filter: inside the box it is bright, around it dark."""
    for _ in range(30):
        image, faces = augment(*marked(rng), 128, rng)
        assert image.shape == (3, 128, 128) and image.dtype == torch.float32
        assert faces.shape == (1, 4) and faces.dtype == torch.float32
        assert bool((faces >= 0).all()) and bool((faces <= 128).all())
        bright = image.mean(0)
        x1, y1, x2, y2 = faces[0].round().int().tolist()
        inside = bright[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
        mask = torch.ones_like(bright, dtype=torch.bool)
        mask[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
        around = bright[mask]
        assert inside.numel() > 0
        assert not around.numel() or float(inside.min()) > float(around.max()) + 20


def test_the_square_holds_a_whole_face_of_enough_pixels(rng):
    for _ in range(30):
        pixels, faces = drawn_picture(rng)
        square, kept = random_square(pixels[:200], faces, 300, rng)
        if square.shape[:2] == (200, 256):
            continue  # no square held a whole face
        side = square.shape[0]
        assert square.shape == (side, side, 3) and 0.3 * 200 - 1 <= side <= 200
        assert len(kept) and float((kept[:, 2:] - kept[:, :2]).min()) / side * 300 > LEAST


def test_small_faces_are_dropped_and_centres_decide():
    faces = np.array([[0, 0, 10, 10], [8, 0, 20, 10], [9, 0, 30, 40]], np.float32)
    found = faces_inside(faces, np.array([6, 0, 40, 40], np.float32))
    assert found.tolist() == [[2, 0, 14, 10], [3, 0, 24, 40]]


def test_where_no_square_fits_the_picture_is_padded_with_the_mean(rng):
    pixels = np.full((40, 80, 3), 200, np.uint8)
    image, faces = augment(pixels, np.array([[0, 0, 80, 40]], np.float32), 64, rng)  # wider than any square
    assert faces.shape == (1, 4)
    padding = image[:, -20:].abs()
    assert float(padding.max()) <= 1.0  # blue, green and red minus their means
    assert float(image[:, :25].abs().min()) > 0 and faces[0, 3] == pytest.approx(32)


def test_pictures_without_faces_are_used(rng):
    image, faces = augment(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), np.zeros((0, 4), np.float32), 64, rng)
    assert image.shape == (3, 64, 64) and faces.shape == (0, 4)


def test_channels_are_blue_green_red_minus_the_mean(rng, monkeypatch):
    monkeypatch.setattr("sagan_fast.faces.augment.distorted", lambda pixels, rng: pixels)
    pixels = np.empty((64, 64, 3), np.uint8)
    pixels[:] = (10, 20, 30)
    image, _ = augment(pixels, np.zeros((0, 4), np.float32), 32, rng)
    expected = torch.tensor([30.0, 20.0, 10.0]) - torch.tensor(MEAN)
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 32, 32))


def test_colours_change_and_the_input_does_not(rng):
    pixels, _ = drawn_picture(rng, 64)
    before = pixels.copy()
    results = [distorted(pixels, rng) for _ in range(12)]
    assert np.array_equal(pixels, before)
    assert all(r.shape == pixels.shape and r.dtype == np.uint8 for r in results)
    changes = [np.abs(r.astype(int) - pixels.astype(int)).mean() for r in results]
    assert max(changes) > 5 and len({round(c, 3) for c in changes}) > 6


def test_the_same_state_gives_the_same_sample(rng):
    pixels, faces = drawn_picture(rng)
    a, b = (augment(pixels, faces, 96, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

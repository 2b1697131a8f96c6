"""Boxes are drawn where they are, and the picture given is not changed."""

import numpy as np

from sagan_fast.faces.drawing import with_boxes


def test_a_frame_around_each_box(rng):
    pixels = rng.integers(0, 200, (80, 100, 3), dtype=np.uint8)
    before = pixels.copy()
    drawn = with_boxes(pixels, [([20.0, 30.0, 60.0, 70.0], 0.987), ([-10.0, -10.0, 5.0, 400.0], 0.5)])
    assert drawn.shape == pixels.shape and np.array_equal(pixels, before)
    frame = drawn[30, 25:60]
    assert (frame == frame[0]).all() and (drawn[70, 25:60] == frame[0]).all() and (drawn[35:70, 20] == frame[0]).all()
    assert np.array_equal(drawn[32:69, 22:59], pixels[32:69, 22:59])


def test_no_face_no_change(rng):
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(with_boxes(pixels, []), pixels)

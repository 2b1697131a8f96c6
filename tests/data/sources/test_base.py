"""What all sources share: labels that are class numbers, pixels that fit."""

import numpy as np
import pytest
from PIL import Image

from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.labels import MAX_LABEL
from sagan_fast.data.sources.base import check_label, fingerprint_of, fit, start_of
from sagan_fast.errors import InputError


def test_labels():
    assert check_label(0, 0) == 0 and check_label(7, 1) == 6 and check_label(MAX_LABEL, 0) == MAX_LABEL
    for label, first in [(-1, 0), (0, 1), (MAX_LABEL + 1, 0)]:
        with pytest.raises(BrokenImageError, match=f"its label {label} is not in {first}"):
            check_label(label, first)


def test_pixels_are_fitted_as_those_of_a_file_are(tmp_path, rng):
    pixels = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for resolution in (7, 20, 33):
        assert np.array_equal(fit(pixels, resolution), read_image(tmp_path / "image.png", resolution).numpy())
    square = pixels[:, :20]
    fitted = fit(square, 20)
    assert np.array_equal(fitted, square.transpose(2, 0, 1)) and fitted.flags.c_contiguous


def test_fingerprints():
    assert fingerprint_of(["ab", "c"]) != fingerprint_of(["a", "bc"]) != fingerprint_of(["\udcff"])
    assert fingerprint_of(["a", 1]) == fingerprint_of(["a", "1"])


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match="nothing cannot be opened: No such file"):
        start_of(str(tmp_path / "nothing"))

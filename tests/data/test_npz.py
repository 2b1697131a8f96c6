"""Samples in .npz files, in both common forms."""

import numpy as np
import pytest

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("x", "y")])
@pytest.mark.parametrize("channels_first", [False, True])
def test_images_and_labels(tmp_path, rng, names, channels_first):
    images = rng.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 1, 2])
    stored = images.transpose(0, 3, 1, 2) if channels_first else images
    np.savez(tmp_path / "a.npz", **{names[0]: stored, names[1]: labels})
    data = open_dataset(f"npz:{tmp_path / 'a.npz'}", resolution=None)
    assert data.resolution == 6 and data.class_names == ["0", "1", "2"] and data.labels.tolist() == labels.tolist()
    assert all(
        np.array_equal(image.permute(1, 2, 0).numpy(), row) for (image, _), row in zip(data, images, strict=True)
    )
    assert open_dataset(data.name, resolution=3, num_classes=0)[1][0].shape == (3, 3, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"must hold arr_0 or x, uint8 of .*; it holds mu$"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"it holds float64 of \(2, 4, 4, 3\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3)}, r"2 images and labels of \(3,\)"),
        (
            {"arr_0": np.zeros((1, 4, 4, 3), np.uint8), "arr_1": np.array([0.5])},
            "its label '0.5' is not a whole number",
        ),
        ({"arr_0": np.array([object()])}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_other_contents(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_dataset(f"npz:{tmp_path / 'a.npz'}", resolution=4)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 cut")
    for name, message in (("a.npz", "cannot be read"), ("b.npz", "cannot be read: No such file")):
        with pytest.raises(InputError, match=message):
            open_dataset(f"npz:{tmp_path / name}", resolution=4)

"""The check finds every byte that changed, and names what is wrong."""

import json

import numpy as np
import pytest

import sagan_fast.data.packed_writer as writer
from sagan_fast.data.packed import new_digest
from sagan_fast.data.packed_check import check
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


@pytest.fixture
def packed(image_folder, tmp_path, monkeypatch):
    """A packed set of 16 images and one broken, in checksummed blocks of three."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3 * 64 * 3)
    (image_folder / "cat" / "broken.png").write_bytes(b"")
    prepare(open_source(str(image_folder)), tmp_path / "out", resolution=8, num_workers=0, on_broken="skip")
    return tmp_path / "out"


def change(path, offset, by=1):
    content = bytearray(path.read_bytes())
    content[offset] = (content[offset] + by) % 256
    path.write_bytes(content)


def rewrite(packed, **values):
    content = json.loads((packed / "manifest.json").read_text())
    for key, value in values.items():
        content[key] = value(content[key])
    (packed / "manifest.json").write_text(json.dumps(content))


def wrong(packed):
    with pytest.raises(InputError) as caught:
        check(packed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_set(packed):
    seen = []
    assert check(packed, on_progress=lambda progress: seen.append(progress.images)).num_images == 16
    assert seen == [3, 6, 9, 12, 15, 16]


def test_every_single_pixel_counts(packed, rng):
    for offset in [4096, 4096 + 16 * 192 - 1, *(4096 + rng.integers(0, 16 * 192, 6)).tolist()]:
        change(packed / "images.npy", offset, 1)
        first = (offset - 4096) // 192 // 3 * 3
        assert f"1 of 6 blocks of images have a wrong checksum (images {first}-{min(first + 2, 15)})" in wrong(packed)
        change(packed / "images.npy", offset, -1)
    check(packed)


def test_all_that_is_wrong_is_named(packed):
    change(packed / "images.npy", 4096)
    change(packed / "labels.npy", 128)
    (packed / "broken.txt").unlink()
    message = wrong(packed)
    for part in (
        "images 0-2", "labels.npy has a wrong checksum", "broken.txt has 0 lines for 1 broken images",
        "2 classes have other numbers of images than it states (cat, dög 2)",
    ):  # fmt: skip
        assert part in message


def test_labels_out_of_range(packed):
    labels = np.load(packed / "labels.npy")
    labels[[3, 9]] = 2, -1
    np.save(packed / "labels.npy", labels)
    rewrite(packed, checksums=lambda c: {**c, "labels": new_digest(labels.tobytes()).hexdigest()})
    assert "damaged: 2 labels are not in 0..1, the first of image 3" in wrong(packed)


def test_files_that_are_missing_or_short(packed):
    (packed / "labels.npy").unlink()
    (packed / "images.npy").write_bytes((packed / "images.npy").read_bytes()[:-5])
    message = wrong(packed)
    assert "labels.npy cannot be read" in message and "images.npy is damaged: it must have 7168 bytes" in message


def test_a_manifest_that_contradicts_itself(packed):
    rewrite(
        packed,
        class_counts=lambda counts: [*counts, 4],
        num_broken=lambda number: 3,
        checksums=lambda c: {**c, "images": c["images"][:-1]},
    )
    message = wrong(packed)
    for part in (
        "its classes have 20 images, the set has 16", "it has 3 class counts and 2 class names",
        "it has 5 checksums for 16 images in blocks of 3", "16 images and 3 broken ones are not 17 items",
    ):  # fmt: skip
        assert part in message


def test_no_set(tmp_path):
    with pytest.raises(InputError, match="holds no packed set"):
        check(tmp_path)

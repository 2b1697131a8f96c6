"""What a training sees depends on its seed and the place of the sample alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from face_pictures import drawn_picture

from sagan_fast.data.loader import epoch_order
from sagan_fast.errors import InputError
from sagan_fast.faces.samples import Samples, batches
from sagan_fast.faces.wider import Picture


@pytest.fixture
def pictures(rng):
    return [Picture(Path("drawn"), faces, pixels) for pixels, faces in (drawn_picture(rng, 96) for _ in range(3))]


@pytest.fixture
def gone(tmp_path):
    return Picture(tmp_path / "gone.jpg", np.array([[1, 2, 30, 40]], np.float32))


def test_samples_depend_on_seed_and_place_alone(pictures):
    a, b, c = (Samples(pictures, 64, seed) for seed in (1, 1, 2))
    b[0]
    assert torch.equal(a[5][0], b[5][0]) and not torch.equal(a[5][0], c[5][0])


def test_an_epoch_takes_each_picture_once(pictures, monkeypatch):
    seen = []
    monkeypatch.setattr(Picture, "read", lambda self: seen.append(id(self)) or self.pixels)
    samples = Samples(pictures, 32, 7)
    for epoch in range(3):
        seen.clear()
        for place in range(3):
            samples[3 * epoch + place]
        assert sorted(seen) == sorted(id(picture) for picture in pictures)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_any_step_with_any_number_of_processes(pictures, workers):
    samples = Samples(pictures, 64, 3)
    found = list(batches(samples, 2, 1, 4, workers, pytest.fail))
    assert [images.shape for images, _ in found] == [(2, 3, 64, 64)] * 3
    for step, (images, faces) in enumerate(found, 1):
        for place, (image, boxes) in enumerate(zip(images, faces, strict=True)):
            expected = samples[2 * step + place]
            assert torch.equal(image, expected[0]) and torch.equal(boxes, expected[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_another_picture_for_one_that_is_gone(pictures, gone, workers):
    pictures = [pictures[0], gone, pictures[1]]
    said = []
    found = list(batches(Samples(pictures, 64, 0, "skip"), 3, 0, 4, workers, said.append))
    assert len(found) == 4 and said == [f"left out: {gone.path} cannot be read: No such file or directory"]
    index = list(epoch_order(3, 0, 0)).index(1)
    whole = Samples([pictures[0], pictures[2], pictures[2]], 64, 0)
    assert torch.equal(found[0][0][index], whole[index][0])  # the next in the list


def test_only_pictures_that_are_gone(gone):
    for count, tried in ((2, 2), (300, 100)):
        with pytest.raises(InputError, match=f"{tried} pictures in a row could not be read; the first: .*gone.jpg"):
            Samples([gone] * count, 64, 0, "skip")[0]

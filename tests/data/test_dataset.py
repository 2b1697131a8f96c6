"""Broken images skipped: named once, counted, always replaced by the same image of the class."""

import logging

import numpy as np
import pytest
import torch

from sagan_fast.data.dataset import MAX_BROKEN_IN_A_ROW, ImageDataset, match_classes
from sagan_fast.errors import InputError


class Numbers(ImageDataset):
    """Image i is filled with i; those in `bad` are broken."""

    def __init__(self, labels, bad=(), on_broken="skip", class_names=("a", "b")):
        super().__init__(
            "numbers", resolution=2, class_names=class_names, labels=np.array(labels, np.int64), on_broken=on_broken
        )
        self.bad = set(bad)

    def load(self, index):
        if index in self.bad:
            raise InputError(f"{index}.png cannot be read: bad luck")
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


def value(data, index):
    image, label = data[index]
    return image.unique().item(), label


def test_next_readable_image_of_the_same_class_replaces_a_broken_one():
    data = Numbers([0, 1, 0, 1, 0, 1], bad=[0, 5])
    assert [value(data, i) for i in range(6)] == [(2, 0), (1, 1), (2, 0), (3, 1), (4, 0), (1, 1)]
    assert data.num_broken == 2
    assert value(Numbers([0, 1, 0, 1, 0, 1], bad=[0, 5]), 5) == (1, 1)  # whatever was read before
    assert value(data, -1) == (1, 1)


def test_several_broken_in_a_row_and_each_is_logged_once(caplog):
    data = Numbers([0] * 5, bad=[1, 2])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert [value(data, i)[0] for i in range(5)] == [0, 3, 3, 3, 4]
    assert data.num_broken == 2
    assert caplog.text.count("1.png cannot be read: bad luck") == caplog.text.count("2.png cannot be read") == 1


def test_without_classes_any_image_may_replace():
    data = Numbers([0, 1, 0], bad=[0], class_names=())
    assert value(data, 0) == (1, 0) and data.num_classes == 0


def test_fail_raises_and_counts_nothing():
    data = Numbers([0, 0], bad=[1], on_broken="fail")
    with pytest.raises(InputError, match=r"^1\.png cannot be read: bad luck$"):
        data[1]
    assert data.num_broken == 0


def test_whole_class_broken():
    with pytest.raises(InputError, match=r"numbers: 2 images in a row could not be read; the first: 1\.png cannot"):
        Numbers([0, 1, 1], bad=[1, 2])[1]


def test_lost_disk_ends_soon():
    data = Numbers([0] * 1000, bad=range(1000))
    with pytest.raises(InputError, match=f"{MAX_BROKEN_IN_A_ROW} images in a row could not be read"):
        data[7]
    assert data.num_broken == MAX_BROKEN_IN_A_ROW


def test_match_classes():
    assert match_classes("x", ["a", "b"], None) == match_classes("x", ("a", "b"), 2) == ["a", "b"]
    assert match_classes("x", ["a", "b"], 0) == []
    with pytest.raises(InputError, match=r"x has 6 classes \(0, 1, 2, 3, \.\.\.\), but the model is made for 2"):
        match_classes("x", list("012345"), 2)


def test_a_fingerprint_changes_with_pixels_labels_names_and_kind():
    class Others(Numbers):
        pass

    class Brighter(Numbers):
        def load(self, index):
            return super().load(index) + 1

    Brighter.__name__ = "Numbers"
    one = Numbers([0, 1, 1])
    assert one.fingerprint() == Numbers([0, 1, 1]).fingerprint() and len(one.fingerprint()) == 64
    others = [Numbers([0, 0, 1]), Numbers([0, 1, 1], class_names=("a", "c")), Others([0, 1, 1]), Brighter([0, 1, 1])]
    assert len({data.fingerprint() for data in [one, *others]}) == 5
    assert "largest centred square" in one.preprocessing

"""Folders as a source are what `folder:PATH` is."""

import pytest

from sagan_fast.data import open_dataset
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


def test_images_labels_and_order_are_those_of_the_data_set(image_folder):
    source, data = open_source(str(image_folder)), open_dataset(f"folder:{image_folder}", resolution=9)
    items = list(source.items())
    assert len(items) == source.num_items == source.total == len(data) == 16
    assert source.class_names == data.class_names == ["cat", "dög 2"]
    for i, item in enumerate(items):
        image, label = source.read(item, 9)
        assert (image == data[i][0].numpy()).all() and label == data[i][1]
        assert source.name_of(item) == data.path_of(i) and source.position(item) == i + 1


def test_fingerprint_knows_names_not_contents(image_folder):
    before = open_source(str(image_folder)).fingerprint()
    assert open_source(f"{image_folder}/").fingerprint() == before
    stamp = open_source(str(image_folder)).stamp(2)
    (image_folder / "cat" / "gray.jpg").write_bytes(b"repaired")
    assert open_source(str(image_folder)).fingerprint() == before
    assert open_source(str(image_folder)).stamp(2) != stamp
    (image_folder / "cat" / "gray.jpg").rename(image_folder / "cat" / "grey.jpg")
    assert open_source(str(image_folder)).fingerprint() != before


def test_labels_of_folders_have_no_first(image_folder):
    with pytest.raises(InputError, match="--first-label is for labels in files"):
        open_source(str(image_folder), first_label=1)


def test_an_empty_class_is_refused(image_folder):
    (image_folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"1 of its 3 class folders \(empty\) has no JPEG"):
        open_source(str(image_folder))

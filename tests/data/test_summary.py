"""What is said of a set before it is used."""

import numpy as np

from sagan_fast.data import open_dataset
from sagan_fast.data.summary import described, pictured, record, split_of, summary


def test_lines_of_a_set_with_classes():
    names = [f"n{i}" for i in range(12)]
    assert described(names, [5, *[7] * 10, 3], "sub-folders", {".txt": 2, "hidden": 1}) == [
        "labels from sub-folders: 12 classes, 0 n0, 1 n1, 2 n2, 3 n3, 4 n4, ...",
        "3 (n11) to 7 (n1) images a class",
        "passed over: 2 .txt, 1 hidden",
    ]
    assert summary(open_dataset("shapes", resolution=16))[1] == "500 images in each class"


def test_the_part_by_its_name():
    names = ["folder:/a/imagenet/train", "packed:imagenet-val-128", "folder:/train/pets", "folder:/a/trained", "shapes"]
    assert [split_of(name) for name in names] == ["train", "val", "train", "", ""]
    data = open_dataset("shapes", resolution=16)
    data.name, data.passed_over = "folder:tiny/val", {".txt": 2}
    assert summary(data)[0] == "by its name it is the part val of a set"
    found = record(data)
    assert found["split"] == "val" and found["classes"]["circle"] == 500 and found["passed_over"] == {".txt": 2}


def test_lines_of_a_set_without():
    assert described([], [], "nothing: no labels", {}) == ["no labels are read"] and described([], [], "", {}) == []


def test_pictures_show_each_class_by_its_own_images(rng):
    data = open_dataset("shapes", resolution=16)
    data.labels = rng.permutation(data.labels)
    indices, names = pictured(data)
    assert indices.shape == (5, 8) and names[0] == "0 circle" and names[-1] == "9 four dots"
    for row, name in zip(indices, names, strict=True):
        assert len(set(row.tolist())) == 8 and {data.class_names[data.labels[i]] for i in row} == {
            name.split(" ", 1)[1]
        }
    data.labels = np.where(np.arange(5000) < 3, 0, np.maximum(data.labels, 1))
    assert sorted(set(pictured(data)[0][0].tolist())) == [0, 1, 2]
    flat = open_dataset("shapes", resolution=16, num_classes=0)
    indices, names = pictured(flat)
    assert indices.shape == (5, 8) and names == [""] * 5 and len(set(indices.reshape(-1).tolist())) == 40

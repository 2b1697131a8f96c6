"""Every form of a label means one class, and what is no label is refused."""

import json

import numpy as np
import pytest

from sagan_fast.data.labels import class_number, counted_from, label_in_json, read_label_file
from sagan_fast.errors import InputError


@pytest.mark.parametrize(
    "value",
    [
        2, 2.0, "2", " 2\n", "+2", "2.0", b"2", [2], (2.0,), np.int64(2), np.float32(2), np.uint8([2]),
        [0, 0, 1, 0], [0.0, 0.0, 1.0], np.array([False, False, True]), np.eye(5, dtype=np.float32)[2],
    ],
)  # fmt: skip
def test_forms_of_class_two(value):
    assert class_number(value) == counted_from(value, 0) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.7, "its label '0.7' is not a whole number"),
        (float("nan"), "its label 'nan' is not a whole number"),
        (np.float32("inf"), "its label 'inf' is not a whole number"),
        ("1_0", "its label '1_0' is not a whole number"),
        ("cat", "its label 'cat' is not a whole number"),
        ("", "is not a whole number"),
        ("٣", "is not a whole number"),
        (True, "is not a whole number"),
        (None, "is not a whole number"),
        ({"a": 1}, "is not a whole number"),
        ([], "vector of 0 numbers that is not one-hot"),
        ([0, 0], "vector of 2 numbers that is not one-hot"),
        ([0, 1, 1], "not one-hot"),
        ([0.3, 0.7], "not one-hot"),
        ([0, 2], "not one-hot"),
        (["a", "b"], "not one-hot"),
        (-1, r"its label -1 is not in 0\.\.1000000"),
        ("99999999999999999999", r"is not in 0\.\.1000000"),
    ],
)
def test_what_is_no_class(value, message):
    with pytest.raises(ValueError, match=message):
        counted_from(value, 0)


def test_one_hot_is_counted_from_zero_whatever_the_numbers_are():
    assert counted_from(1, 1) == 0 and counted_from([0, 1], 1) == 1
    with pytest.raises(ValueError, match=r"its label 0 is not in 1\.\."):
        counted_from(0, 1)


def test_json_of_one_image():
    assert label_in_json({"width": 3, "class_id": 4}) == 4 and label_in_json({"cls": None, "label": [3]}) == [3]
    assert label_in_json({"width": 3}) is None and label_in_json([3]) is None


def read(name, text):
    return read_label_file(name, text.encode() if isinstance(text, str) else text)


def test_label_files():
    listed = {"labels": [["00000/img00000000.png", 6], ["00001/img1.png", [0, 1]], ["a.png", 3.0]]}
    assert read("dataset.json", json.dumps(listed)) == {
        "00000/img00000000.png": "6", "00001/img1.png": "1", "a.png": "3",
    }  # fmt: skip
    assert read("dataset.json", '{"labels": null}') == {} and read("dataset.json", '{"name": "x"}') is None
    assert read("metadata.csv", "\ufefffile_name,text,label\n./a.png,\"x, y\",dog\nb.png,z,cat\n") == {
        "a.png": "dog", "b.png": "cat",
    }  # fmt: skip
    assert read("metadata.csv", "file_name,text\na.png,x\n") is None
    lines = [{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "0"}]
    assert read("metadata.jsonl", "\n".join(map(json.dumps, lines))) == {"a.png": "1", "b.png": "0"}
    assert read("val_annotations.txt", "val_0.JPEG\tn03444034\t0\t32\t44\t62\n") == {"val_0.JPEG": "n03444034"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na.png,0.5\n", r"metadata\.csv, a\.png: its label '0\.5' is not a whole"),
        ("metadata.csv", "file_name,label\na.png,1\nb.png,cat\n", r"b\.png: its label 'cat' is not a whole number"),
        ("metadata.csv", "file_name,label\na.png,nan\n", "its label 'nan' is not"),
        ("metadata.csv", "file_name,label\na.png\n", r"a\.png: its label 'None' is not"),
        ("metadata.csv", "file_name,label\n,3\n", "1 line without the name of an image"),
        ("metadata.csv", b"\xff\xfe\x00", r"metadata\.csv cannot be read as a list of labels"),
        ("dataset.json", "{", r"dataset\.json cannot be read as a list of labels"),
        ("dataset.json", '{"labels": [["a.png", [0.5, 0.5]]]}', "a vector of 2 numbers that is not one-hot"),
        ("dataset.json", '{"labels": [3]}', "cannot be read as a list of labels"),
        ("val_annotations.txt", "a.png\n", "cannot be read as a list of labels"),
    ],
)
def test_label_files_that_are_refused(name, text, message):
    with pytest.raises(InputError, match=message):
        read(name, text)

"""Where the labels of a folder are: each known layout read right, and no label dropped without a line."""

import json

import pytest
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError


def make(root, *names, **texts):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def open_folder(path, **options):
    return open_dataset(f"folder:{path}", resolution=4, **options)


def labels_of(data):
    """The class name of each image by its path."""
    names = data.class_names or ["-"]
    return {data.path_of(i).removeprefix(f"{data.root}/"): names[label] for i, label in enumerate(data.labels)}


def test_stylegan_chunks_are_no_classes_and_dataset_json_has_the_labels(tmp_path):
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]
    make(tmp_path, *names)
    with pytest.raises(InputError, match=r"seems to be StyleGAN's: its folders \(00000, 00001\) are chunks, not"):
        open_folder(tmp_path)
    wanted = dict(zip(names, ["10", "2", "10"], strict=True))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[n, int(label)] for n, label in wanted.items()]}))
    data = open_folder(tmp_path)
    assert labels_of(data) == wanted and data.class_names == ["2", "10"] and data.labels_from == "dataset.json"
    assert not data.passed_over
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert labels_of(open_folder(tmp_path)) == dict.fromkeys(names, "-")
    assert len(open_folder(tmp_path, num_classes=0)) == 3


def test_metadata_beside_images(tmp_path):
    make(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,dog\nsub/b.png,cat\ngone.png,cat\n")
    data = open_folder(tmp_path, num_classes=2)
    assert labels_of(data) == {"a.png": "dog", "sub/b.png": "cat"} and data.class_names == ["cat", "dog"]
    assert data.passed_over == {"line of metadata.csv without its image": 1}
    assert open_folder(tmp_path, unlabelled=True).num_classes == 0
    make(tmp_path, "new.png")
    with pytest.raises(InputError, match=r"metadata\.csv has no label for 1 of 3 images \(new\.png\): add or remove"):
        open_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 1}\n')
    with pytest.raises(InputError, match=r"has labels in metadata\.csv and metadata\.jsonl: remove all but one"):
        open_folder(tmp_path)


def test_metadata_against_class_folders(tmp_path):
    make(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/a.png,1\ndog/b.png,0\n")
    assert labels_of(open_folder(tmp_path)) == {"cat/a.png": "1", "dog/b.png": "0"}
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/a.png,1\ndog/b.png,1\n")
    with pytest.raises(InputError, match=r"has class folders \(cat, dog\) and other labels in metadata\.csv: keep one"):
        open_folder(tmp_path)


def test_the_original_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        make(root, f"train/{name}/images/{name}_0.png", f"train/{name}/images/{name}_1.png")
        (root / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.png\t0\t0\t3\t3\n")
    make(root, "val/images/val_0.png", "val/images/val_1.png", "test/images/test_0.png")
    (root / "val/val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t3\t3\nval_1.png\tn01\t0\t0\t3\t3\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    train = open_folder(root / "train")
    assert train.class_names == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1]
    assert train.passed_over == {".txt": 2}
    val = open_folder(root / "val", num_classes=2)
    assert labels_of(val) == {"images/val_0.png": "n02", "images/val_1.png": "n01"}
    assert val.class_names == train.class_names and val.labels_from == "val_annotations.txt"
    assert open_folder(root / "test").num_classes == open_folder(root / "train/n01").num_classes == 0
    ordered = open_folder(root / "train", classes=str(root / "wnids.txt"))
    assert ordered.class_names == ["n02", "n01"] and ordered.labels.tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match=r"its folders \(test, train, val\) are parts .*; give folder:\S+train$"):
        open_folder(root)


@pytest.mark.parametrize("name", ["labels.csv", "list_attr_celeba.txt", "sub/annotations.json", "1.cls", "1.json"])
def test_what_looks_like_a_label_is_not_passed_over(tmp_path, name):
    make(tmp_path, "1.png", "2.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("0")
    with pytest.raises(InputError, match=rf"{name} looks like labels .*--unlabelled true reads the images without"):
        open_folder(tmp_path)
    assert len(open_folder(tmp_path, unlabelled=True)) == len(open_folder(tmp_path, num_classes=0)) == 2


def test_unlabelled_takes_class_folders_too(tmp_path):
    make(tmp_path, "a/1.png", "b/c/2.png", "3.png")
    data = open_folder(tmp_path, unlabelled=True)
    assert data.class_names == [] and set(labels_of(data)) == {"3.png", "a/1.png", "b/c/2.png"}
    with pytest.raises(InputError, match="the model has 2 classes"):
        open_folder(tmp_path, unlabelled=True, num_classes=2)

"""A tiny archive in CIFAR-10's pickle format, its checksums put in place of the real ones."""

import hashlib
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def archive(tmp_path, monkeypatch, rng):
    """A folder with cifar-10-batches-py of 5 batches of 4 images, and those images as (20, 32, 32, 3)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = [
        write(
            f"data_batch_{i + 1}",
            {"data": pixels[4 * i : 4 * i + 4].reshape(4, -1), "labels": labels[4 * i : 4 * i + 4]},
        )
        for i in range(5)
    ]
    test = [write("test_batch", {"data": pixels[:1].reshape(1, -1), "labels": [0]})]
    meta = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path, pixels, labels


@pytest.mark.parametrize("inside", [False, True])
def test_images_and_labels(archive, inside):
    path, pixels, labels = archive
    data = open_dataset(f"cifar10:{path / 'cifar-10-batches-py' if inside else path}", resolution=32, num_classes=10)
    assert len(data) == 20 and data.class_names == NAMES
    assert open_dataset(data.name, resolution=None).resolution == 32
    for index in range(20):
        image, label = data[index]
        assert np.array_equal(image.numpy(), pixels[index]) and label == labels[index]


def test_cifar_100_has_its_fine_classes(tmp_path, monkeypatch, rng):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class {i:02}" for i in range(100)]

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    rows = {"data": pixels.reshape(6, -1), "fine_labels": [7, 99, 0, 3, 3, 50], "coarse_labels": [0] * 6}
    monkeypatch.setattr(CIFAR100, "train_list", [write("train", rows)])
    monkeypatch.setattr(CIFAR100, "test_list", [write("test", rows)])
    meta = write("meta", {"fine_label_names": names, "coarse_label_names": ["x"]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": meta[0], "key": "fine_label_names", "md5": meta[1]})
    data = open_dataset(f"cifar100:{tmp_path}", resolution=32, num_classes=100)
    assert data.class_names == names and data.labels.tolist() == [7, 99, 0, 3, 3, 50]
    assert all(np.array_equal(image.numpy(), row) for (image, _), row in zip(data, pixels, strict=True))
    with pytest.raises(InputError, match=r"cifar100:\S+ holds no folder cifar-100-python: unpack cifar-100"):
        open_dataset(f"cifar100:{tmp_path / 'nowhere'}", resolution=32)


def test_resized_and_unconditional(archive):
    data = open_dataset(f"cifar10:{archive[0]}", resolution=16, num_classes=0)
    image, label = data[2]
    assert image.shape == (3, 16, 16) and label == 0 and data.num_classes == 0
    pooled = archive[1][2].reshape(3, 16, 2, 16, 2).mean((2, 4))
    assert np.corrcoef(image.numpy().ravel(), pooled.ravel())[0, 1] > 0.8


def test_missing_archive(tmp_path):
    with pytest.raises(InputError, match=r"holds no folder cifar-10-batches-py: unpack cifar-10-python.tar.gz there"):
        open_dataset(f"cifar10:{tmp_path}", resolution=32)


def test_damaged_archive(archive):
    (archive[0] / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(InputError, match="lacks a file, or its checksum is wrong: unpack .* again"):
        open_dataset(f"cifar10:{archive[0]}", resolution=32)


def test_wrong_number_of_classes(archive):
    with pytest.raises(InputError, match=r"has 10 classes \(airplane, .*made for 20: .*`--num-classes 10`"):
        open_dataset(f"cifar10:{archive[0]}", resolution=32, num_classes=20)

"""Packed sets as data sets: the very batches of the folder they come from, and sentences for what is not one."""

import itertools
import json
import pickle
import threading

import numpy as np
import pytest
import torch

from sagan_fast.data import batches, open_dataset
from sagan_fast.data.packed import HEADER_BYTES, header
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


@pytest.fixture
def packed(image_folder, tmp_path):
    """The path of a packed set of `image_folder` at 8x8."""
    prepare(open_source(str(image_folder)), tmp_path / "packed", resolution=8, num_workers=0)
    return tmp_path / "packed"


def equal(a, b):
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("num_classes", [2, 0])
def test_batches_are_those_of_the_folder(image_folder, packed, num_workers, num_classes):
    sets = [
        open_dataset(f"{kind}:{path}", resolution=8, num_classes=num_classes)
        for kind, path in (("folder", image_folder), ("packed", packed))
    ]
    assert len(sets[0]) == len(sets[1]) == 16 and sets[0].class_names == sets[1].class_names
    options = {"batch_size": 5, "seed": 3, "start": 7, "rank": 1, "world_size": 2}
    folder = batches(sets[0], **options)
    stream = batches(sets[1], num_workers=num_workers, **options)
    pairs = list(itertools.islice(zip(folder, stream, strict=True), 9))
    assert all(equal(theirs, ours) for theirs, ours in pairs)
    assert any(labels.any() for _, (_, labels) in pairs) == bool(num_classes)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(*sets, strict=True))


def test_resumption_and_ranks(packed):
    data = open_dataset(f"packed:{packed}", resolution=8)
    straight = list(itertools.islice(batches(data, batch_size=6, seed=1, num_workers=2), 8))
    resumed = list(itertools.islice(batches(data, batch_size=6, seed=1, start=18, num_workers=3), 5))
    assert all(equal(a, b) for a, b in zip(straight[3:], resumed, strict=True))
    parts = [
        list(itertools.islice(batches(data, batch_size=2, seed=1, rank=r, world_size=3, num_workers=1), 8))
        for r in range(3)
    ]
    for whole, *shares in zip(straight, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(share[0], whole[0][rank::3]) and torch.equal(share[1], whole[1][rank::3])


def test_threads_end_with_the_stream(packed):
    before = threading.active_count()
    stream = batches(open_dataset(f"packed:{packed}", resolution=8), batch_size=4, seed=0, num_workers=2)
    next(stream)
    assert before < threading.active_count() <= before + 2  # the pool starts no thread while another is idle
    stream.close()
    assert threading.active_count() == before and list(stream) == []


def test_batches_own_their_memory(packed):
    stream = batches(open_dataset(f"packed:{packed}", resolution=8), batch_size=16, seed=0, num_workers=2)
    first = next(stream)[0]
    kept = first.clone()
    first_again = [next(stream)[0].fill_(0) for _ in range(6)]
    assert torch.equal(first, kept) and kept.any() and len(first_again) == 6
    assert next(stream)[0].any()  # nor was the file written to


def test_numpy_reads_it(packed):
    images, labels = np.load(packed / "images.npy", mmap_mode="r"), np.load(packed / "labels.npy")
    data = open_dataset(f"packed:{packed}", resolution=8)
    assert images.shape == (16, 3, 8, 8) and images.offset == HEADER_BYTES == 4096
    assert np.array_equal(images[11], data[11][0].numpy()) and labels.tolist() == [0] * 8 + [1] * 8
    assert header(10**12, 2**20)[-1:] == b"\n" and len(header(10**12, 2**20)) == 4096


def test_it_can_be_sent_to_a_spawned_worker(packed):
    data = open_dataset(f"packed:{packed}", resolution=8)
    text = pickle.dumps(data)
    assert len(text) < 16 * 3 * 64 + 4000 and torch.equal(pickle.loads(text)[3][0], data[3][0])


@pytest.mark.gpu
def test_pinned_batches(packed):
    data = open_dataset(f"packed:{packed}", resolution=8)
    plain = batches(data, batch_size=8, seed=0)
    for num_workers in (0, 2):
        images, labels = next(batches(data, batch_size=8, seed=0, num_workers=num_workers, pin_memory=True))
        assert images.is_pinned() and labels.is_pinned() and images.cuda(non_blocking=True).shape == (8, 3, 8, 8)
    assert torch.equal(images, next(plain)[0])


def test_other_resolution(packed):
    with pytest.raises(
        InputError, match=r"holds images of 8x8, and 16x16 are wanted: .*prepare \S+images \S+packed-16 --size 16`"
    ):
        open_dataset(f"packed:{packed}", resolution=16)


def test_other_number_of_classes(packed):
    with pytest.raises(InputError, match=r"has 2 classes \(cat, dög 2\), but the model is made for 10"):
        open_dataset(f"packed:{packed}", resolution=8, num_classes=10)


def test_class_without_images(packed):
    content = json.loads((packed / "manifest.json").read_text())
    content["class_names"], content["class_counts"] = ["none", *content["class_names"]], [0, 8, 8]
    (packed / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 of its 3 classes \(none\) have no images: .*--first-label 1"):
        open_dataset(f"packed:{packed}", resolution=8)
    assert len(open_dataset(f"packed:{packed}", resolution=8, num_classes=0)) == 16


def test_what_is_no_packed_set(tmp_path, image_folder):
    def message(path):
        with pytest.raises(InputError) as caught:
            open_dataset(f"packed:{path}", resolution=8)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "holds no packed set" in message(image_folder) and "sagan-fast prepare SRC" in message(image_folder)
    (tmp_path / "file").write_text("")
    assert "is a file" in message(tmp_path / "file")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "progress.jsonl").write_text("{}\n")
    assert "is not finished: run the same" in message(tmp_path / "begun")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", lambda b: b[:-20], r"manifest\.json is damaged: it is not JSON"),
        ("manifest.json", lambda b: b"[]", r"manifest\.json is not the manifest of a packed set"),
        (
            "manifest.json",
            lambda b: b.replace(b'"version": 1', b'"version": 2'),
            r"is of version 2, .* reads version 1",
        ),
        ("manifest.json", lambda b: b.replace(b'"checksums"', b'"sums"'), r"is damaged: it has no checksums"),
        ("manifest.json", lambda b: b.replace(b'"num_images": 16', b'"num_images": "16"'), r"are not of the kinds"),
        ("manifest.json", lambda b: b.replace(b'"images_per_block": ', b'"images_per_block": -'), r"not of the kinds"),
        ("manifest.json", lambda b: b.replace(b'"source": {', b'"source": 3, "x": {'), r"are not of the kinds"),
        ("images.npy", lambda b: b[:-1], r"images\.npy is damaged: it must have 7168 bytes, and has 7167"),
        ("images.npy", lambda b: b"\0" + b[1:], r"images\.npy is damaged: its header is not that of"),
        ("images.npy", None, r"images\.npy cannot be read: No such file"),
        ("labels.npy", lambda b: b[:-1], r"labels\.npy cannot be read"),
        ("labels.npy", lambda b: b"", r"labels\.npy cannot be read"),
        ("labels.npy", None, r"labels\.npy cannot be read: No such file"),
    ],
)
def test_damaged_sets(packed, name, damage, message):
    path = packed / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(f"packed:{packed}", resolution=8)
    assert "\n" not in str(caught.value)


def test_it_says_what_it_is(image_folder, packed, tmp_path):
    data = open_dataset(f"packed:{packed}", resolution=None)
    assert data.resolution == 8 and data.preprocessing == data.manifest.transform
    prepare(open_source(str(image_folder)), tmp_path / "again", resolution=8, num_workers=0)
    assert open_dataset(f"packed:{tmp_path / 'again'}", resolution=None).fingerprint() == data.fingerprint()
    prepare(open_source(str(image_folder / "cat")), tmp_path / "cat", resolution=8, num_workers=0)
    assert open_dataset(f"packed:{tmp_path / 'cat'}", resolution=None).fingerprint() != data.fingerprint()

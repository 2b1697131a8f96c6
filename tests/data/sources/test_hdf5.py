"""HDF5 files as BigGAN-PyTorch and both generations of StudioGAN write them."""

import pickle
import sys

import numpy as np
import pytest

from sagan_fast.data import open_dataset
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError

h5py = pytest.importorskip("h5py")


def write(path, images, labels, step=7, **options):
    """Write as their make_hdf5.py do: batches appended to resizable, chunked arrays."""
    with h5py.File(path, "w") as file:
        for name, data in (("imgs", images), ("labels", labels)):
            if data is None:
                continue
            stored = file.create_dataset(
                name, data[:step].shape, data.dtype, maxshape=data.shape, chunks=(5, *data.shape[1:]), **options
            )
            stored[...] = data[:step]
            for start in range(step, len(data), step):
                stored.resize(min(start + step, len(data)), axis=0)
                stored[start : start + step] = data[start : start + step]
    return path


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (23, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def labels(rng):
    return np.concatenate([np.arange(4), rng.integers(0, 4, 19)])


@pytest.mark.parametrize("options", [{}, {"compression": "lzf"}])
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_and_labels_come_through(tmp_path, images, labels, channels_first, options, num_workers):
    stored = images if channels_first else images.transpose(0, 2, 3, 1)
    path = write(tmp_path / "ILSVRC8.hdf5", stored, labels, **options)
    source = open_source(str(path))
    assert source.kind == "hdf5" and source.num_items == 23 and source.items_per_task == 5
    manifest = prepare(source, tmp_path / "out", resolution=8, num_workers=num_workers)
    assert manifest.class_names == ["0", "1", "2", "3"]
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    assert np.array_equal(np.stack([image.numpy() for image, _ in data]), images)
    assert np.array_equal(data.labels, labels)


def test_other_sizes_are_resized_as_images_are(tmp_path, images, labels):
    from sagan_fast.data.sources.base import fit

    prepare(open_source(str(write(tmp_path / "a.h5", images, labels))), tmp_path / "out", resolution=5, num_workers=0)
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=5)
    for (image, _), whole in zip(data, images, strict=True):
        assert np.array_equal(image.numpy(), fit(whole.transpose(1, 2, 0), 5))


def test_without_labels(tmp_path, images):
    path = write(tmp_path / "a.h5", images, None)
    assert prepare(open_source(str(path)), tmp_path / "out", resolution=8, num_workers=0).class_names == []


def test_labels_counted_from_one_and_wrong_ones(tmp_path, images, labels):
    path = write(tmp_path / "a.h5", images, labels + 1)
    manifest = prepare(open_source(str(path), first_label=1), tmp_path / "out", resolution=8, num_workers=0)
    assert manifest.class_counts == np.bincount(labels).tolist()
    path = write(tmp_path / "a.h5", images, np.where(np.arange(23) == 6, -5, labels))
    with pytest.raises(InputError, match=r"a\.h5, image 6 cannot be read: its label -5 is not in 0\.\.1000000"):
        prepare(open_source(str(path)), tmp_path / "other", resolution=8, num_workers=0)


def test_columns_vectors_and_floats(tmp_path, images, labels):
    one_hot = np.eye(4)[labels]
    for number, form in enumerate((labels[:, None], one_hot, one_hot > 0, labels.astype(np.float32))):
        source = open_source(str(write(tmp_path / f"{number}.h5", images, form)))
        manifest = prepare(source, tmp_path / str(number), resolution=8, num_workers=0)
        assert manifest.class_counts == np.bincount(labels).tolist()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.7, "its label '0.7' is not a whole number; nothing is packed"),
        (np.nan, "its label 'nan' is not a whole number"),
    ],
)
def test_one_label_that_is_none(tmp_path, images, labels, value, message):
    form = labels.astype(np.float64)
    form[6] = value
    path = write(tmp_path / "a.h5", images, form)
    with pytest.raises(InputError, match=rf"a\.h5, image 6 cannot be read: {message}"):
        prepare(open_source(str(path)), tmp_path / "out", resolution=8, num_workers=0)
    manifest = prepare(open_source(str(path)), tmp_path / "out", resolution=8, num_workers=0, on_broken="skip")
    assert manifest.num_images == 22 and "image 6: its label" in (tmp_path / "out" / "broken.txt").read_text()


def test_labels_that_all_are_none_and_labels_by_another_name(tmp_path, images, labels):
    with pytest.raises(InputError, match=r"no label is a class; of the first image, its label is a vector"):
        open_source(str(write(tmp_path / "a.h5", images, np.full((23, 4), 0.25))))
    path = write(tmp_path / "b.h5", images, None)
    with h5py.File(path, "a") as file:
        file["targets"] = labels
    with pytest.raises(InputError, match=r"b\.h5 has no labels, and it holds targets: .*; --unlabelled true"):
        open_source(str(path))
    source = open_source(str(path), unlabelled=True)
    assert source.class_names == [] and source.passed_over == {"array": 1}


def test_gaps_are_refused_before_the_work(tmp_path, images, labels):
    path = write(tmp_path / "a.h5", images, labels * 2)
    with pytest.raises(InputError, match=r"has labels up to 6, and 3 classes below \(1, 3, 5\) without images: number"):
        open_source(str(path))
    assert open_source(str(path), first_label=0).label_counts[6] > 0


def test_a_damaged_chunk_costs_its_images_only(tmp_path, images, labels):
    path = write(tmp_path / "a.h5", images, labels, fletcher32=True)
    with h5py.File(path, "r") as file:
        offset = file["imgs"].id.get_chunk_info_by_coord((10, 0, 0, 0)).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 3] ^= 1
    path.write_bytes(content)
    manifest = prepare(open_source(str(path)), tmp_path / "out", resolution=8, num_workers=0, on_broken="skip")
    assert manifest.num_images == 18 and manifest.num_broken == 5
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8, num_classes=0)
    assert np.array_equal(data[10][0].numpy(), images[15])
    assert "a.h5, image 10: " in (tmp_path / "out" / "broken.txt").read_text()


def test_a_file_cut_short(tmp_path, images, labels):
    path = write(tmp_path / "a.h5", images, labels)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(InputError, match=r"a\.h5 cannot be opened as HDF5: .*truncated"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 3, 4, 4), np.uint8)}, "must hold imgs, uint8 .* it holds pictures$"),
        ({"imgs": np.zeros((2, 3, 4, 4), np.float32)}, r"it holds imgs, float32 of \(2, 3, 4, 4\)$"),
        ({"imgs": np.zeros((2, 4, 4), np.uint8)}, r"it holds imgs, uint8 of \(2, 4, 4\)$"),
        (
            {"imgs": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(3, int)},
            r"as many labels as imgs, 2, .*\(3,\)",
        ),
    ],
)
def test_other_contents(tmp_path, arrays, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "a.h5"))


def test_without_h5py_the_sentence_says_how_to_get_it(tmp_path, images, labels, monkeypatch):
    path = write(tmp_path / "a.h5", images, labels)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"need the package h5py: pip install 'sagan_fast\[hdf5\]'$"):
        open_source(str(path))


def test_an_open_file_is_not_sent_to_workers(tmp_path, images, labels):
    source = open_source(str(write(tmp_path / "a.h5", images, labels)))
    list(source.read_many([0, 1], 8))
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(20, 8)[0], images[20])

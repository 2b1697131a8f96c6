"""What is kept of a set, and that the cache never answers for another set, size or extractor."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation import statistics
from sagan_fast.evaluation.evaluate import evaluate
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.metrics import Gaussian
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.statistics import Reference, cache_folder, collect
from sagan_fast.evaluation.streams import StoredImages, features_in_order
from shared_by_tests import tiny_extractor_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def extractor(tmp_path):
    return open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))


@pytest.fixture
def folder(tmp_path):
    """Two classes of eight images of 20x20 pixels."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "real" / name / f"{i}.png")
    return tmp_path / "real"


def reference(dataset, extractor, used, **changes):
    def images():
        used.append(dataset.name)
        return StoredImages(dataset, batch_size=5)

    identity = {"data": dataset.fingerprint(), "resolution": dataset.resolution, "extractor": str(extractor.identity)}
    return Reference({**identity, **changes}, images, extractor, keep=6, per_class=True)


def test_collected_statistics_are_those_of_all_features(extractor):
    dataset = open_dataset("shapes", resolution=16)
    images = StoredImages(dataset, 200, batch_size=33)
    rows = torch.cat([features for _, features, _ in features_in_order(images, extractor)])
    seen = {}
    found = collect(images, extractor, keep=50, on_class=lambda *args: seen.update({args[0]: args[1:]}))
    expected = Gaussian.of_rows(rows)
    torch.testing.assert_close(found.gaussian.mean, expected.mean)
    torch.testing.assert_close(
        found.gaussian.factor.T @ found.gaussian.factor, expected.factor.T @ expected.factor, rtol=1e-8, atol=1e-10
    )
    assert found.count == 200 and found.kept.shape == (50, 24)
    assert all((rows == row).all(1).any() for row in found.kept) and len(found.kept.unique(dim=0)) > 45
    assert sorted(seen) == list(range(10))
    for label, (count, gaussian) in seen.items():
        mine = rows[images.labels == label]
        assert count == len(mine)
        torch.testing.assert_close(gaussian.mean, mine.double().mean(0))


def test_one_class_at_a_time_is_in_memory(extractor, monkeypatch):
    """Class 0 is done before the first image of class 2 is seen."""
    dataset = open_dataset("shapes", resolution=16)
    images = StoredImages(dataset, 100, batch_size=4)
    order = []
    collect(
        images, extractor, keep=9, on_class=lambda label, *rest: order.append(("done", label)),
        progress=lambda done: order.append(("seen", done)),
    )  # fmt: skip
    done = [i for i, (what, _) in enumerate(order) if what == "done"]
    assert [order[i][1] for i in done] == list(range(10))
    assert done[0] <= sum(images.labels.tolist().count(c) for c in (0, 1)) // 4 + 1
    monkeypatch.setattr(statistics, "CLASS_CAP", 3)
    counts = []
    collect(images, extractor, keep=9, on_class=lambda label, count, gaussian: counts.append(count))
    assert set(counts) == {3}


def test_the_cache_answers_the_same_question_only(folder, extractor, tmp_path):
    used = []
    first = reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    again = reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    assert len(used) == 1 and not first.from_cache and again.from_cache
    torch.testing.assert_close(again.statistics.gaussian.factor, first.statistics.gaussian.factor)
    torch.testing.assert_close(again.statistics.kept, first.statistics.kept)
    count, gaussian = again.of_class(1)
    assert count == 8 and gaussian.factor.dtype == torch.float64 and again.of_class(2) is None

    reference(open_dataset(f"folder:{folder}", resolution=16), extractor, used)
    assert len(used) == 2, "another resolution"
    other = open_extractor(str(tiny_extractor_file(tmp_path / "other.pt", seed=1)))
    reference(open_dataset(f"folder:{folder}", resolution=20), other, used)
    assert len(used) == 3, "another extractor"
    reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used, count=9)
    assert len(used) == 4, "anything else of the identity"
    Image.new("RGB", (20, 20)).save(folder / "a" / "0.png")
    reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    assert len(used) == 5, "a changed image"
    os.utime(folder / "b" / "3.png", (1, 1))
    reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    assert len(used) == 6, "an image with another time"
    (folder / "b" / "3.png").rename(folder / "a" / "33.png")
    reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    assert len(used) == 7, "an image of another class"


def test_the_whole_evaluation_asks_with_everything_that_matters(folder, extractor, cache):
    """No two of these may share an entry."""
    generated = open_dataset(f"folder:{folder}", resolution=20)

    def run(resolution=20, **overrides):
        protocol = Protocol.preset("clean", count=16, **overrides)
        dataset = open_dataset(f"folder:{folder}", resolution=resolution)
        evaluate(StoredImages(generated), dataset, extractor, protocol, source={}, metrics=("fid",))
        return len(list((cache / "reference").iterdir()))

    assert [run(), run(), run(seed=1)] == [1, 1, 1]  # the seed chooses nothing where all images are taken
    assert run(resolution=16) == 2
    assert run(reference_count=10) == 3
    assert run(reference_count=10, seed=1) == 4
    assert run(keep=5) == 5


def test_a_damaged_cache_is_made_anew(folder, extractor):
    used = []
    first = reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
    for damage in (
        lambda: (first.folder / "set.pt").write_bytes(b"PK"),
        lambda: (first.folder / "identity.json").write_text("{}"),
        lambda: (first.folder / "set.pt").unlink(),
    ):
        damage()
        again = reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used)
        assert not again.from_cache
        torch.testing.assert_close(again.statistics.gaussian.mean, first.statistics.gaussian.mean)
    assert reference(open_dataset(f"folder:{folder}", resolution=20), extractor, used).from_cache
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]  # nothing half made is left


def test_a_failed_collection_leaves_nothing(folder, extractor, cache):
    (folder / "b" / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        reference(open_dataset(f"folder:{folder}", resolution=20), extractor, [])
    assert list((cache / "reference").iterdir()) == []


def test_where_the_cache_is(monkeypatch, folder, extractor, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set SAGAN_FAST_CACHE to a folder that can be written"):
        reference(open_dataset(f"folder:{folder}", resolution=20), extractor, [])
    monkeypatch.delenv("SAGAN_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sagan_fast"

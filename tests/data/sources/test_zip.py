"""Zip archives hold what folders hold."""

import json
import pickle
import zipfile

import pytest

from sagan_fast.data import open_dataset
from sagan_fast.data.images import BrokenImageError
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import kind_of, open_source
from sagan_fast.errors import InputError


def zipped(path, folder, top="", **extra):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{top}{file.relative_to(folder)}")
        for name, text in extra.items():
            archive.writestr(name.replace("__", "."), text)
    return path


@pytest.mark.parametrize("top", ["", "set/"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_archive_of_a_folder_is_the_folder(image_folder, tmp_path, top, num_workers):
    path = zipped(tmp_path / "a.zip", image_folder, top)
    source = open_source(str(path))
    assert source.kind == kind_of(str(path)) == "zip" and source.name_of(0) == f"{path}/{top}cat/a plain.jpg"
    manifest = prepare(source, tmp_path / "out", resolution=9, num_workers=num_workers)
    ours, theirs = (
        open_dataset(f"{kind}:{where}", resolution=9)
        for kind, where in (("packed", tmp_path / "out"), ("folder", image_folder))
    )
    assert manifest.class_names == theirs.class_names and len(ours) == len(theirs)
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(ours, theirs, strict=True))


def test_stylegans_archive(image_folder, tmp_path):
    listed = {"labels": [[f"00000/{path.name}", 3] for path in (image_folder / "cat").iterdir()]}
    path = zipped(tmp_path / "a.zip", image_folder / "cat", "00000/", dataset__json=json.dumps(listed))
    source = open_source(str(path))
    assert source.class_names == ["3"] and source.labels_from == "dataset.json" and source.num_items == 8
    assert not source.passed_over
    assert open_source(str(path), unlabelled=True).class_names == []


def test_damage(image_folder, tmp_path):
    path = zipped(tmp_path / "a.zip", image_folder)
    whole = path.read_bytes()
    content = bytearray(whole)
    content[whole.index(b"a plain.jpg") + 60] ^= 255
    path.write_bytes(content)
    source = open_source(str(path))
    assert pickle.loads(pickle.dumps(source)).read(3, 8)[0].shape == (3, 8, 8)
    with pytest.raises(BrokenImageError, match="."):
        source.read(0, 8)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.zip cannot be opened as a zip archive: File is not a zip file"):
        open_source(str(path))
    zipped(path, tmp_path / "nothing", readme__txt="x")
    with pytest.raises(InputError, match=r"a\.zip holds no images: .*, only 1 \.txt"):
        open_source(str(path))


def test_numpy_archives_are_no_images(tmp_path, rng):
    import numpy as np

    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="is no tar, zip, TFRecord or HDF5 file"):
        open_source(str(tmp_path / "a.npz"))

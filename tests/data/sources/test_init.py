"""Kinds are recognised by contents, patterns mean what they mean to a shell."""

import io
import struct
import sys
import tarfile

import pytest

from sagan_fast.data.sources import expand_braces, files_of, kind_of, open_source
from sagan_fast.data.sources.tfrecord import masked_crc32c
from sagan_fast.errors import InputError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain", ["plain"]),
        ("a-{0000..0003}.tar", ["a-0000.tar", "a-0001.tar", "a-0002.tar", "a-0003.tar"]),
        ("a-{8..11}", ["a-8", "a-9", "a-10", "a-11"]),
        ("a-{08..11}", ["a-08", "a-09", "a-10", "a-11"]),
        ("{x,y}{0..1}", ["x0", "x1", "y0", "y1"]),
        ("{a,b{1,2}}", ["a", "b1", "a", "b2"]),
        ("{}-{lone}", ["{}-{lone}"]),
        ("{3..1}", []),
    ],
)
def test_braces(pattern, expected):
    assert sorted(expand_braces(pattern)) == sorted(expected)


def test_files(tmp_path):
    for name in ("b2", "b1", "odd {x}*"):
        (tmp_path / name).write_text("")
    assert files_of(f"{tmp_path}/b*") == [str(tmp_path / "b1"), str(tmp_path / "b2")]
    assert files_of(f"{tmp_path}/{{b2,b1}}") == [str(tmp_path / "b2"), str(tmp_path / "b1")]
    assert files_of(f"{tmp_path}/odd {{x}}*") == [str(tmp_path / "odd {x}*")]
    with pytest.raises(InputError, match="b3 does not exist or is no file"):
        files_of(f"{tmp_path}/b{{1..3}}")
    with pytest.raises(InputError, match=r"c\* does not exist"):
        files_of(f"{tmp_path}/c*")
    with pytest.raises(InputError, match="names 1 file twice"):
        files_of(f"{tmp_path}/{{b1,b*}}")


def test_kinds(tmp_path, image_folder, monkeypatch):
    length = struct.pack("<Q", 3)
    (tmp_path / "records").write_bytes(length + struct.pack("<I", masked_crc32c(length)) + b"xxx....")
    (tmp_path / "hdf").write_bytes(b"\x89HDF\r\n\x1a\n")
    for name, mode in (("archive", "w"), ("packed", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.addfile(tarfile.TarInfo("x"), io.BytesIO())
    assert [kind_of(str(tmp_path / name)) for name in ("records", "hdf", "archive")] == ["tfrecord", "hdf5", "tar"]
    assert kind_of(str(image_folder)) == kind_of(str(image_folder / "cat")) == "folder"
    monkeypatch.setitem(sys.modules, "crc32c", None)  # is missed only where there may be a TFRecord file
    assert [kind_of(str(tmp_path / name)) for name in ("hdf", "archive", "packed")] == ["hdf5", "tar", "tar"]
    assert kind_of(str(image_folder)) == kind_of(str(image_folder / "cat")) == "folder"
    with pytest.raises(InputError, match=r"need the package crc32c: pip install 'sagan_fast\[tfrecord\]'$"):
        kind_of(str(tmp_path / "records"))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"holds files of several kinds: .*\(hdf5\).*; give a pattern"):
        kind_of(f"{tmp_path}/{{hdf,records}}")
    with pytest.raises(InputError, match="is no tar, zip, TFRecord or HDF5 file"):
        kind_of(str(image_folder / "cat" / "gray.jpg"))
    with pytest.raises(InputError, match="is a folder without tar, zip, TFRecord or HDF5 files"):
        open_source(str(image_folder), kind="tar")
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "nothing"))

"""WIDER FACE's annotations are read line by line, and a line that does not fit is named."""

import numpy as np
import pytest
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.faces.wider import read_annotations

GOOD = """0--Parade/a.jpg
2
10 20 30 40 0 0 0 0 0 0
5 6 7 8 2 0 0 1 0 0
0--Parade/b.jpg
0
0 0 0 0 0 0 0 0 0 0
c.jpg
0
d.jpg
2
1 2 0 4 0 0 0 0 0 0
3 4 5 6
"""


@pytest.fixture
def read(tmp_path):
    (tmp_path / "0--Parade").mkdir()
    Image.fromarray(np.zeros((60, 50, 3), np.uint8)).save(tmp_path / "0--Parade" / "a.jpg")

    def read(text, on_broken="fail"):
        (tmp_path / "gt.txt").write_text(text)
        return read_annotations(tmp_path / "gt.txt", tmp_path, on_broken)

    return read


def test_the_format(read, tmp_path):
    with pytest.raises(
        InputError, match=r"3 of the 4 pictures in \S*gt.txt do not exist, such as \S*b.jpg: --on-broken"
    ):
        read(GOOD)
    pictures = read(GOOD, "skip")
    assert [str(p.path.relative_to(tmp_path)) for p in pictures] == [
        "0--Parade/a.jpg",
        "0--Parade/b.jpg",
        "c.jpg",
        "d.jpg",
    ]
    assert [p.faces.tolist() for p in pictures] == [[[10, 20, 40, 60]], [], [], [[3, 4, 8, 10]]]
    assert all(p.faces.dtype == np.float32 and p.faces.shape[1] == 4 for p in pictures)
    assert pictures[0].read().shape == (60, 50, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list no pictures"),
        ("a picture\n1\n", "line 1 must be the path of a picture, got 'a picture'"),
        ("0--Parade/a.jpg\nmany\n", "line 2 must be the number of faces, got 'many'"),
        ("0--Parade/a.jpg", "line 2 must be the number of faces, got ''"),
        ("0--Parade/a.jpg\n2\n1 2 3 4\n", "line 4 must be x y width height of a face, got ''"),
        ("0--Parade/a.jpg\n1\n1 2 3 x\n", "line 3 must be x y width height of a face, got '1 2 3 x'"),
        ("0--Parade/a.jpg\n1\n1 2 nan 4\n", "line 3 must be x y width height"),
        ("gone.jpg\n0\nlost.jpg\n0\n", "lists .*gone.jpg, which does not exist: check the folder of the images"),
    ],
)
def test_what_does_not_fit(read, text, message):
    with pytest.raises(InputError, match=message):
        read(text)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_annotations(tmp_path / "none.txt", tmp_path)

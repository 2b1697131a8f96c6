"""Reads pictures with annotated faces: WIDER FACE's own format, wider_face_train_bbx_gt.txt (Yang et al., CVPR 2016).

For each picture the file has its path, the number of its faces, and one line a face: x y width height, then blur,
expression, illumination, invalid, occlusion and pose. A picture without faces has one line of zeros or none.
http://shuoyang1213.me/WIDERFACE
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sagan_fast.choices import OnBroken
from sagan_fast.data.listing import EXTENSIONS
from sagan_fast.errors import InputError
from sagan_fast.faces.pictures import Pixels, read_picture
from sagan_fast.files import explained

Faces = npt.NDArray[np.float32]
"""x1, y1, x2, y2 (N, 4) in pixels."""
INVALID = 7
"""Which number of a line is 1 for a face that the annotators call invalid."""


@dataclass(frozen=True)
class Picture:
    """A picture and its faces; `pixels` stands for the file where the picture is in memory."""

    path: Path
    faces: Faces
    pixels: Pixels | None = None

    def read(self) -> Pixels:
        """Return RGB uint8 (H, W, 3); InputError if the file cannot be read."""
        return read_picture(self.path) if self.pixels is None else self.pixels


def read_annotations(file: str | Path, images: str | Path, on_broken: OnBroken = "fail") -> list[Picture]:
    """Return the pictures that the annotation `file` lists, their paths relative to the folder `images`.

    Faces that are marked invalid or have no area are left out; pictures without faces are kept. Raises InputError, with
    the number of the line, for anything that is not in the format, and for pictures that do not exist; with `on_broken`
    "skip" only if none exists.
    """
    file, images = Path(file).expanduser(), Path(images).expanduser()
    with explained(f"the annotations {file} cannot be read", kinds=(OSError, UnicodeDecodeError)):
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    pictures, at = [], 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        name, count = lines[at].strip(), _number(file, lines, at + 1)
        if not name.lower().endswith(EXTENSIONS):
            raise InputError(f"{file}, line {at + 1} must be the path of a picture, got {name!r}")
        at += 2
        rows = [_face(file, lines, row) for row in range(at, at + count)]
        at += count
        if count == 0 and at < len(lines) and not lines[at].strip().lower().endswith(EXTENSIONS):
            at += 1  # the line of zeros
        kept = [row[:4] for row in rows if row[2] > 0 and row[3] > 0 and not (len(row) > INVALID and row[INVALID] == 1)]
        faces = np.array(kept, np.float32).reshape(-1, 4)
        faces[:, 2:] += faces[:, :2]
        pictures.append(Picture(images / name, faces))
    if not pictures:
        raise InputError(f"the annotations {file} list no pictures")
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if len(missing) == len(pictures):
        raise InputError(f"{file} lists {missing[0]}, which does not exist: check the folder of the images")
    if missing and on_broken == "fail":
        raise InputError(
            f"{len(missing)} of the {len(pictures)} pictures in {file} do not exist, such as {missing[0]}: "
            "--on-broken skip does without them"
        )
    return pictures


def _number(file: Path, lines: list[str], at: int) -> int:
    text = lines[at].strip() if at < len(lines) else ""
    if not text.isdigit():
        raise InputError(f"{file}, line {at + 1} must be the number of faces, got {text!r}")
    return int(text)


def _face(file: Path, lines: list[str], at: int) -> list[float]:
    words = lines[at].split() if at < len(lines) else []
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) < 4 or not np.isfinite(numbers).all():
        raise InputError(f"{file}, line {at + 1} must be x y width height of a face, got {' '.join(words)!r}")
    return numbers

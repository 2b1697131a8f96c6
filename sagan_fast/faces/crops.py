"""Square crops of the faces in photographs, in the layout that `folder:` reads, with a manifest of where each is from.

FaceBoxes finds no landmarks: a crop is centred on the box of a face and not turned or aligned as CelebA's are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sagan_fast.choices import OnBroken
from sagan_fast.data.listing import read_tree
from sagan_fast.errors import InputError
from sagan_fast.faces.detector import Detector
from sagan_fast.faces.pictures import Pixels, read_picture
from sagan_fast.files import explained, replacing, written

MANIFEST = "manifest.jsonl"


@dataclass
class Cropped:
    """What `crop_folder` did: numbers of photographs, of those without a face, and of crops; broken files and why."""

    photographs: int = 0
    without: int = 0
    crops: int = 0
    too_small: int = 0
    broken: dict[str, str] = field(default_factory=dict)


def photographs(source: str | Path) -> list[tuple[str, Path]]:
    """Return the name and path of each picture in the folder `source` and below, or of the file `source`.

    Names are relative to the folder. Raises InputError if there is none.
    """
    root = Path(source).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.exists():
        raise InputError(f"{source} does not exist: give a picture or a folder of pictures")
    with explained(f"{source} cannot be listed"):
        names = read_tree(str(root)).all_files()
    if not names:
        raise InputError(f"{source} holds no pictures")
    return [(name, root / name) for name in names]


def detections(
    found: Iterable[tuple[str, Path]], detector: Detector, on_broken: OnBroken, broken: dict[str, str]
) -> Iterator[tuple[str, Pixels, list[tuple[list[float], float]]]]:
    """Yield for each picture its name, its pixels, and its faces: box and score, the best first.

    A picture that cannot be read is an InputError, or with `on_broken` "skip" an entry of `broken`.
    """
    for name, path in found:
        try:
            pixels = read_picture(path)
        except InputError as error:
            if on_broken == "fail":
                raise InputError(f"{error}; --on-broken skip leaves such pictures out") from error
            broken[name] = str(error)
            continue
        boxes, scores = detector(pixels)
        yield name, pixels, list(zip(boxes.tolist(), scores.tolist(), strict=True))


def crop_folder(
    source: str | Path,
    out: Path,
    detector: Detector,
    *,
    size: int = 64,
    margin: float = 0.3,
    min_size: float = 32.0,
    on_broken: OnBroken = "fail",
    on_progress: Callable[[Cropped, int], None] | None = None,
) -> Cropped:
    """Write a crop of `size` pixels of each face in the photographs of `source` to the folder `out`.

    Crops are PNG files named after the photograph and numbered, in the same sub-folders, so that class folders stay
    class folders. `out`/manifest.jsonl has one line a crop: file, source, box, score, and square (x, y, side) in the
    photograph. It is written last.

    Args:
        margin: what the square has beyond the longer side of the box, at each edge, as a share of that side.
        min_size: longer side in pixels that a box must have at least.
        on_progress: told after each photograph what was done so far, and the number of photographs.

    Raises InputError if `out` holds files already, for numbers out of range, and for what cannot be read or written.
    """
    if size < 1 or not 0 <= margin <= 4 or min_size < 0:
        raise InputError(
            f"size must be at least 1, margin 0 to 4 and min_size at least 0, got {size}, {margin:g} and {min_size:g}"
        )
    found = photographs(source)
    with explained(f"cannot read {out}"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is not an empty folder: give a new one for the crops")
    done, lines, used = Cropped(), [], set[str]()
    for name, pixels, faces in detections(found, detector, on_broken, done.broken):
        done.photographs += 1
        done.without += not faces
        for number, (box, score) in enumerate(faces):
            x, y, side = square_of(box, margin)
            if max(box[2] - box[0], box[3] - box[1]) < min_size:
                done.too_small += 1
                continue
            file = _free_name(f"{Path(name).with_suffix('')}-{number}", used)
            with explained(f"cannot write {out / file}"), replacing(out / file, durable=False) as target:
                Image.fromarray(crop(pixels, x, y, side, size)).save(target, format="PNG")
            lines.append({"file": file, "source": name, "box": box, "score": score, "square": [x, y, side]})
            done.crops += 1
        if on_progress is not None:
            on_progress(done, len(found))
    write_lines(out / MANIFEST, lines)
    return done


def square_of(box: list[float], margin: float) -> tuple[float, float, float]:
    """Return x, y and side of the square around `box` (x1 y1 x2 y2) that `crop` takes."""
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * margin)
    return (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2, side


def crop(pixels: Pixels, x: float, y: float, side: float, size: int) -> Pixels:
    """Return the square at (x, y) of `pixels` (H, W, 3), resized to (size, size, 3) with antialiasing.

    Beyond the border the picture goes on as its mirror image. The corner may lie between pixels.
    """
    columns, rows = (np.arange(int(np.floor(low)), int(np.ceil(low + side)) + 1) for low in (x, y))
    part = pixels[_reflected(rows, pixels.shape[0])[:, None], _reflected(columns, pixels.shape[1])]
    left, top = x - columns[0], y - rows[0]
    image = Image.fromarray(np.ascontiguousarray(part))
    box = (left, top, min(left + side, part.shape[1]), min(top + side, part.shape[0]))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `lines` to `path` as lines of JSON; InputError if it cannot be written."""
    with written(path) as file:
        for line in lines:
            file.write(json.dumps(line).encode() + b"\n")


def _reflected(places: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Return `places` folded into 0..length-1 at the first and last pixel, which are not repeated."""
    if length == 1:
        return np.zeros_like(places)
    folded = np.abs((places + length - 1) % (2 * length - 2) - (length - 1))
    return folded


def _free_name(stem: str, used: set[str]) -> str:
    """Return "STEM.png", or with a letter where two photographs differ in their extension only."""
    name, extra = f"{stem}.png", 0
    while name.lower() in used:
        extra += 1
        name = f"{stem}.{extra}.png"
    used.add(name.lower())
    return name

"""Opens data sets by name and reads endless batches from them; a name is `shapes` or KIND:PATH."""

import difflib
import os

from sagan_fast.choices import OnBroken, check_choice
from sagan_fast.data.classes import take_file
from sagan_fast.data.dataset import ImageDataset
from sagan_fast.data.loader import batches
from sagan_fast.data.packed import PackedDataset
from sagan_fast.data.shapes import ShapesDataset
from sagan_fast.errors import InputError

__all__ = ["ImageDataset", "batches", "open_dataset"]

KINDS = ("folder", "packed", "cifar10", "cifar100", "npz")
SPECS = {"shapes": "shapes", **{kind: f"{kind}:PATH" for kind in KINDS}}


def open_dataset(
    spec: str,
    *,
    resolution: int | None,
    num_classes: int | None = None,
    on_broken: OnBroken = "fail",
    classes: str = "",
    unlabelled: bool = False,
) -> ImageDataset:
    """Return the data set that `spec` names, with square images of `resolution` pixels; None takes the size they have.

    Args:
        spec: one of `SPECS`, such as "folder:PATH"; docs/data.md describes them.
        num_classes: what the model expects; 0 is unconditional (all labels 0), None takes what the set has.
        on_broken: "fail" raises InputError when a broken image is read, "skip" replaces it and counts it.
        classes: text file with the class names in the order of their labels, one per line.
        unlabelled: read a folder without labels, whatever looks like a label in it.

    Raises InputError if the spec is unknown, the folder is not laid out as such, its classes are not those expected, or
    its images have no size of their own that all share.
    """
    check_choice("on_broken", on_broken, OnBroken)
    if resolution is not None and resolution < 1:
        raise InputError(f"the resolution of a data set must be at least 1 pixel, got {resolution}")
    kind, colon, path = spec.partition(":")
    if kind not in SPECS:
        raise InputError(_unknown(spec, kind, path))
    if kind == "shapes" and colon:
        raise InputError(f"'{spec}': shapes is drawn in code and takes no path; write shapes")
    if kind != "shapes" and not path:
        raise InputError(f"'{spec}' names no path; write {SPECS[kind]}")
    if unlabelled and num_classes is None:
        num_classes = 0
    expected = {"resolution": resolution, "num_classes": num_classes}
    dataset: ImageDataset
    if kind == "shapes":
        dataset = ShapesDataset(**expected)
    elif kind in ("cifar10", "cifar100"):
        from sagan_fast.data.cifar import CifarDataset

        dataset = CifarDataset(kind, path, **expected)
    elif kind == "npz":
        from sagan_fast.data.npz import NpzDataset

        dataset = NpzDataset(path, **expected)
    elif kind == "packed":
        dataset = PackedDataset(path, **expected)
    else:
        from sagan_fast.data.folders import FolderDataset

        dataset = FolderDataset(path, on_broken=on_broken, unlabelled=unlabelled, **expected)
    if classes:
        take_file(dataset, classes)
    return dataset


def _unknown(spec: str, kind: str, path: str) -> str:
    accepted = f"accepted are {', '.join(SPECS.values())}"
    if os.path.isdir(os.path.expanduser(spec)):
        return f"'{spec}' is a folder without the kind of data set before it; did you mean folder:{spec}? ({accepted})"
    nearest = difflib.get_close_matches(kind.lower(), SPECS, n=1)
    if not nearest:
        return f"'{spec}' is no data set; {accepted}"
    meant = f"{nearest[0]}:{path}" if path and nearest[0] != "shapes" else SPECS[nearest[0]]
    return f"'{spec}' is no data set; did you mean {meant}? ({accepted})"

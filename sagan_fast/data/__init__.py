"""Opens data sets by name and reads endless batches from them; a name is `shapes` or KIND:PATH."""

import difflib
import os

from sagan_fast.choices import OnBroken, check_choice
from sagan_fast.data.dataset import ImageDataset
from sagan_fast.data.loader import batches
from sagan_fast.data.packed import PackedDataset
from sagan_fast.data.shapes import ShapesDataset
from sagan_fast.errors import InputError

__all__ = ["ImageDataset", "batches", "open_dataset"]

SPECS = {"shapes": "shapes", "folder": "folder:PATH", "packed": "packed:PATH", "cifar10": "cifar10:PATH"}


def open_dataset(
    spec: str, *, resolution: int | None, num_classes: int | None = None, on_broken: OnBroken = "fail"
) -> ImageDataset:
    """Return the data set that `spec` names, with square images of `resolution` pixels; None takes the size they have.

    Args:
        spec: "shapes" (drawn in code), "folder:PATH" (class folders, or one flat folder of images), "packed:PATH"
            (what `sagan-fast prepare` wrote) or "cifar10:PATH" (the folder that holds cifar-10-batches-py).
        num_classes: what the model expects; 0 is unconditional (all labels 0), None takes what the set has.
        on_broken: "fail" raises InputError when a broken image is read, "skip" replaces it and counts it.

    Raises InputError if the spec is unknown, the folder is not laid out as such, its classes are not those expected, or
    its images have no size of their own that all share.
    """
    check_choice("on_broken", on_broken, OnBroken)
    if resolution is not None and resolution < 1:
        raise InputError(f"the resolution of a data set must be at least 1 pixel, got {resolution}")
    kind, colon, path = spec.partition(":")
    if kind not in SPECS:
        raise InputError(_unknown(spec, kind, path))
    if kind == "shapes":
        if colon:
            raise InputError(f"'{spec}': shapes is drawn in code and takes no path; write shapes")
        return ShapesDataset(resolution=resolution, num_classes=num_classes)
    if not path:
        raise InputError(f"'{spec}' names no folder; write {SPECS[kind]}")
    if kind == "cifar10":
        from sagan_fast.data.cifar10 import Cifar10Dataset

        return Cifar10Dataset(path, resolution=resolution, num_classes=num_classes)
    if kind == "packed":
        return PackedDataset(path, resolution=resolution, num_classes=num_classes)
    from sagan_fast.data.folders import FolderDataset

    return FolderDataset(path, resolution=resolution, num_classes=num_classes, on_broken=on_broken)


def _unknown(spec: str, kind: str, path: str) -> str:
    accepted = f"accepted are {', '.join(SPECS.values())}"
    if os.path.isdir(os.path.expanduser(spec)):
        return f"'{spec}' is a folder without the kind of data set before it; did you mean folder:{spec}? ({accepted})"
    nearest = difflib.get_close_matches(kind.lower(), SPECS, n=1)
    if not nearest:
        return f"'{spec}' is no data set; {accepted}"
    meant = f"{nearest[0]}:{path}" if path and nearest[0] != "shapes" else SPECS[nearest[0]]
    return f"'{spec}' is no data set; did you mean {meant}? ({accepted})"

"""Says in a few lines what a data set holds, so that a wrong label or a lost image is seen before the training."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sagan_fast.data.dataset import ImageDataset
from sagan_fast.data.layouts import SPLITS
from sagan_fast.data.listing import said_passed_over
from sagan_fast.words import counted, list_some

PICTURED_CLASSES, PICTURES_EACH = 5, 8
"""Rows and columns of the picture of a data set."""


def summary(dataset: ImageDataset) -> list[str]:
    """Return the lines that describe `dataset`; see `described`."""
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist() if dataset.class_names else []
    lines = described(dataset.class_names, counts, dataset.labels_from, dataset.passed_over)
    return [*([f"by its name it is the part {part} of a set"] if (part := split_of(dataset.name)) else []), *lines]


def record(dataset: ImageDataset) -> dict[str, Any]:
    """Return what `summary` says as plain data for JSON, with the numbers of images of all classes."""
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist() if dataset.class_names else []
    return {
        "data": dataset.name,
        "split": split_of(dataset.name) or None,
        "images": len(dataset),
        "resolution": dataset.resolution,
        "labels_from": dataset.labels_from or None,
        "classes": dict(zip(dataset.class_names, counts, strict=True)),
        "passed_over": dict(dataset.passed_over),
    }


def split_of(name: str) -> str:
    """Return the part of a data set that a path says it is, such as "train"; "" if it does not."""
    words = re.findall(r"[a-z_]+", name.lower().partition(":")[2])
    return next((word for word in reversed(words) if word in SPLITS), "")


def described(
    class_names: Sequence[str], class_counts: Sequence[int], labels_from: str, passed_over: Mapping[str, int]
) -> list[str]:
    """Return lines that say where the labels come from, the first names, the extreme counts and what was passed over.

    A line is left out where there is nothing to say.
    """
    lines = []
    if class_names:
        low, high = int(np.argmin(class_counts)), int(np.argmax(class_counts))
        sizes = f"{class_counts[low]} ({class_names[low]}) to {class_counts[high]} ({class_names[high]}) images a class"
        if class_counts[low] == class_counts[high]:
            sizes = f"{counted(class_counts[low], 'image')} in each class"
        first = list_some([f"{label} {name}" for label, name in enumerate(class_names[:6])], 5)
        lines.append(f"labels from {labels_from or 'the set'}: {counted(len(class_names), 'class')}, {first}")
        lines.append(sizes)
    elif labels_from:
        lines.append("no labels are read")
    if said := said_passed_over(passed_over):
        lines.append(f"passed over: {said}")
    return lines


def pictured(dataset: ImageDataset) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the indices of 5 x 8 images, (rows, 8), and the name of each row's class; "" without classes.

    The rows are classes spread over the list, the first and the last among them; a class of fewer images repeats them.
    """
    if not dataset.class_names:
        spread = np.linspace(0, len(dataset) - 1, PICTURED_CLASSES * PICTURES_EACH).round().astype(np.int64)
        return spread.reshape(PICTURED_CLASSES, PICTURES_EACH), [""] * PICTURED_CLASSES
    labels = np.unique(np.linspace(0, dataset.num_classes - 1, PICTURED_CLASSES).round().astype(np.int64))
    rows, names = [], []
    for label in labels.tolist():
        of_class = np.flatnonzero(dataset.labels == label)
        if len(of_class):
            rows.append(of_class[np.arange(PICTURES_EACH) * max(len(of_class) // PICTURES_EACH, 1) % len(of_class)])
            names.append(f"{label} {dataset.class_names[label]}")
    return np.stack(rows), names

"""Reads labels: numbers, vectors and names as data sets write them, and files that list the labels of images.

Every reader of a format calls `class_number`, so that the same label means the same class everywhere.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sagan_fast.errors import InputError
from sagan_fast.words import counted

MAX_LABEL = 10**6
"""A larger number is no class."""
JSON_KEYS = ("cls", "label", "class", "class_id", "label_id", "class_index", "category_id", "target")
"""Where a mapping may hold the class; the first that is there."""
NAME_COLUMNS = ("file_name", "filename", "file", "image", "path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "class_id", "category", "target")
SUSPICIOUS = re.compile(r"label|class|categor|annotation|metadata|target|attr", re.IGNORECASE)
"""In the name of a file, key or feature that may hold labels."""


def class_number(value: Any) -> int:
    """Return the class that `value` means: a whole number in any form, one in a list, or the place of a one-hot 1.

    Raises ValueError for fractions, NaN, other vectors, texts and numbers outside 0..1000000; the message begins with
    "its label".
    """
    if isinstance(value, np.ndarray | list | tuple):
        return _number_of_vector(np.asarray(value).reshape(-1))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.0*)?", value.strip(), re.ASCII):
        value = int(value.strip().partition(".")[0])
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"its label {str(value)[:40]!r} is not a whole number")
    return value


def is_vector(value: Any) -> bool:
    """Return whether `value` holds several numbers, so that a label is the place of its 1, counted from 0."""
    return isinstance(value, np.ndarray | list | tuple) and np.asarray(value).size > 1


def counted_from(value: Any, first_label: int) -> int:
    """Return the class of `value`, from 0, where numbers are counted from `first_label`; ValueError if it is none."""
    number, low = class_number(value), 0 if is_vector(value) else first_label
    if not low <= number <= MAX_LABEL:
        raise ValueError(f"its label {number} is not in {low}..{MAX_LABEL}")
    return number - low


def label_in_json(content: Any) -> Any:
    """Return the label in the parsed JSON of one image, in any form, or None."""
    if not isinstance(content, dict):
        return None
    return next((content[key] for key in JSON_KEYS if content.get(key) is not None), None)


def _number_of_vector(vector: Any) -> int:
    if vector.size == 1:
        return class_number(vector[0])
    if vector.dtype.kind in "iufb":
        ones = np.flatnonzero(vector)
        if len(ones) == 1 and vector[ones[0]] == 1:
            return int(ones[0])
    raise ValueError(f"its label is a vector of {vector.size} numbers that is not one-hot")


def read_label_file(path: str, data: bytes) -> dict[str, str] | None:
    """Return the label of each image that the file `path` lists, as text, by the image's path beside it.

    None if the file lists no labels, {} if it says that there are none. Read are StyleGAN's dataset.json, metadata.csv
    and metadata.jsonl of Hugging Face, and Tiny ImageNet's val_annotations.txt. Raises InputError for a label that is
    neither a name nor a whole number nor one-hot, and for a file that cannot be parsed.
    """
    reader = LABEL_FILES[path.rpartition("/")[2].lower()]
    try:
        found = reader(data.decode("utf-8-sig"))
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} cannot be read as a list of labels: {' '.join(str(error).split())}") from error
    if found is None:
        return None
    pairs = [(name.replace("\\", "/").removeprefix("./"), label) for name, label in found]
    if repeated := [name for name, _ in pairs if not name]:
        raise InputError(f"{path} has {counted(len(repeated), 'line')} without the name of an image")
    return dict(zip((name for name, _ in pairs), _as_texts(path, pairs), strict=True))


def _as_texts(path: str, pairs: list[tuple[str, Any]]) -> list[str]:
    """Return whole numbers and one-hot vectors as the text of the number, and names as they are."""
    texts, numeric = [], [_is_numeric(label) for _, label in pairs]
    for (name, label), is_number in zip(pairs, numeric, strict=True):
        if not is_number and isinstance(label, str) and label.strip() and not any(numeric):
            texts.append(label.strip())
            continue
        try:
            texts.append(str(counted_from(label, 0)))
        except ValueError as error:
            raise InputError(f"{path}, {name}: {error}") from error
    return texts


def _is_numeric(label: Any) -> bool:
    try:
        float(label)
    except (TypeError, ValueError):
        return not isinstance(label, str)
    return True


def _stylegan(text: str) -> Iterable[tuple[str, Any]] | None:
    content = json.loads(text)
    if not isinstance(content, dict) or "labels" not in content:
        return None
    return [] if content["labels"] is None else [(str(name), label) for name, label in content["labels"]]


def _table(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Any]] | None:
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row if isinstance(key, str)))
    places = {column.strip().lower(): column for column in columns}
    name = next((places[column] for column in NAME_COLUMNS if column in places), None)
    label = next((places[column] for column in LABEL_COLUMNS if column in places), None)
    if name is None or label is None:
        return None
    return [(str(row.get(name) or ""), row.get(label)) for row in rows]


def _annotations(text: str) -> Iterable[tuple[str, Any]]:
    lines = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [(line[0], line[1]) for line in lines]


LABEL_FILES: dict[str, Callable[[str], Iterable[tuple[str, Any]] | None]] = {
    "dataset.json": _stylegan,
    "metadata.csv": lambda text: _table(csv.DictReader(io.StringIO(text))),
    "metadata.jsonl": lambda text: _table(json.loads(line) for line in text.splitlines() if line.strip()),
    "val_annotations.txt": _annotations,
}
"""Files that list the labels of the images beside and below them."""

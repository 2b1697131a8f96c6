"""Lists of class names: their order, their files, and whether the classes of a data set are those of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from sagan_fast.data.dataset import ImageDataset
from sagan_fast.errors import InputError
from sagan_fast.files import explained
from sagan_fast.words import counted, list_some


def read_classes(path: str) -> list[str]:
    """Return the names in a text file, one per line; empty lines are left out.

    Raises InputError if it cannot be read, holds no name, or one twice.
    """
    with explained(f"{path} cannot be read", kinds=(OSError, UnicodeDecodeError)):
        names = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()]
    names = [name for name in names if name]
    if not names:
        raise InputError(f"{path} holds no class names: write one per line, in the order of the labels")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} names {list_some(repeated)} twice: every class must have a name of its own")
    return names


def in_order(names: Sequence[str]) -> list[str]:
    """Return class names in the order of their labels: by number if all are whole numbers, else as text."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def take_order(dataset: ImageDataset, names: Sequence[str], of: str) -> str:
    """Give the classes of `dataset` the labels that they have in the list `names`; return what to say, "" if nothing.

    `of` says whose list it is. Nothing is done where either has no names, or where `names` are mere numbers and the
    user gave the order. Raises InputError if the names differ; the sentence shows the first differences.
    """
    ours = dataset.class_names
    if not names or not ours or list(names) == ours:
        return ""
    if dataset.order_given and is_count(names) and len(names) == len(ours):
        return ""
    if sorted(names) != sorted(ours) or len(set(names)) != len(names):
        raise InputError(f"{dataset.name} has other classes than {of}: {differences(ours, names)}")
    first = next(i for i, (a, b) in enumerate(zip(ours, names, strict=True)) if a != b)
    moved = sum(a != b for a, b in zip(ours, names, strict=True))
    dataset.reorder_classes(names)
    return (
        f"{dataset.name} has the classes of {of} in another order: {moved} of {len(names)} labels are mapped by name, "
        f"label {first} is {names[first]} and not {ours[first]}"
    )


def take_file(dataset: ImageDataset, path: str) -> None:
    """Give the classes of `dataset` the order in the text file `path`, or these names where they are only 0, 1, ...

    Raises InputError if the file cannot be read or names other classes.
    """
    names = read_classes(path)
    if not dataset.class_names:
        raise InputError(f"{dataset.name} is read without classes, and --classes {path} names some: leave it out")
    if is_count(dataset.class_names) and len(names) == dataset.num_classes:
        dataset.class_names = names
    elif sorted(names) == sorted(dataset.class_names):
        dataset.reorder_classes(names)
    else:
        raise InputError(f"{dataset.name} has other classes than {path}: {differences(dataset.class_names, names)}")
    dataset.order_given = True


def differences(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Return a text that tells two lists of names apart by the first of each that the other lacks."""
    missing, extra = ([name for name in a if name not in set(b)] for a, b in ((theirs, ours), (ours, theirs)))
    said = [f"{verb} {list_some(names, 3)}" for verb, names in (("it lacks", missing), ("it has", extra)) if names]
    sizes = f"{len(ours)} against {counted(len(theirs), 'class')}"
    text = f"{' and '.join(said) or 'a name is there twice'} ({sizes})"
    if is_count(ours) != is_count(theirs):
        text += "; --classes FILE says which name belongs to which number: one name per line, that of 0 first"
    return text


def is_count(names: Sequence[str]) -> bool:
    """Return whether the names are 0, 1, 2, ...: those of labels that nobody named."""
    return bool(names) and list(names) == [str(label) for label in range(len(names))]

"""Decides which images of a tree have which labels: class folders, a file that lists labels, or no labels.

Any other layout is refused with a sentence that says what was found. Otherwise the usual mistakes, a folder one level
too high or labels in a file that nobody reads, would train on a single class unnoticed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagan_fast.data.classes import in_order
from sagan_fast.data.labels import LABEL_FILES, SUSPICIOUS, read_label_file
from sagan_fast.data.listing import Reader, Tree
from sagan_fast.errors import InputError
from sagan_fast.words import counted, list_some

SPLITS = ("train", "training", "train_images", "val", "valid", "validation", "test", "testing", "dev", "eval")
"""Names that sub-folders have when they are parts of a data set, not classes of one; the preferred first."""
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".npy", ".npz", ".mat", ".parquet", ".pkl", ".pickle", ".xml")
SIDECARS = (".cls", ".class", ".label", ".json", ".txt", ".xml", ".index")
READ = "JPEG, PNG, WebP or other images that Pillow reads"
UNLABELLED = "--unlabelled true reads the images without labels"


@dataclass
class Layout:
    """The images of a tree in the order of the data set.

    Attributes:
        files: paths relative to the root.
        labels: int64, one per file.
        class_names: one per label; empty without classes.
        passed_over: number of what lies beside the images and was not read, by kind.
        labels_from: what the labels were read from, in words.
    """

    files: list[str]
    labels: npt.NDArray[np.int64]
    class_names: list[str]
    passed_over: Counter[str]
    labels_from: str


def layout_of(name: str, tree: Tree, read: Reader, *, wants_labels: bool = True, unlabelled: bool = False) -> Layout:
    """Return the images and labels of `tree`; `name` is what sentences call it.

    Args:
        read: returns the content of a file of the tree.
        wants_labels: whether anything is to be learned from labels; if not, label files and empty classes are ignored.
        unlabelled: take all images, at any depth, without labels.

    Raises InputError if the layout is not known, or there is no image.
    """
    passed_over = tree.total_passed_over()
    if not tree.files and not tree.inhabited():
        others = f", only {list_some([f'{n} {kind}' for kind, n in passed_over.most_common()])}" if passed_over else ""
        raise InputError(f"{name} holds no images: neither in it nor below it are {READ}{others}")
    if unlabelled:
        return _flat(tree, passed_over)
    if wants_labels and (listed := _listed(name, tree, read)):
        return listed
    folders = tree.inhabited()
    if tree.files and folders:
        raise InputError(
            f"{name} holds both images ({os.path.basename(tree.files[0])}, ...) and folders of images "
            f"({list_some(list(folders))}): move the images into class folders, or give one of the folders"
        )
    if folders and (why := why_too_high(folders)):
        raise InputError(f"{name} is a level too high: {why}; give {os.path.join(name, probably_meant(folders))}")
    if tree.files or list(tree.folders) == ["images"]:  # the latter in Tiny ImageNet's test, and in each of its classes
        if wants_labels:
            _refuse_unread_labels(name, tree)
        return _flat(tree, passed_over)
    return _class_folders(name, tree, passed_over, wants_labels)


def _flat(tree: Tree, passed_over: Counter[str]) -> Layout:
    files = tree.all_files()
    return Layout(files, np.zeros(len(files), np.int64), [], passed_over, "nothing: no labels")


def _class_folders(name: str, tree: Tree, passed_over: Counter[str], wants_labels: bool) -> Layout:
    inside = {folder: tree.folders[folder].all_files() for folder in in_order(list(tree.folders))}
    empty = [folder for folder, files in inside.items() if not files]
    if empty and wants_labels:
        raise InputError(
            f"{name}: {len(empty)} of its {len(inside)} class folders ({list_some(empty)}) "
            f"{'has' if len(empty) == 1 else 'have'} no {READ}: fill or remove what is empty"
        )
    passed_over["empty folder"] += len(empty)
    chunks = all(re.fullmatch(r"\d{5}", folder) for folder in inside)
    files = [file for listed in inside.values() for file in listed]
    if wants_labels and chunks and all(re.search(r"(^|/)img\d{8}\.\w+$", file) for file in files):
        raise InputError(
            f"{name} seems to be StyleGAN's: its folders ({list_some(list(inside))}) are chunks, not classes, and the "
            f"labels are in dataset.json, which is not there; {UNLABELLED}"
        )
    labels = np.repeat(np.arange(len(inside), dtype=np.int64), [len(listed) for listed in inside.values()])
    return Layout(files, labels, list(inside), +passed_over, "sub-folders")


def _listed(name: str, tree: Tree, read: Reader) -> Layout | None:
    """Return the layout where a file at the top lists the labels, or says that there are none."""
    found = {file: listed for file in tree.others if file.lower() in LABEL_FILES
             and (listed := read_label_file(file, read(file))) is not None}  # fmt: skip
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{name} has labels in {' and '.join(sorted(found))}: remove all but one")
    ((file, by_name),) = found.items()
    passed_over = tree.total_passed_over()
    passed_over[os.path.splitext(file)[1].lower()] -= 1
    images = tree.all_files()
    if not by_name:
        return _flat(tree, +passed_over)
    bases = Counter(image.rpartition("/")[2] for image in images)
    texts = [by_name.get(image) or (by_name.get(base) if bases[base := image.rpartition("/")[2]] == 1 else None)
             for image in images]  # fmt: skip
    if missing := [image for image, text in zip(images, texts, strict=True) if text is None]:
        raise InputError(
            f"{name}: {file} has no label for {len(missing)} of {counted(len(images), 'image')} "
            f"({list_some(missing, 3)}): add or remove them; {UNLABELLED}"
        )
    if (unused := len(by_name) - len(images)) > 0:
        passed_over[f"line of {file} without its image"] += unused
    names = in_order(sorted({text for text in texts if text is not None}))
    _check_against_folders(name, file, tree, images, texts)
    places = {text: label for label, text in enumerate(names)}
    labels = np.array([places[text] for text in texts if text is not None], np.int64)
    return Layout(images, labels, names, +passed_over, file)


def _check_against_folders(name: str, file: str, tree: Tree, images: list[str], texts: list[str | None]) -> None:
    """Raise InputError if there are folders that look like classes and divide the images otherwise than `file`."""
    if file == "dataset.json" or tree.files or len(tree.inhabited()) < 2:
        return
    pairs = {(image.partition("/")[0], text) for image, text in zip(images, texts, strict=True)}
    folders, labels = ({pair[i] for pair in pairs} for i in (0, 1))
    if not len(pairs) == len(folders) == len(labels):
        raise InputError(
            f"{name} has class folders ({list_some(sorted(tree.inhabited()))}) and other labels in {file}: keep one"
        )


def _refuse_unread_labels(name: str, tree: Tree) -> None:
    """Raise InputError if a flat folder has files that may hold its labels."""
    stems = {os.path.splitext(file)[0] for file in tree.all_files()}
    for file in tree.all_others():
        stem, extension = os.path.splitext(file)
        base = os.path.basename(file)
        beside = extension.lower() in SIDECARS and stem in stems
        if beside or (extension.lower() in TABLES and SUSPICIOUS.search(base)):
            raise InputError(
                f"{name} has no class folders, and {file} looks like labels that would be passed over: write them to "
                f"metadata.csv with the columns file_name,label; {UNLABELLED}"
            )


def why_too_high(folders: dict[str, Tree]) -> str:
    """Return what the sub-folders are instead of classes, or nothing if they are classes."""
    if all(folder.lower() in SPLITS for folder in folders):
        return f"its folders ({list_some(list(folders))}) are parts of a data set, not classes"
    nested = {folder: tuple(tree.inhabited()) for folder, tree in folders.items() if not tree.files}
    if len(folders) > 1 and len(nested) == len(folders) and len(set(nested.values())) == 1:
        (inner,) = set(nested.values())
        if len(inner) == 1:  # CLASS/images/FILE for every class, as in the original tiny-imagenet-200
            return ""
    if nested:
        folder, inner = max(nested.items(), key=lambda item: len(item[1]))
        return f"its folder {folder} holds no images but {counted(len(inner), 'folder')} ({list_some(inner)})"
    return ""


def probably_meant(folders: dict[str, Tree]) -> str:
    """Return the path of the first folder below that holds classes or images, the training part where there is one."""

    def rank(item: tuple[str, Tree]) -> tuple[int, int]:
        name, tree = item
        preferred = SPLITS.index(name.lower()) if name.lower() in SPLITS else len(SPLITS)
        return preferred, -len(tree.inhabited())

    name, tree = min(folders.items(), key=rank)
    inner = tree.inhabited()
    if tree.files or not why_too_high(inner):
        return name
    return os.path.join(name, probably_meant(inner))

"""Lists the images of a folder or an archive as a tree, and counts by kind what is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from PIL import features

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif", ".jpe",
    *([".avif"] if features.check("avif") else []),
)  # fmt: skip
"""Of images that Pillow reads; of an animation or a file of several pages the first image counts."""
NOT_DATA = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found")
"""Folders that systems make: copies of names, thumbnails and what was deleted."""
HIDDEN = "hidden"
NO_EXTENSION = "no extension"


@dataclass
class Tree:
    """The images at and below one folder, as sorted paths relative to the root, and what lies beside them.

    Attributes:
        files: images directly in the folder.
        folders: its sub-folders by name, the empty ones too.
        others: files directly in it that are no images by their names.
        passed_over: number of everything passed over in it, but for the sub-folders, by kind.
    """

    files: list[str] = field(default_factory=list)
    folders: dict[str, Tree] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def all_files(self) -> list[str]:
        """Return all images at and below the folder, sorted."""
        return sorted([*self.files, *(file for tree in self.folders.values() for file in tree.all_files())])

    def all_others(self) -> list[str]:
        """Return all files at and below the folder that are no images by their names."""
        return [*self.others, *(file for tree in self.folders.values() for file in tree.all_others())]

    def inhabited(self) -> dict[str, Tree]:
        """Return the sub-folders with images at or below them."""
        return {name: tree for name, tree in self.folders.items() if tree.files or tree.inhabited()}

    def total_passed_over(self) -> Counter[str]:
        """Return the numbers of what was passed over at and below the folder, by kind."""
        found = Counter(self.passed_over)
        for tree in self.folders.values():
            found.update(tree.total_passed_over())
        return found

    def add(self, path: str, name: str) -> None:
        """Take in the file `path`, which `name` is in this folder."""
        kind = kind_of_name(name)
        if kind in EXTENSIONS:
            self.files.append(path)
        else:
            self.passed_over[kind] += 1
            if kind != HIDDEN:
                self.others.append(path)


def kind_of_name(name: str) -> str:
    """Return the extension of a file's name in lower case, or "hidden" or "no extension"."""
    if name.startswith("."):
        return HIDDEN
    return os.path.splitext(name)[1].lower() or NO_EXTENSION


def is_no_data(folder: str) -> bool:
    """Return whether a folder of this name is hidden, or one that a system makes."""
    return folder.startswith(".") or folder.lower() in NOT_DATA


def read_tree(root: str, relative: str = "", ancestors: tuple[tuple[int, int], ...] = ()) -> Tree:
    """Return the tree of the folder `relative` in `root`. Links are followed, but for loops. Raises OSError."""
    tree = Tree()
    status = os.stat(os.path.join(root, relative))
    here = (status.st_dev, status.st_ino)
    if here in ancestors:  # a link to a folder that holds it
        return tree
    subfolders = []
    with os.scandir(os.path.join(root, relative)) as entries:
        for entry in entries:
            if not entry.is_dir():
                tree.add(os.path.join(relative, entry.name), entry.name)
            elif is_no_data(entry.name):
                inside = sum(len(files) for _, _, files in os.walk(entry.path))
                tree.passed_over[HIDDEN if entry.name.startswith(".") else entry.name] += inside
            else:
                subfolders.append(entry.name)
    tree.files.sort()
    for name in sorted(subfolders):
        tree.folders[name] = read_tree(root, os.path.join(relative, name), (*ancestors, here))
    return tree


def tree_of(names: Iterable[str]) -> Tree:
    """Return the tree of the files `names`, paths with slashes."""
    root = Tree()
    for path in sorted(names):
        *folders, name = path.split("/")
        tree = root
        for folder in folders:
            if is_no_data(folder):
                tree.passed_over[HIDDEN if folder.startswith(".") else folder] += 1
                break
            tree = tree.folders.setdefault(folder, Tree())
        else:
            if name:
                tree.add(path, name)
    return root


def said_passed_over(passed_over: Mapping[str, int]) -> str:
    """Return "12 .txt, 3 hidden": what was passed over, the most frequent kind first; "" for nothing."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {kind}" for kind, number in ordered if number)


Reader = Callable[[str], bytes]
"""Returns the content of a file of a tree."""

"""Opens the data sets that `sagan-fast prepare` reads; `open_source` recognises their format."""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from sagan_fast.choices import SourceKind
from sagan_fast.data.layouts import SPLITS
from sagan_fast.data.sources.base import Source, start_of
from sagan_fast.data.sources.folder import FolderSource
from sagan_fast.data.sources.hdf5 import SIGNATURE, HDF5Source
from sagan_fast.data.sources.tar import TarSource
from sagan_fast.data.sources.tar_members import is_tar
from sagan_fast.data.sources.tfrecord import TFRecordSource, is_tfrecord
from sagan_fast.data.sources.zip import ZipSource
from sagan_fast.errors import InputError
from sagan_fast.words import counted, list_some

__all__ = ["Source", "open_source"]

NOT_SHARDS = (".txt", ".json", ".md", ".csv", ".idx", ".yaml", ".yml")
ZIP = b"PK\x03\x04"
NOT_ARCHIVES = (".npz", ".pt", ".pth")
"""Files that begin as a zip archive and hold no images."""


def open_source(
    path: str | os.PathLike[str],
    kind: Literal["auto", SourceKind] = "auto",
    first_label: int | None = None,
    unlabelled: bool = False,
) -> Source:
    """Return the data set at `path`: a folder of images, or files of one of the other kinds.

    Args:
        path: a folder of images or of files, a file, or a pattern of files with *, ?, [...], {a,b} or {000..123}.
        kind: "auto" to recognise it by what the files begin with, not by their names.
        first_label: the number that labels in files are counted from; None is 0.
        unlabelled: read the images without labels, whatever looks like a label.

    Raises InputError if nothing is there, its kind is not recognised or not the one given, it holds no images, or
    something looks like a label and is not read.
    """
    path = os.fspath(path)
    if first_label not in (None, 0, 1):
        raise InputError(f"--first-label must be 0 or 1, got {first_label}")
    source = _open(path, kind_of(path) if kind == "auto" else kind, first_label, unlabelled)
    if first_label is None and source.class_names is None and source.label_counts and not source.faults:
        _refuse_gaps(source, source.label_counts)
    return source


def _refuse_gaps(source: Source, counts: Mapping[int, int]) -> None:
    """Raise InputError if a class below the largest label has no images, as when labels are counted from 1."""
    empty = [str(label) for label in range(max(counts)) if not counts.get(label)]
    if empty == ["0"]:
        raise InputError(
            f"the labels of {source.path} are 1 to {max(counts)}: add --first-label 1 if they are counted from 1, or "
            "--first-label 0 if class 0 has no images"
        )
    if empty:
        raise InputError(
            f"{source.path} has labels up to {max(counts)}, and {counted(len(empty), 'class')} below "
            f"({list_some(empty)}) without images: number the classes without gaps, or add --first-label 0 to pack it"
        )


def _open(path: str, found: SourceKind, first_label: int | None, unlabelled: bool) -> Source:
    if found in ("folder", "zip") and first_label:
        raise InputError("--first-label is for labels in files: the classes of a folder are its sub-folders")
    if found == "folder":
        return FolderSource(path, unlabelled)
    files = files_of(path)
    if found == "tar":
        return TarSource(path, files, first_label, unlabelled)
    if found == "tfrecord":
        return TFRecordSource(path, files, first_label, unlabelled)
    if len(files) > 1:
        raise InputError(f"{path} names {len(files)} {found.upper()} files ({list_some(files)}): give one")
    if found == "zip":
        return ZipSource(path, files[0], unlabelled)
    return HDF5Source(path, files[0], first_label, unlabelled)


def kind_of(path: str) -> SourceKind:
    """Return the kind of what lies at `path`; InputError if none is recognised, or several are."""
    if os.path.isdir(os.path.expanduser(path)) and not _shards_in(path):
        return "folder"
    kinds = {_kind_of_file(file): file for file in files_of(path)}
    if len(kinds) > 1:
        said = ", ".join(f"{file} ({kind or 'unknown'})" for kind, file in kinds.items())
        raise InputError(f"{path} holds files of several kinds: {said}; give a pattern that names one kind")
    (kind,) = kinds
    if kind is None:
        raise InputError(f"{path} is no tar, zip, TFRecord or HDF5 file: give one of these, or a folder of images")
    return kind


def files_of(path: str) -> list[str]:
    """Return the files that `path` names, sorted within a pattern; InputError if there are none."""
    whole = os.path.expanduser(path)
    if os.path.isdir(whole):
        if shards := _shards_in(path):
            return _of_one_part(path, shards)
        raise InputError(f"{path} is a folder without tar, zip, TFRecord or HDF5 files")
    if os.path.exists(whole):
        return [whole]
    files: list[str] = []
    for pattern in expand_braces(whole):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        missing = [pattern] if not matches else [file for file in matches if not os.path.isfile(file)]
        if missing:
            where = f" (relative paths start at {os.getcwd()})"
            raise InputError(f"{missing[0]} does not exist or is no file: check the path{where}")
        files += matches
    if repeated := sorted({file for file in files if files.count(file) > 1}):
        raise InputError(f"{path} names {counted(len(repeated), 'file')} twice ({list_some(repeated)})")
    return files if re.search(r"\{[^{}]*,", path) else _of_one_part(path, files)


def _of_one_part(path: str, files: list[str]) -> list[str]:
    """Return `files`; InputError if their names say that some are for training and others for validation."""
    parts: dict[str, list[str]] = {}
    for file in files:
        words = re.findall(r"[a-z]+", os.path.basename(file).lower())
        part = next((word for word in words if word in SPLITS), "")
        parts.setdefault(part, []).append(file)
    if len(parts) < 2:
        return files
    first = min(parts, key=lambda part: SPLITS.index(part) if part else len(SPLITS))
    said = ", ".join(f"{len(parts[part])} {part or 'others'}" for part in parts)
    name = os.path.basename(parts[first][0])
    at = name.lower().index(first) + len(first)
    pattern = os.path.join(os.path.dirname(parts[first][0]), f"{name[:at]}*")
    raise InputError(
        f'{path} holds several parts of a data set ({said}): give one, as in "{pattern}"; a list in braces, {{a,b}}, '
        "packs them together"
    )


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the strings that a shell makes of `pattern`: {a,b} and {000..123}, the latter with its zeros."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    low, high, listed = match.groups()
    if listed:
        parts = listed.split(",")
    else:
        width = len(low) if low.startswith("0") or len(low) == len(high) else 0
        parts = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def _shards_in(path: str) -> list[str]:
    """Return the tar, TFRecord and HDF5 files directly in a folder; none if it is one of images."""
    shards = []
    for file in sorted(Path(path).expanduser().iterdir()):
        if file.name.startswith(".") or file.suffix.lower() in NOT_SHARDS or not file.is_file():
            continue
        if _kind_of_file(str(file)) is None:
            return []
        shards.append(str(file))
    return shards


def _kind_of_file(file: str) -> SourceKind | None:
    start = start_of(file)
    if start.startswith(ZIP) and not file.lower().endswith(NOT_ARCHIVES):
        return "zip"
    if start.startswith(SIGNATURE):
        return "hdf5"
    if is_tfrecord(start):  # before tar: both may be compressed
        return "tfrecord"
    return "tar" if is_tar(start) else None

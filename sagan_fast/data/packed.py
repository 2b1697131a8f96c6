"""Reads packed image sets: decoded once, and copied from the page cache since.

A set is a folder:

    images.npy     uint8 (N, 3, R, R), the pixels from byte 4096 on; `np.load(..., mmap_mode="r")` reads it
    labels.npy     int64 (N,), all 0 where the set has no classes
    manifest.json  what is in it, where from, how it was cropped and resized, checksums by block; written last
    broken.txt     what could not be read and was left out, if anything

A set is one file, not shards: a batch is one gather over one mapping, which costs the same for 10 and for 10 million
images and needs no Python code per image. Channels come first, so that batches have the same strides as from a folder.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sagan_fast.data.dataset import ImageDataset, match_classes
from sagan_fast.errors import InputError
from sagan_fast.files import explained, reason
from sagan_fast.words import list_some

FORMAT = "sagan_fast packed images"
VERSION = 1
IMAGES, LABELS, MANIFEST, BROKEN = "images.npy", "labels.npy", "manifest.json", "broken.txt"
PROGRESS = "progress.jsonl"
"""There while a set is being prepared."""
HEADER_BYTES = 4096


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        num_images: N.
        resolution: R.
        class_names: one per label; empty if the set has no classes.
        class_counts: images per class.
        num_broken: items of the source that were left out.
        source: kind, path, fingerprint and number of items of what it was made from.
        transform: crop, filter and the like, in words.
        made_with: versions of the libraries that decoded.
        checksums: algorithm, images per block, one digest per block of images.npy's pixels, one of the labels.
    """

    format: str
    version: int
    num_images: int
    resolution: int
    class_names: list[str]
    class_counts: list[int]
    num_broken: int
    source: dict[str, Any]
    transform: dict[str, Any]
    made_with: dict[str, str]
    checksums: dict[str, Any]

    def dumps(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the packed set in `folder`.

    Raises InputError if there is no whole packed set, or one of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_no_set(folder)) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a packed set")
    if content.get("version") != VERSION:
        raise InputError(f"{path} is of version {content.get('version')}, and this program reads version {VERSION}")
    expected = {field.name for field in fields(Manifest)}
    if missing := sorted(expected - content.keys()):
        raise InputError(f"{path} is damaged: it has no {', '.join(missing)}")
    manifest = Manifest(**{name: content[name] for name in expected})
    if not _is_well_formed(manifest):
        raise InputError(f"{path} is damaged: its values are not of the kinds that they must be")
    return manifest


def _is_well_formed(manifest: Manifest) -> bool:
    if not isinstance(manifest.source, dict) or not isinstance(manifest.checksums, dict):
        return False
    names, counts, blocks = manifest.class_names, manifest.class_counts, manifest.checksums.get("images")
    if not (isinstance(names, list) and isinstance(counts, list) and isinstance(blocks, list)):
        return False
    at_least_one = (manifest.num_images, manifest.resolution, manifest.checksums.get("images_per_block"))
    numbers = (manifest.num_broken, manifest.source.get("items"), *counts)
    return all(isinstance(n, int) and n >= 1 for n in at_least_one) and all(isinstance(n, int) for n in numbers)


def _no_set(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist: check the path (relative ones start at {os.getcwd()})"
    if not folder.is_dir():
        return f"{folder} is a file: give the folder that `sagan-fast prepare` wrote"
    if (folder / PROGRESS).exists():
        return f"{folder} is not finished: run the same `sagan-fast prepare` again, it goes on where it stopped"
    return f"{folder} holds no packed set (no {MANIFEST}): make one with `sagan-fast prepare SRC {folder} --size R`"


def header(num_images: int, resolution: int) -> bytes:
    """Return the first 4096 bytes of images.npy: the .npy format, version 1.0, padded to a page."""
    shape = (num_images, 3, resolution, resolution)
    described = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + described.ljust(length - 1) + b"\n"


def new_digest(data: Any = b"") -> hashlib.blake2b:
    """Return the running checksum that manifests use, of `data` so far: bytes or a contiguous array."""
    return hashlib.blake2b(data, digest_size=16)


def image_bytes(resolution: int) -> int:
    """Return the bytes of one image."""
    return 3 * resolution * resolution


class PackedDataset(ImageDataset):
    """A packed set, memory-mapped; batches are gathered by one copy, without decoding.

    `resolution` must be the one it was packed with, or None. Raises InputError if there is no whole set, it has another
    resolution or other classes than wanted, or a class without images.
    """

    in_threads = True

    def __init__(self, path: str, *, resolution: int | None, num_classes: int | None = None) -> None:
        name = f"packed:{path}"
        self.folder = Path(path).expanduser()
        self.manifest = manifest = read_manifest(self.folder)
        self.preprocessing = manifest.transform
        if resolution not in (None, manifest.resolution):
            raise InputError(
                f"{name} holds images of {manifest.resolution}x{manifest.resolution}, and {resolution}x{resolution} "
                f"are wanted: make another with `sagan-fast prepare {manifest.source.get('path', 'SRC')} "
                f"{path.rstrip('/')}-{resolution} --size {resolution}`"
            )
        names = match_classes(name, manifest.class_names, num_classes)
        empty = [label for label, images in zip(names, manifest.class_counts, strict=False) if not images]
        if empty:
            raise InputError(
                f"{name}: {len(empty)} of its {len(names)} classes ({list_some(empty)}) have no images: labels that "
                "are counted from 1 are prepared with --first-label 1; num_classes: 0 trains without classes"
            )
        labels = load_labels(self.folder, manifest)
        super().__init__(name, resolution=manifest.resolution, class_names=names, labels=labels)
        source = manifest.source
        self.passed_over, self.labels_from = source.get("passed_over", {}), source.get("labels_from", "")
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None, "_file": None}  # a spawned process maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._images = map_images(self.folder, self.manifest)
        self._file = open(self.folder / IMAGES, "rb")  # noqa: SIM115, for as long as the data set lives

    def load(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, R, R)."""
        return torch.from_numpy(self._images[index].copy())

    def _identity(self) -> Iterator[bytes]:
        yield self.manifest.dumps().encode()  # it has the checksums

    def read_batch(
        self, indices: npt.NDArray[np.int64], out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Return images uint8 (B, 3, R, R), in `out` if that is given, labels int64 (B,) and {}; one copy."""
        if out is None:
            out = torch.empty((len(indices), *self._images.shape[1:]), dtype=torch.uint8)
        self._read_ahead(indices)
        np.take(self._images, indices, axis=0, out=out.numpy(), mode="clip")  # "raise" would copy twice
        return out, torch.from_numpy(self.labels[indices]), {}

    def _read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """Tell the system which pages come next, all at once and in their order on the disk.

        The mapping alone would ask for them one fault at a time, several times slower where they are not in the page
        cache; where they are, this is 2 us of the 10 that an image of 128x128 takes.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        size = image_bytes(self.resolution)
        for offset in (HEADER_BYTES + np.sort(indices) * size).tolist():
            os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def load_labels(folder: Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Return labels.npy, int64 (N,); InputError if it is not what the manifest says."""
    path = folder / LABELS
    with explained(f"{path} cannot be read", kinds=(OSError, ValueError, EOFError)):
        labels: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
    if labels.shape != (manifest.num_images,) or labels.dtype != np.int64:
        wanted = f"int64 ({manifest.num_images},)"
        raise InputError(f"{path} is damaged: it must hold {wanted}, and holds {labels.dtype} {labels.shape}")
    return labels


def map_images(folder: Path, manifest: Manifest) -> npt.NDArray[np.uint8]:
    """Return images.npy as a read-only memory map, uint8 (N, 3, R, R); InputError if it is not of that size."""
    path = folder / IMAGES
    shape = (manifest.num_images, 3, manifest.resolution, manifest.resolution)
    with explained(f"{path} cannot be read"):
        with open(path, "rb") as file:
            start, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
        wanted = HEADER_BYTES + math.prod(shape)
        if size != wanted:
            raise InputError(f"{path} is damaged: it must have {wanted} bytes, and has {size}")
        if start != header(manifest.num_images, manifest.resolution):
            raise InputError(f"{path} is damaged: its header is not that of {shape} uint8")
        return np.asarray(np.memmap(path, np.uint8, "r", offset=HEADER_BYTES, shape=shape))

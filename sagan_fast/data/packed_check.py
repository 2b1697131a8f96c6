"""Checks a packed set against its manifest: files, sizes, labels, and every pixel by its checksum."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sagan_fast.data.packed import BROKEN, Manifest, load_labels, map_images, new_digest, read_manifest
from sagan_fast.data.packed_writer import Progress
from sagan_fast.errors import InputError
from sagan_fast.files import explained
from sagan_fast.words import list_some


def check(
    folder: str | os.PathLike[str], *, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Manifest:
    """Verify the packed set in `folder` and return its manifest.

    Args:
        on_progress: called after every block of images.

    Raises InputError if there is no whole set, or something in it is wrong; the sentence names all that is.
    """
    path = Path(folder).expanduser()
    manifest = read_manifest(path)
    wrong = _contradictions(manifest)
    for look in (_wrong_labels, _wrong_list, functools.partial(_wrong_blocks, on_progress)):
        try:
            wrong += look(path, manifest)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(f"{path} is damaged: {'; '.join(wrong)}")
    return manifest


def _contradictions(manifest: Manifest) -> list[str]:
    """Return what in the manifest cannot be true together."""
    wrong = []
    if manifest.class_names and sum(manifest.class_counts) != manifest.num_images:
        wrong.append(f"its classes have {sum(manifest.class_counts)} images, the set has {manifest.num_images}")
    if len(manifest.class_counts) != len(manifest.class_names):
        wrong.append(f"it has {len(manifest.class_counts)} class counts and {len(manifest.class_names)} class names")
    per_block, blocks = manifest.checksums["images_per_block"], len(manifest.checksums["images"])
    if blocks != -(-manifest.num_images // per_block):
        wrong.append(f"it has {blocks} checksums for {manifest.num_images} images in blocks of {per_block}")
    read = manifest.source["items"]
    if manifest.num_images + manifest.num_broken != read:
        wrong.append(f"{manifest.num_images} images and {manifest.num_broken} broken ones are not {read} items")
    return wrong


def _wrong_labels(folder: Path, manifest: Manifest) -> list[str]:
    wrong, labels = [], load_labels(folder, manifest)
    if new_digest(labels.tobytes()).hexdigest() != manifest.checksums["labels"]:
        wrong.append("labels.npy has a wrong checksum")
    classes = max(len(manifest.class_names), 1)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        wrong.append(f"{len(outside)} labels are not in 0..{classes - 1}, the first of image {outside[0]}")
    elif manifest.class_names:
        counts = np.bincount(labels, minlength=classes).tolist()
        differ = [
            name for name, a, b in zip(manifest.class_names, counts, manifest.class_counts, strict=False) if a != b
        ]
        if differ:
            wrong.append(f"{len(differ)} classes have other numbers of images than it states ({list_some(differ)})")
    return wrong


def _wrong_list(folder: Path, manifest: Manifest) -> list[str]:
    with explained(f"{BROKEN} cannot be read"):
        lines = (folder / BROKEN).read_bytes().count(b"\n") if (folder / BROKEN).exists() else 0
    broken = manifest.num_broken
    return [f"{BROKEN} has {lines} lines for {broken} broken images"] if lines != broken else []


def _wrong_blocks(on_progress: Callable[[Progress], None], folder: Path, manifest: Manifest) -> list[str]:
    images = map_images(folder, manifest)
    per_block, digests = manifest.checksums["images_per_block"], manifest.checksums["images"]
    starts = range(0, len(images), per_block)

    def is_wrong(number: int) -> bool:  # hashing leaves the interpreter to the other threads
        start = starts[number]
        return bool(new_digest(images[start : start + per_block]).hexdigest() != digests[number])

    wrong = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        known = min(len(starts), len(digests))
        for number, bad in enumerate(pool.map(is_wrong, range(known))):
            if bad:
                wrong.append(f"{starts[number]}-{min(starts[number] + per_block, len(images)) - 1}")
            done = min((number + 1) * per_block, len(images))
            on_progress(Progress(items=done, images=done, position=done, total=len(images)))
    if wrong:
        return [f"{len(wrong)} of {len(starts)} blocks of images have a wrong checksum (images {list_some(wrong)})"]
    return []

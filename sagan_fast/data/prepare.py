"""Makes packed sets: worker processes decode, and this process writes the images in the order of the source.

The bytes depend on the source and the options alone, not on the number of processes, nor on where a preparation was
cut off; see packed_writer.py for what makes that safe.
"""

import functools
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from sagan_fast.choices import OnBroken
from sagan_fast.data.classes import differences
from sagan_fast.data.dataset import MAX_BROKEN_IN_A_ROW
from sagan_fast.data.images import BrokenImageError
from sagan_fast.data.loader import ignore_stop_signals, load
from sagan_fast.data.packed import MANIFEST, PROGRESS, Manifest, image_bytes, read_manifest
from sagan_fast.data.packed_writer import Chunk, PackedWriter, Progress, stamp_of
from sagan_fast.data.sources import Source, open_source
from sagan_fast.errors import InputError
from sagan_fast.words import counted

TASK_BYTES = 2 * 2**20
"""Pixels a process decodes at a time."""
SECONDS_BETWEEN_LOOKS = 1.0


def prepare(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    resolution: int,
    num_workers: int | None = None,
    on_broken: OnBroken = "fail",
    class_names: list[str] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], object] = lambda: False,
) -> Manifest | None:
    """Pack `source` into `folder`, or continue to; return the manifest, or None if `stop` ended it early.

    Args:
        resolution: R, pixels a side.
        num_workers: processes that decode; None is one per processor, 0 decodes in this one.
        on_broken: "fail" stops at the first broken item, "skip" leaves them out and lists them in broken.txt.
        class_names: the names in the order of the labels; they replace mere numbers.
        on_progress: called after every few images.

    Raises InputError if the folder holds something else or cannot be written, the disk is full, an item is broken and
    `on_broken` is "fail", nothing is left, or the names do not fit the labels.
    """
    target = Path(folder).expanduser()
    if source.kind == "folder" and target.resolve().is_relative_to(Path(source.path).expanduser().resolve()):
        raise InputError(f"{folder} lies in the folder of images, {source.path}: give a folder elsewhere")
    _check_names(source, class_names)
    if source.faults and on_broken == "fail":
        name, why = source.faults[0]
        raise InputError(
            f"{name} cannot be read: {why}; nothing is packed yet: repair it and start again, or add --on-broken skip"
        )
    settings = {
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
        "first_label": source.first_label,
        "labels_from": source.labels_from,
        "resolution": resolution,
        **made_with(),
    }
    if (target / MANIFEST).exists():
        return _already_there(target, settings, source, class_names)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with closing(PackedWriter(target, settings, resolution)) as writer:
        _check_packed_part(writer, source)
        done = writer.progress
        done.total = source.total
        _check_space(target, source, done, resolution)
        on_progress(done)
        in_a_row = 0
        with closing(_decoded(source, resolution, num_workers, done.items)) as chunks:
            for chunk in chunks:
                in_a_row = 0 if chunk.labels else in_a_row + len(chunk.broken)
                if chunk.broken and (on_broken == "fail" or in_a_row >= MAX_BROKEN_IN_A_ROW):
                    writer.commit()
                    raise InputError(_why_stopped(chunk, on_broken, in_a_row, done))
                writer.append(chunk)
                on_progress(done)
                if stop():
                    writer.commit()
                    return None
        return writer.finish(source, class_names)


def made_with() -> dict[str, str]:
    """Return the versions of the libraries that decode and resize; other versions may give other bytes."""
    codecs = {"libjpeg": "jpg", "libwebp": "webp", "libjpeg_turbo": "libjpeg_turbo"}
    versions = {name: features.version(codec) for name, codec in codecs.items()}
    return {"pillow": PIL.__version__, **{name: version for name, version in versions.items() if version}}


def _check_names(source: Source, names: list[str] | None) -> None:
    """Raise InputError if `names` are not those of the source, where that is known before the work begins."""
    if names is None:
        return
    if source.class_names == []:
        raise InputError(f"{source.path} is read without labels, and --classes names some: leave it out")
    if source.class_names is not None and sorted(source.class_names) != sorted(names):
        raise InputError(f"{source.path} has other classes than --classes: {differences(source.class_names, names)}")
    if source.class_names is None and source.label_counts and len(names) != (needed := max(source.label_counts) + 1):
        raise InputError(
            f"{source.path} has {counted(needed, 'class')}, and --classes names {len(names)}: give {needed} names"
        )


def _check_packed_part(writer: PackedWriter, source: Source) -> None:
    """Raise InputError if what an unfinished preparation has packed has changed since."""
    done = writer.progress.items
    if done and stamp_of(source, itertools.islice(source.items(), done)) != writer.stamp.hexdigest():
        raise InputError(
            f"{writer.folder} holds an unfinished preparation, and pictures or labels that are in it have changed "
            f"since in {source.path}: remove the folder, or give another one"
        )


def _already_there(folder: Path, settings: dict[str, Any], source: Source, class_names: list[str] | None) -> Manifest:
    """Return the manifest of the whole set in `folder`; InputError if it was made of something else."""
    manifest = read_manifest(folder)
    there = {**manifest.source, "resolution": manifest.resolution}
    compared = ("kind", "first_label", "resolution", "labels_from")
    changed = [key for key in compared if there.get(key, settings[key]) != settings[key]]
    if class_names is not None and manifest.class_names != class_names:
        changed.append("class names")
    if not changed and (why := changed_since(manifest, source)):
        raise InputError(
            f"{folder} was packed on {packed_on(folder)}, and {why}: remove it to pack them again, or give another "
            "folder"
        )
    if changed:
        said = ", ".join(key.replace("_", " ") for key in changed)
        raise InputError(
            f"{folder} holds another packed set, with other {said} ({counted(manifest.num_images, 'image')} of "
            f"{manifest.resolution}x{manifest.resolution} from {manifest.source.get('path')}): remove it or give "
            "another folder"
        )
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def changed_since(manifest: Manifest, source: Source) -> str:
    """Return what says that `source` is no longer what was packed, or nothing; one look at every file, no reading."""
    if "stamp" not in manifest.source and source.kind != "folder":
        return ""  # packed when fingerprints did not hold times
    if manifest.source.get("fingerprint") != source.fingerprint():
        return f"the files of {source.path} have changed since"
    stamp, items = manifest.source.get("stamp"), itertools.islice(source.items(), manifest.source["items"])
    if stamp is not None and stamp != stamp_of(source, items):
        return f"pictures or labels of {source.path} have changed since"
    return ""


def compare_with_source(folder: str | os.PathLike[str]) -> str:
    """Return a sentence about whether the source of the whole packed set in `folder` is still what was packed.

    Raises InputError if it has changed.
    """
    target = Path(folder).expanduser()
    manifest = read_manifest(target)
    path, first_label = manifest.source.get("path"), manifest.source.get("first_label")
    try:
        source = open_source(str(path), manifest.source["kind"], first_label, unlabelled=not manifest.class_names)
    except (InputError, KeyError) as error:
        return f"its source {path} was not compared: {error}"
    if why := changed_since(manifest, source):
        raise InputError(f"{folder} was packed on {packed_on(target)}, and {why}: prepare it again in another folder")
    return f"its source {path} is as it was when it was packed, {packed_on(target)}"


def packed_on(folder: Path) -> str:
    """Return the day and time at which the whole set in `folder` was finished."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))


def _check_space(folder: Path, source: Source, done: Progress, resolution: int) -> None:
    """Raise InputError if the disk is too small, before hours of work."""
    if source.num_items is None:
        return
    needed, free = (source.num_items - done.items) * image_bytes(resolution), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} needs {needed / 1e9:.1f} GB more for {source.num_items} images of {resolution}x{resolution}, "
            f"and its disk has {free / 1e9:.1f} GB free: make room or give a folder elsewhere"
        )


def _why_stopped(chunk: Chunk, on_broken: str, in_a_row: int, done: Progress) -> str:
    name, reason = chunk.broken[0]
    kept = f"{counted(done.images, 'image is', 'images are')} packed so far"
    if on_broken == "fail":
        return f"{name} cannot be read: {reason}; {kept}: repair it and start again, or add --on-broken skip"
    return (
        f"{in_a_row} items in a row could not be read, among them {name}: {reason}; {kept}: run the same command again "
        "when the cause is gone"
    )


def _decode(source: Source, resolution: int, items: list[Any]) -> Chunk:
    """Return the items of one task, decoded; in a worker process, where there are any."""
    images = np.empty((len(items), 3, resolution, resolution), np.uint8)
    labels: list[int] = []
    broken = []
    stamps = [source.stamp(item) for item in items] if source.has_stamps else []  # before reading: a change shows
    for item, read in zip(items, source.read_many(items, resolution), strict=True):
        if isinstance(read, BrokenImageError):
            broken.append((source.name_of(item), str(read)))
        else:
            images[len(labels)], label = read
            labels.append(label)
    # arrays travel through a pipe: tensors would need shared memory, of which containers have little
    return Chunk(len(items), source.position(items[-1]), images[: len(labels)], labels, broken, stamps)


def _decoded(source: Source, resolution: int, num_workers: int, start: int) -> Generator[Chunk]:
    """Return a generator of the chunks from item `start` on, in order."""
    size = source.items_per_task or max(1, TASK_BYTES // image_bytes(resolution))
    items = itertools.islice(source.items(), start, None)
    tasks: Iterator[list[Any]] = iter(lambda: list(itertools.islice(items, size)), [])
    begin = functools.partial(_begin_worker, os.getpid())
    return load(functools.partial(_decode, source, resolution), tasks, num_workers, begin)


def _begin_worker(parent: int, worker_id: int) -> None:
    """End the worker when its parent ends, in whatever way.

    DataLoader's own watch is not enough: a worker that has more to send than a pipe holds would wait for ever.
    """
    ignore_stop_signals(worker_id)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

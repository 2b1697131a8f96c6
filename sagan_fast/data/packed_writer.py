"""Writes a packed set; after a kill or a full disk the next start continues where it stopped.

Images are appended to images.npy.part, and each line of progress.jsonl says how much of it is valid. A line is written
only after its pixels are on the disk. The next start cuts off what follows the last whole line and does it again. The
manifest is written last: a set that has one is complete.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sagan_fast.data.packed import (
    BROKEN,
    FORMAT,
    HEADER_BYTES,
    IMAGES,
    LABELS,
    MANIFEST,
    PROGRESS,
    VERSION,
    Manifest,
    header,
    image_bytes,
    new_digest,
)
from sagan_fast.data.sources.base import Source
from sagan_fast.errors import InputError
from sagan_fast.files import clean, hold, move, reason, replacing
from sagan_fast.version import __version__
from sagan_fast.words import counted

BLOCK_BYTES = 64 * 2**20
"""Pixels under one checksum."""
SYNC_SECONDS = 1.0
LOCK = ".lock"
ENTRY_KEYS = {"items", "labels", "position", "broken", "blocks", "stamps"}
"""Of a line of the journal after the first, which holds the settings."""
TRANSFORM = {
    "crop": "largest centred square",
    "filter": "Pillow bilinear, antialiased when shrinking; none where the square has the right size",
    "colour": "RGB, transparency over white, turned upright by EXIF",
}


@dataclass
class Progress:
    """The progress of a preparation.

    Attributes:
        items: items of the source read, broken ones among them.
        images: images packed.
        position: done of `total`, in the source's units.
        broken: (name, reason) of what was left out.
    """

    items: int = 0
    images: int = 0
    position: int = 0
    total: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Chunk:
    """Consecutive items, decoded: images uint8 (n, 3, R, R), their n labels, the broken ones, all items' stamps."""

    items: int
    position: int
    images: npt.NDArray[np.uint8]
    labels: list[int]
    broken: list[tuple[str, str]]
    stamps: list[str]


def stamp_of(source: Source, items: Iterable[Any]) -> str:
    """Return the digest of what changes when the content of one of `items` changes."""
    digest = new_digest()
    for item in items if source.has_stamps else ():
        digest.update(os.fsencode(source.stamp(item)) + b"\0")
    return digest.hexdigest()


class PackedWriter:
    """Continues the unfinished set in `folder`: append chunks, commit them, finish the set.

    Raises InputError if the folder cannot be written, holds something else or the unfinished set of other `settings`,
    or another process is at work on it; from all methods where the disk is full.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resolution: int) -> None:
        self.folder, self.settings, self.resolution = folder, settings, resolution
        self.progress = Progress()
        self._part = folder / f"{IMAGES}.part"
        self._images_per_block = max(1, BLOCK_BYTES // image_bytes(resolution))
        self._labels: list[int] = []
        self._blocks: list[str] = []
        self._digest = new_digest()
        self.stamp = new_digest()
        self._pending: list[dict[str, Any]] = []
        self._num_safe = 0
        with self._sentences(), ExitStack() as opened:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / PROGRESS).exists() and any(path.name != LOCK for path in folder.iterdir()):
                raise InputError(f"{folder} holds other files: give a folder that is empty or not there yet")
            taken = f"another process is preparing {folder}: wait for it or give another folder"
            opened.callback(hold(folder / LOCK, taken))
            clean(folder)
            self._journal = opened.enter_context(_open(folder / PROGRESS))
            if (folder / IMAGES).exists():  # killed between the last steps of finish
                move(folder / IMAGES, self._part)
            self._images = opened.enter_context(_open(self._part))
            self._recover()
            self._opened = opened.pop_all()
        self._synced = time.monotonic()

    def append(self, chunk: Chunk) -> None:
        """Write the images of `chunk` at the end."""
        with self._sentences():
            _write_all(self._images, chunk.images.tobytes())
            for stamp in chunk.stamps:
                self.stamp.update(os.fsencode(stamp) + b"\0")
            entry = {**vars(chunk), "blocks": self._add_to_digest(chunk.images)}
            del entry["images"]
            self._count(entry)
            self._pending.append(entry)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()

    def commit(self) -> None:
        """Write everything appended to the disk and to the journal."""
        with self._sentences():
            self._sync()

    def finish(self, source: Source, class_names: list[str] | None) -> Manifest:
        """Finish the set and return its manifest; `class_names` replace the numbers of classes."""
        self.commit()
        done = self.progress
        if not done.images:
            raise InputError(f"{source.path}: none of its {counted(done.items, 'item')} could be read")
        labels = np.array(self._labels, np.int64)
        if class_names is not None and source.class_names:
            places = {name: label for label, name in enumerate(class_names)}
            labels = np.array([places[name] for name in source.class_names], np.int64)[labels]
        names = _names(source, class_names, labels)
        decoders = {key: value for key, value in self.settings.items() if key.startswith(("pillow", "lib"))}
        blocks = [*self._blocks, *([self._digest.hexdigest()] if done.images % self._images_per_block else [])]
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            num_images=done.images,
            resolution=self.resolution,
            class_names=names,
            class_counts=np.bincount(labels, minlength=len(names)).tolist() if names else [],
            num_broken=len(done.broken),
            source={
                "kind": source.kind,
                "path": source.path,
                "fingerprint": self.settings["fingerprint"],
                "first_label": source.first_label,
                "items": done.items,
                "stamp": self.stamp.hexdigest(),
                "labels_from": source.labels_from,
                "passed_over": dict(source.passed_over),
            },
            transform=TRANSFORM,
            made_with={"sagan_fast": __version__, "numpy": np.__version__, **decoders},
            checksums={
                "algorithm": "blake2b, 16 bytes",
                "images_per_block": self._images_per_block,
                "images": blocks,
                "labels": new_digest(labels.tobytes()).hexdigest(),
            },
        )
        with self._sentences():
            self._images.seek(0)
            _write_all(self._images, header(done.images, self.resolution))
            os.fsync(self._images.fileno())
            with replacing(self.folder / LABELS) as file:
                np.save(file, labels)
            if done.broken:
                with replacing(self.folder / BROKEN) as file:
                    lines = (f"{name}: {reason}".replace("\n", "\\n") for name, reason in done.broken)
                    file.writelines(os.fsencode(line) + b"\n" for line in lines)
            self._images.close()
            move(self._part, self.folder / IMAGES)
            with replacing(self.folder / MANIFEST) as file:
                file.write(manifest.dumps().encode())
            os.unlink(self.folder / PROGRESS)
        return manifest

    def close(self) -> None:
        """Close the files; what is not committed is done again next time."""
        self._opened.close()

    def _recover(self) -> None:
        """Read the journal, continue after what it lists, and cut off the rest."""
        whole, size = 0, os.fstat(self._images.fileno()).st_size
        for line in self._journal.read().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            if not whole:
                self._compare(entry)
            elif entry.keys() != ENTRY_KEYS or self._bytes(self.progress.images + len(entry["labels"])) > size:
                break
            else:
                self._count(entry)
                self._blocks += entry["blocks"]
                for stamp in entry["stamps"]:
                    self.stamp.update(os.fsencode(stamp) + b"\0")
            whole += len(line)
        self._journal.truncate(whole)
        self._journal.seek(whole)
        if not whole:
            _write_all(self._journal, _json_line(self.settings))
        self._journal_end = self._journal.tell()
        self._num_safe = self.progress.images
        end = self._bytes(self._num_safe)
        self._images.truncate(end)  # also makes room for the header
        if begun := self._num_safe % self._images_per_block:  # the checksum of the last block goes on
            self._images.seek(self._bytes(self._num_safe - begun))
            self._digest.update(self._images.read(begun * image_bytes(self.resolution)))
        self._images.seek(end)

    def _compare(self, before: dict[str, Any]) -> None:
        changed = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if changed:
            said = ", ".join(
                "the source's files" if k == "fingerprint" else f"{k} (was {before.get(k)}, now {self.settings.get(k)})"
                for k in changed
            )
            raise InputError(
                f"{self.folder} holds an unfinished preparation that differs in {said}: remove the folder, or give "
                "another one"
            )

    def _count(self, entry: dict[str, Any]) -> None:
        self.progress.items += entry["items"]
        self.progress.images += len(entry["labels"])
        self.progress.position = entry["position"]
        self.progress.broken += [(name, reason) for name, reason in entry["broken"]]
        self._labels += entry["labels"]

    def _add_to_digest(self, images: npt.NDArray[np.uint8]) -> list[str]:
        """Add `images` to the running checksum; return those of the blocks that are now full."""
        full = []
        room = self._images_per_block - self.progress.images % self._images_per_block
        while len(images):
            part, images = images[:room], images[room:]
            self._digest.update(part.data)
            if len(part) == room:
                full.append(self._digest.hexdigest())
                self._digest = new_digest()
            room = self._images_per_block
        self._blocks += full
        return full

    def _sync(self) -> None:
        if self._pending:
            os.fsync(self._images.fileno())
            self._journal.truncate(self._journal_end)  # half a line, where the disk was full
            self._journal.seek(self._journal_end)
            _write_all(self._journal, b"".join(map(_json_line, self._pending)))
            os.fsync(self._journal.fileno())
            self._journal_end = self._journal.tell()
            self._pending = []
        self._num_safe = self.progress.images
        self._synced = time.monotonic()

    def _bytes(self, images: int) -> int:
        return HEADER_BYTES + images * image_bytes(self.resolution)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Save what can be saved when writing fails, then raise InputError with the reason."""
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                self._sync()
            safe = f"; {counted(self._num_safe, 'image is', 'images are')} safe there, and the same command goes on"
            said = f"{self.folder} cannot be written: {reason(error)}{safe if self._num_safe else ''}"
            raise InputError(said) from error


def _names(source: Source, given: list[str] | None, labels: npt.NDArray[np.int64]) -> list[str]:
    if source.class_names is not None:
        return source.class_names if given is None else given
    needed = int(labels.max()) + 1
    if given is None:
        return [str(number) for number in range(needed)]
    if len(given) < needed:
        raise InputError(
            f"{source.path} has labels up to {needed - 1}, and --classes has {len(given)} names: give {needed}; "
            "everything is packed, the same command with the right names finishes at once"
        )
    return given


def _open(path: Path) -> IO[bytes]:
    path.touch()
    return path.open("r+b", buffering=0)


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"

"""Tar shards in the WebDataset layout: KEY.jpg beside KEY.cls (a whole number), or the number in KEY.json.

Members with one key follow each other and make one sample; the key is the path up to the first dot of its last part
(https://github.com/webdataset/webdataset). Plain shards are listed by their headers and read by many processes;
compressed ones can only be read from their beginning, so the listing process unpacks them and sends the bytes.
"""

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sagan_fast.data.dataset import list_some
from sagan_fast.data.folders import EXTENSIONS, NOT_DATA
from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.sources.base import GZIP, FilesSource, Image, check_label, start_of
from sagan_fast.errors import InputError

LABEL_KEYS = ("cls", "label", "class")
"""Where a KEY.json may hold the class number; the first that is there."""
MAX_LABEL_BYTES = 2**20
OTHER_COMPRESSION = {"zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}


@dataclass
class TarItem:
    """One sample: where its image is, or the bytes themselves, or what is wrong with it."""

    file: int
    key: str
    name: str = ""  # of the member with the image, once it is found
    offset: int = 0  # of the image in its shard
    size: int = 0
    position: int = 0
    label: str | None = None
    data: bytes | None = None
    broken: str = ""
    cut: bool = False  # the shard ended within the sample: what it lacks may have followed

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, packed: bool, before: int) -> None:
        """Take over what `member` has of the sample; the shards before have `before` bytes."""
        if f".{extension.rpartition('.')[2]}" in EXTENSIONS:
            if self.name:
                self.broken = f"it has a second image, {member.name} (a key ends at the first dot)"
                return
            self.name, self.size, self.offset = member.name, member.size, member.offset_data
            self.position = before + (0 if packed else member.offset_data + member.size)
            if packed:
                self.data = _content(tar, member)
        elif extension in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
            text = _content(tar, member).decode("utf-8", "replace")
            if extension == "cls":
                self.label = text.strip()
            elif self.label is None:
                self.label = _label_in_json(text)


class TarSource(FilesSource):
    """Samples of all shards, in the order of the shards and within them.

    Raises InputError if a shard is no tar file, or the first holds no image.
    """

    kind = "tar"

    def __init__(self, path: str, shards: Sequence[str], first_label: int = 0) -> None:
        for shard in shards:
            _check_kind(shard)
        super().__init__(path, shards, first_label)
        first = next((item for item in self.items() if not item.broken and not item.cut), None)
        first = first or next((item for item in self.items() if not item.broken), None)
        if first is None:
            fault = next(self.items(), None)
            why = f"{self.name_of(fault)}: {fault.broken}" if fault else "a sample is KEY.jpg and KEY.cls in a tar file"
            raise InputError(f"{path} holds no sample whose image ({list_some(EXTENSIONS)}) can be found: {why}")
        self._labelled = first.label is not None
        if not self._labelled:
            self._refuse_class_folders(first)
        self.class_names = None if self._labelled else []

    def name_of(self, item: TarItem) -> str:
        return f"{self.files[item.file]}/{item.name}"

    def read(self, item: TarItem, resolution: int) -> tuple[Image, int]:
        if item.broken:
            raise BrokenImageError(item.broken)
        label = self._number(item)
        data = item.data
        if data is None:
            data = self.bytes_at(item.file, item.offset, item.size)
            if len(data) < item.size:
                raise BrokenImageError("the shard ends within it")
        return read_image(io.BytesIO(data), resolution).numpy(), label

    def _number(self, item: TarItem) -> int:
        if (item.label is not None) != self._labelled:
            raise BrokenImageError(f"it has {'no' if self._labelled else 'a'} label, unlike the first sample")
        if item.label is None:
            return 0
        try:
            number = int(item.label)
        except ValueError:
            raise BrokenImageError(f"its label {item.label[:40]!r} is not a whole number") from None
        return check_label(number, self.first_label)

    def items_of(self, file: int, before: int) -> Iterator[TarItem]:
        keys: set[str] = set()
        sample, packed = TarItem(file, ""), False
        try:
            with _open_tar(self.files[file]) as (tar, packed):
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
                    key, extension = _split(member.name)
                    parts = member.name.split("/")
                    hidden = any(p.lower() in NOT_DATA or (p.startswith(".") and p != ".") for p in parts)
                    if hidden or not member.isfile() or not extension:
                        continue
                    if not keys or sample.key != key:
                        if sample.name:
                            yield sample
                        repeated = "another sample of its shard has the same key" if key in keys else ""
                        sample = TarItem(file, key, broken=repeated)
                        keys.add(key)
                    sample.add(tar, member, extension, packed, before)
            if sample.name:
                yield sample
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            if sample.name:
                missing = sample.data is None if packed else sample.offset + sample.size > self._sizes[file]
                if missing and not sample.broken:
                    sample.broken = "the shard ends within it"
                sample.cut = True
                yield sample
            reason = f"the shard is damaged or cut short after {len(keys)} keys ({' '.join(str(error).split())})"
            yield TarItem(file, "*", "*", position=before + self._sizes[file], broken=reason)

    def _refuse_class_folders(self, first: TarItem) -> None:
        """Raise InputError if the shards hold folders of images without labels: all would fall into one class."""
        here = os.path.dirname(first.name)
        other = next((i for i in self.items_of(0, 0) if not i.broken and os.path.dirname(i.name) != here), None)
        if other is not None:
            there = os.path.dirname(other.name)
            raise InputError(
                f"{self.path} has no labels (KEY.cls), but folders of images ({here or '.'}, {there or '.'}, ...): if "
                "they are classes, unpack it and give the folder"
            )


@contextmanager
def _open_tar(path: str) -> Iterator[tuple[tarfile.TarFile, bool]]:
    """Yield the tar file in `path`, and whether it is compressed; raise at the end if it was cut short."""
    with open(path, "rb") as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        # not tarfile's own gzip, which does not check the sum at the end
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        with tarfile.open(fileobj=stream, mode="r|" if packed else "r:") as tar:
            yield tar, packed
        while packed and stream.read(2**20):
            pass
        size = stream.tell() if packed else os.fstat(file.fileno()).st_size
        if size < tar.offset + tarfile.BLOCKSIZE:  # tarfile takes the end of the file for a block of zeros
            raise tarfile.ReadError("it has no end mark")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _split(name: str) -> tuple[str, str]:
    """Return key and extension, lower case, of a member."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _label_in_json(text: str) -> str | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    labels = (content.get(key) for key in LABEL_KEYS) if isinstance(content, dict) else ()
    return next((str(label) for label in labels if isinstance(label, int | str)), None)


def _check_kind(path: str) -> None:
    """Raise InputError if the file is no tar file, plain or gzip."""
    start = start_of(path)
    for name, magic in OTHER_COMPRESSION.items():
        if start.startswith(magic):
            raise InputError(f"{path} is compressed with {name}: unpack it, or compress it with gzip")
    try:
        with _open_tar(path) as (tar, _):
            tar.next()
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        if not is_tar(start):
            raise InputError(f"{path} is no tar file, plain or compressed with gzip") from None


def is_tar(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a tar file, plain or gzip."""
    return start[257:262] == b"ustar" or start.startswith(GZIP)

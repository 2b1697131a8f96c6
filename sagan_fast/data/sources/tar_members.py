"""Walks through tar files: tar files within them, several in a row, links, and whatever is damaged.

Tar files are `tarfile`'s own. What it passes over silently is read or reported here: a damaged header in the midst
counts as an end there, and what follows an end mark (`cat a.tar b.tar`) is never looked at.
"""

import gzip
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from sagan_fast.data.sources.base import GZIP, start_of
from sagan_fast.errors import InputError

FILE, LINK, FOLDER, OTHER, DAMAGED = "file", "link", "folder", "device or pipe", "damaged"
MOST_LINKS = 16
"""Links that lead to each other before one counts as leading nowhere."""
ENDINGS = (".tar", ".tar.gz", ".tgz")
OTHER_COMPRESSION = {"zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)
"""What reading a damaged tar file raises."""


@dataclass
class Member:
    """A member of a tar file.

    Attributes:
        name: its path, without "./".
        kind: one of the kinds above.
        archive: name of the tar file within the tar file that it is in, without its ending; "" at the top.
        offset, size: where its content is in the file, unpacked.
        target: of a link, the name that it leads to; of a damaged tar file within, what is wrong.
        content: returns the content; to be called before the next member is asked for.
    """

    name: str
    kind: str
    archive: str
    offset: int
    size: int
    target: str
    content: Callable[[], bytes]


class TarArchive:
    """One file of tar, plain or gzip.

    Attributes:
        packed: whether it is compressed, and so can only be read from its beginning.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.packed = file.read(len(GZIP)) == GZIP
        self._targets: dict[tuple[str, str], tuple[int, int, bytes | None]] = {}

    def members(self) -> Iterator[Member]:
        """Yield all members; at damage raise `tarfile.TarError`, OSError, EOFError, ValueError or zlib.error."""
        with open(self.path, "rb") as file:
            # not tarfile's own gzip, which does not check the sum at the end
            stream: Any = gzip.GzipFile(fileobj=file) if self.packed else file
            start: int | None = 0
            while start is not None:
                yield from _walk(stream, start)
                start = _next_block(stream)

    def find_targets(self) -> None:
        """Look up what the links lead to, in two passes; at damage, what came before it."""
        links: dict[tuple[str, str], str] = {}
        for member in self._whole_members():
            if member.kind == LINK:
                links[member.archive, member.name] = member.target
        ends = {(place[0], end) for place in links if (end := _follow(links, place)) is not None}
        found: dict[tuple[str, str], tuple[int, int, bytes | None]] = {}
        for member in self._whole_members() if ends else ():
            if member.kind == FILE and (member.archive, member.name) in ends:
                with suppress(*DAMAGE):
                    data = member.content() if self.packed else None
                    found[member.archive, member.name] = (member.offset, member.size, data)
        self._targets = {
            place: found[place[0], end]
            for place in links
            if (end := _follow(links, place)) is not None and (place[0], end) in found
        }

    def _whole_members(self) -> Iterator[Member]:
        with suppress(*DAMAGE):
            yield from self.members()

    def resolved(self, member: Member) -> Member | None:
        """Return the link `member` as the file that it leads to; None if that is not in the archive."""
        found = self._targets.get((member.archive, member.name))
        if found is None:
            return None
        offset, size, data = found

        def content() -> bytes:
            if data is not None:
                return data
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(size)

        return Member(member.name, FILE, member.archive, offset, size, "", content)


def stem(path: str) -> str:
    """Return the base name of a tar file without its ending."""
    name = os.path.basename(path)
    return next((name[: -len(end)] for end in reversed(ENDINGS) if name.lower().endswith(end)), name)


def _follow(links: dict[tuple[str, str], str], place: tuple[str, str]) -> str | None:
    for _ in range(MOST_LINKS):
        if place not in links:
            return place[1]
        place = (place[0], links[place])
    return None


class _Noting(tarfile.TarInfo):
    """Notes in the tar file why there is no further member: tarfile itself takes every reason for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Noting":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ending = error  # type: ignore[attr-defined]
            raise


def _walk(stream: IO[bytes], start: int, archive: str = "", limit: int | None = None) -> Iterator[Member]:
    """Yield the members of the tar file at byte `start`, which ends before `limit`; leave the stream at its end."""
    stream.seek(start)
    members = 0
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Noting) as tar:
        while (member := tar.next()) is not None and (limit is None or member.offset < limit):
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
            members += 1
            name = posixpath.normpath(member.name)
            if member.isfile() and not archive and name.lower().endswith(".tar"):
                try:
                    yield from _walk(stream, member.offset_data, stem(name), member.offset_data + member.size)
                except tarfile.TarError as error:
                    yield _member(tar, member, name, archive, DAMAGED, str(error))
            else:
                yield _member(tar, member, name, archive, *_kind(member, name))
        ending = getattr(tar, "ending", None)
    if isinstance(ending, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
        return
    if ending is None or isinstance(ending, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
        raise tarfile.ReadError("it has no end mark")
    if not members and start:
        raise tarfile.ReadError(f"what begins at byte {start} is no tar file")
    raise tarfile.ReadError(f"its header at byte {tar.offset} is damaged")


def _kind(member: tarfile.TarInfo, name: str) -> tuple[str, str]:
    if member.isfile():
        return FILE, ""
    if member.islnk():
        return LINK, posixpath.normpath(member.linkname)
    if member.issym():
        return LINK, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    return (FOLDER if member.isdir() else OTHER), ""


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, archive: str, kind: str, target: str) -> Member:
    def content() -> bytes:
        file = tar.extractfile(member)
        found = file.read() if file is not None else b""
        if len(found) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return found

    return Member(name, kind, archive, member.offset_data, member.size, target, content)


def _next_block(stream: IO[bytes]) -> int | None:
    """Return where the next block that is not zeros begins, from the stream's position on; None at the end."""
    while chunk := stream.read(tarfile.BLOCKSIZE * 128):
        if kept := chunk.lstrip(b"\0"):
            place = len(chunk) - len(kept)
            return stream.tell() - len(chunk) + place // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def check_tar(path: str) -> None:
    """Raise InputError if the file is no tar file, plain or gzip."""
    start = start_of(path)
    for name, magic in OTHER_COMPRESSION.items():
        if start.startswith(magic):
            raise InputError(f"{path} is compressed with {name}: unpack it, or compress it with gzip")
    try:
        next(TarArchive(path).members(), None)
    except DAMAGE:
        if not is_tar(start):
            raise InputError(f"{path} is no tar file, plain or compressed with gzip") from None


def is_tar(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a tar file, plain or gzip."""
    return start[257:262] == b"ustar" or start.startswith(GZIP)

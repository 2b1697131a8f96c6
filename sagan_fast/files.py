"""Writes files completely or not at all, holds locks, and turns system errors into sentences."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sagan_fast.errors import InputError
from sagan_fast.words import nearest

WRITING = (OSError, RuntimeError)
"""What a failed write raises; RuntimeError is PyTorch's word for a full disk."""
RUN = "run folder or checkpoint"
"""What most commands are given."""
PART = ".part"
"""Ends the name of a file that is being written; the name begins with a dot."""


def reason(error: BaseException) -> str:
    """Return in one line why `error` was raised: the system's words, or the first line of its message.

    PyTorch's advice to run what a file holds (`weights_only=False`) is not repeated.
    """
    if "weights_only" in str(error):
        return "it holds more than plain data"
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def check_exists(path: Path, what: str) -> None:
    """Raise InputError if there is no `path`: "there is no `what` `path`", with the nearest name of a folder there."""
    if path.exists():
        return
    parent = path.absolute().parent
    known = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    raise InputError(f"there is no {what} {path}{nearest(path.name, known)}")


@contextmanager
def explained(what: str, after: str = "", kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn an exception of `kinds` from inside into the InputError "`what`: reason`after`"."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {reason(error)}{after}") from error


@contextmanager
def written(path: Path, what: str = "", after: str = "", *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a file as `replacing` does; where it fails, raise the InputError "cannot write `what`: reason`after`".

    `what` is the path if not given.
    """
    with explained(f"cannot write {what or path}", after, WRITING), replacing(path, durable=durable) as file:
        yield file


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `path` at the end; if anything is raised, `path` is not changed.

    The folder is made if it is missing. `durable` waits, some milliseconds, until the content is on the disk: otherwise
    a power cut may leave an empty file. A link is followed; a pipe or device is written directly. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    with _beside(path.resolve(), durable) as part, part.open("xb") as file:
        yield file
        if durable:
            _flush(file)


def link(path: Path, name: Path) -> None:
    """Make `name` a hard link to the file `path`, or a whole copy where there are no links. Raises OSError."""
    if name.exists() and name.samefile(path):
        return
    with _beside(name, True) as part:
        try:
            os.link(path, part)
        except OSError:
            with path.open("rb") as old, part.open("xb") as new:
                shutil.copyfileobj(old, new)
                _flush(new)


def move(source: Path, target: Path, *, durable: bool = True) -> None:
    """Rename the file or folder `source` to `target`, which is replaced if it is a file. Raises OSError."""
    os.replace(source, target)
    if durable and hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clean(folder: Path) -> None:
    """Remove from `folder` what killed processes left half written."""
    for path in folder.glob(f".*{PART}"):
        with suppress(OSError):  # one file too many is no reason to stop
            path.unlink()


def hold(path: Path, sentence: str, patience: float = 0.0) -> Callable[[], None]:
    """Hold the lock file `path` for this process and return the function that releases it.

    Forked children do not hold it, and the death of the process releases it. Raises the InputError `sentence` when
    another process still holds it after `patience` seconds. Where a file system has no locks, nothing is held.
    """
    from filelock import FileLock, Timeout  # here, so that reading needs torch and numpy only

    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    with suppress(OSError):
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise InputError(sentence) from None

    def release() -> None:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes it later
                path.unlink()
            lock.release()

    return release


@contextmanager
def _beside(path: Path, durable: bool) -> Iterator[Path]:
    """Yield a free name beside `path`; the file made there becomes `path`, or is removed if anything is raised."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        yield part
        move(part, path, durable=durable)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file `path` in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

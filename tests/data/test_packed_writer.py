"""The writer dies at each of its system calls in turn, or the disk is full at each, and the result is the same."""

import errno
import io
import os

import numpy as np
import pytest

import sagan_fast.data.packed_writer as module
from sagan_fast.data.packed_check import check
from sagan_fast.data.packed_writer import Chunk, PackedWriter
from sagan_fast.data.sources.base import Source
from sagan_fast.errors import InputError

SETTINGS = {"kind": "folder", "fingerprint": "0", "pillow": "1"}


class Nothing(Source):
    """What finish asks of a source."""

    kind, path, class_names, total = "folder", "nowhere", ["a", "b", "c"], 26
    items = position = name_of = read = fingerprint = None


Nothing.__abstractmethods__ = frozenset()


class Killed(BaseException):
    """Ends the process as far as the writer can tell."""


@pytest.fixture
def chunks(rng):
    """Seven chunks of up to seven images of 4x4, some with broken items, one with nothing else."""
    made, done = [], 0
    for size, broken in [(7, 0), (1, 2), (0, 3), (6, 0), (5, 1), (1, 0), (0, 0)]:
        done += size + broken
        made.append(
            Chunk(
                size + broken,
                done,
                rng.integers(0, 256, (size, 3, 4, 4), dtype=np.uint8),
                rng.integers(0, 3, size).tolist(),
                [(f"{done}-{i}\n\udcff", "bad luck") for i in range(broken)],
                [f"{done}-{i}\udcff" for i in range(size + broken)],
            )
        )
    return made


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 48 * 4)
    monkeypatch.setattr(module, "SYNC_SECONDS", -1)  # after every chunk


def write(folder, chunks):
    """Write the chunks that are not there yet, and finish."""
    if (folder / "manifest.json").exists():
        return
    writer = PackedWriter(folder, SETTINGS, 4)
    try:
        done = 0
        for chunk in chunks:
            if done >= writer.progress.items:
                writer.append(chunk)
            done += chunk.items
        writer.finish(Nothing(), None)
    finally:
        writer.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("progress.jsonl", ".lock")}


def failing(monkeypatch, at, error):
    """Make the call number `at` of those that change a file or the disk raise `error`; returns the calls counted."""
    calls = []

    def counted(name, call, half=None):
        def run(*args):
            calls.append(name)
            if len(calls) - 1 == at:
                if half:
                    half(*args)
                raise error
            return call(*args)

        return run

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(module.os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(
        module, "_write_all", counted("write", module._write_all, lambda file, data: file.write(data[: len(data) // 2]))
    )
    return calls


def test_what_is_written(chunks, tmp_path):
    write(tmp_path / "set", chunks)
    images = np.load(tmp_path / "set" / "images.npy")
    assert np.array_equal(images, np.concatenate([chunk.images for chunk in chunks]))
    assert np.load(tmp_path / "set" / "labels.npy").tolist() == sum((chunk.labels for chunk in chunks), [])
    manifest = check(tmp_path / "set")
    assert (manifest.num_images, manifest.num_broken, len(manifest.checksums["images"])) == (20, 6, 5)
    assert sorted(contents(tmp_path / "set")) == ["broken.txt", "images.npy", "labels.npy", "manifest.json"]


def test_killed_at_every_call_and_continued(chunks, tmp_path, monkeypatch):
    write(tmp_path / "straight", chunks)
    expected = contents(tmp_path / "straight")
    at = 0
    while True:
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            calls = failing(patch, at, Killed())
            try:
                write(folder, chunks)
            except Killed:
                pass
            else:
                break
        write(folder, chunks)
        assert contents(folder) == expected, f"killed at call {at}, {calls[-1]}"
        at += 1
    assert at > 25


def test_killed_again_and_again(chunks, tmp_path, monkeypatch):
    write(tmp_path / "straight", chunks)
    attempts = 0
    while not (tmp_path / "set" / "manifest.json").exists():
        with monkeypatch.context() as patch:
            failing(patch, 6 + attempts // 3, Killed())
            try:
                write(tmp_path / "set", chunks)
            except Killed:
                attempts += 1
        assert attempts < 60
    assert attempts > 3 and contents(tmp_path / "set") == contents(tmp_path / "straight")


def test_full_disk_at_every_call_is_a_sentence_and_loses_nothing(chunks, tmp_path, monkeypatch):
    write(tmp_path / "straight", chunks)
    expected = contents(tmp_path / "straight")
    at, safe = 0, set()
    while True:
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            calls = failing(patch, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            try:
                write(folder, chunks)
            except InputError as error:
                assert f"{folder} cannot be written: No space left on device" in str(error) and "\n" not in str(error)
                safe.add(str(error).partition("; ")[2])
            else:
                break
        write(folder, chunks)
        assert contents(folder) == expected, f"full at call {at}, {calls[-1]}"
        at += 1
    assert "20 images are safe there, and the same command goes on" in safe and "7 images are safe" in str(safe)


def test_what_is_promised_safe_is_there(chunks, tmp_path, monkeypatch):
    for at in range(3, 25):
        with monkeypatch.context() as patch:
            failing(patch, at, OSError(errno.ENOSPC, "full"))
            with pytest.raises(InputError) as caught:
                write(tmp_path / str(at), chunks)
        writer = PackedWriter(tmp_path / str(at), SETTINGS, 4)
        promised = str(caught.value).partition("; ")[2].split(" ")[0]
        assert writer.progress.images == int(promised or 0)
        writer.close()


def test_a_real_limit_on_the_size_of_files(chunks, tmp_path):
    resource = pytest.importorskip("resource")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 48 * 9, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written: File too large; 8 images are safe there"):
            write(tmp_path / "set", chunks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    write(tmp_path / "set", chunks)
    assert check(tmp_path / "set").num_images == 20


@pytest.mark.parametrize("line", ["[]", "{}", '{"labels": [1]}', "3", "\udcff"])
def test_a_journal_with_other_lines(chunks, tmp_path, line):
    write(tmp_path / "straight", chunks)
    writer = PackedWriter(tmp_path / "set", SETTINGS, 4)
    for chunk in chunks[:2]:
        writer.append(chunk)
    writer.close()
    with open(tmp_path / "set" / "progress.jsonl", "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    write(tmp_path / "set", chunks)
    assert contents(tmp_path / "set") == contents(tmp_path / "straight")


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_or_shortened_file(chunks, tmp_path, cut):
    write(tmp_path / "straight", chunks)
    for name in ("progress.jsonl", "images.npy.part"):
        folder = tmp_path / name
        writer = PackedWriter(folder, SETTINGS, 4)
        for chunk in chunks[:5]:
            writer.append(chunk)
        writer.close()
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-cut])
        write(folder, chunks)
        assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(chunks, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        write(tmp_path / "set", chunks)
    tmp_path.chmod(0o700)


def test_a_place_where_no_folder_can_be(chunks, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be written: (File exists|Not a directory)$"):
            write(path, chunks)


def test_class_names(chunks, tmp_path):
    class Numbers(Nothing):
        class_names = None

    Numbers.__abstractmethods__ = frozenset()
    for name, given, expected in [
        ("numbers", None, ["0", "1", "2"]),
        ("more", ["x", "y", "z", "w"], ["x", "y", "z", "w"]),
    ]:
        writer = PackedWriter(tmp_path / name, SETTINGS, 4)
        for chunk in chunks:
            chunk.labels[:1] = [2] * len(chunk.labels[:1])
            writer.append(chunk)
        if given:
            with pytest.raises(InputError, match=r"has labels up to 2, and --classes has 2 names: give 3"):
                writer.finish(Numbers(), given[:2])
        assert writer.finish(Numbers(), given).class_names == expected
        writer.close()
        check(tmp_path / name)


def test_write_all_writes_all():
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(data[:3])

    file = Slow()
    module._write_all(file, b"0123456789")
    assert file.getvalue() == b"0123456789"

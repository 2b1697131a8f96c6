"""Whole or not at all, one process at a time, and a sentence for whatever goes wrong."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.data import DataLoader

from sagan_fast.errors import InputError
from sagan_fast.files import WRITING, check_exists, clean, explained, hold, link, move, reason, replacing, written
from shared_by_tests import start_ranks


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_there_whole_with_the_rights_of_any_other(tmp_path):
    path = tmp_path / "a" / "b.txt"
    before = os.umask(0o027)
    try:
        for content in (b"old", b"new"):
            with written(path) as file:
                file.write(content)
                assert not path.exists() or path.read_bytes() == b"old"
            assert path.read_bytes() == content
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), KeyboardInterrupt(), ValueError("x"), RuntimeError("y")])
@pytest.mark.parametrize("durable", [True, False])
def test_whatever_is_raised_the_old_file_stays_and_nothing_else(tmp_path, error, durable):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path, durable=durable) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_is_a_sentence(tmp_path, monkeypatch, name):
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(InputError, match=f"^cannot write {path}: No space left on device$"), written(path) as file:
        file.write(b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_only_what_must_be_on_the_disk_waits_for_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    for durable, expected in ((False, []), (True, [False, True])):  # the file, then the folder with its name
        with replacing(tmp_path / "x", durable=durable) as file:
            file.write(b"1")
        assert calls == expected


def test_a_place_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path / "file" / "below", "(Not a directory|File exists)"), (tmp_path, "Is a directory")):
        refused = pytest.raises(InputError, match=f"^cannot write the page: {said}; sorry$")
        with refused, written(path, "the page", "; sorry"):
            raise AssertionError("there is nothing to write to")


def test_a_link_is_followed_and_a_pipe_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "far" / "file")
    with written(tmp_path / "name") as file:
        file.write(b"x")
    assert (tmp_path / "name").is_symlink() and (tmp_path / "far" / "file").read_bytes() == b"x"

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    with written(pipe) as file:
        file.write(b"y")
    thread.join(10)
    assert read == [b"y"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("links", [True, False])
def test_another_name_of_a_file(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", full)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    for _ in range(2):  # the second time both are the same file already
        link(a, b)
        assert b.read_text() == "1" and b.samefile(a) == links and sorted(tmp_path.iterdir()) == [a, b]


def test_a_killed_writer_leaves_what_is_cleaned_away(tmp_path):
    program = """
import os, sys, pathlib
from sagan_fast.files import written
with written(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "x"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "mine.part").write_text("")
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.part", "x"]


def test_a_folder_takes_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    move(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_reasons_are_one_line():
    assert reason(OSError(errno.ENOENT, "No such file", "x")) == "No such file"
    assert reason(OSError("bad")) == "bad" and reason(RuntimeError("a\nb")) == "a" and reason(EOFError()) == "EOFError"
    with pytest.raises(InputError, match="^it: a, again$"), explained("it", ", again", WRITING):
        raise RuntimeError("a\nb")
    with pytest.raises(RuntimeError), explained("it"):
        raise RuntimeError("of another kind")


def holder(folder, reader, then):
    """Hold a lock, fork a reader, do as `then` says, say its number in folder/ready, and stay."""
    release = hold(folder / ".lock", "taken")
    number = 0
    if reader == "forked":
        pipe = os.pipe()
        number = os.fork()
        if number == 0:
            if then == "reader drops it":
                release()
                del release
            os.write(pipe[1], b"1")
            time.sleep(60)
            os._exit(0)
        os.read(pipe[0], 1)
    elif reader == "of a DataLoader":
        readers = iter(DataLoader(range(1000), num_workers=1, collate_fn=list))
        next(readers)
        number = readers._workers[0].pid
    if then == "release":
        release()
    with written(folder / "ready") as file:
        file.write(str(number).encode())
    time.sleep(60)


def is_free(path):
    """Ask in a process of its own, as another run would."""
    program = "import filelock, sys\nfilelock.FileLock(sys.argv[1]).acquire(timeout=0)"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 or "Timeout" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize(
    ("reader", "then"),
    [("none", "wait"), ("forked", "reader drops it"), ("forked", "release"), ("of a DataLoader", "wait")],
)
def test_one_process_holds_a_lock_and_its_readers_do_not(tmp_path, reader, then):
    """Whatever a forked reader does the lock stays its parent's, and a killed parent gives it back though it lives."""
    (process,) = start_ranks(holder, 1, tmp_path, reader, then)
    number = 0
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.01)
        number = int((tmp_path / "ready").read_text())
        if then == "release":
            assert not (tmp_path / ".lock").exists()
        else:
            assert not is_free(tmp_path / ".lock")
            process.kill()
            process.join()
        if number:
            os.kill(number, 0)  # the reader is there
        assert is_free(tmp_path / ".lock")
    finally:
        process.kill()
        process.join()
        if number:
            os.kill(number, signal.SIGKILL)


def test_a_lock_is_waited_for(tmp_path):
    release = hold(tmp_path / ".lock", "taken")
    with pytest.raises(InputError, match="^taken$"):
        hold(tmp_path / ".lock", "taken", patience=0.1)
    release()
    release()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    import fcntl

    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refused)
    for _ in range(2):
        hold(tmp_path / ".lock", "taken")


def test_what_is_not_there_is_said_with_the_nearest_folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    check_exists(tmp_path / "tiny", "run")
    with pytest.raises(InputError, match="^there is no run .*tinny: did you mean 'tiny'"):
        check_exists(tmp_path / "tinny", "run")
    with pytest.raises(InputError, match="^there is no run .*none/run$"):
        check_exists(tmp_path / "none" / "run", "run")

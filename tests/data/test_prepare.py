"""Preparation: the same bytes for any workers and any interruption, broken images listed, nothing lost."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sagan_fast.data.packed_writer as writer
import sagan_fast.data.prepare as module
from sagan_fast.data import open_dataset
from sagan_fast.data.packed_check import check
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


def pack(folder, out, **options):
    return prepare(open_source(str(folder)), out, **{"resolution": 8, "num_workers": 0, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_kind_of_image_is_as_in_the_folder(image_folder, tmp_path):
    for resolution in (8, 12, 40):
        out = tmp_path / str(resolution)
        manifest = pack(image_folder, out, resolution=resolution)
        ours, theirs = (
            open_dataset(f"{kind}:{path}", resolution=resolution)
            for kind, path in (("packed", out), ("folder", image_folder))
        )
        assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(ours, theirs, strict=True))
        assert manifest.num_images == 16 and manifest.class_counts == [8, 8] and check(out) == manifest
        assert sorted(contents(out)) == ["images.npy", "labels.npy", "manifest.json"]
    assert manifest.source["kind"] == "folder" and manifest.made_with["pillow"] and manifest.transform["filter"]


def test_flat_folder(image_folder, tmp_path):
    manifest = pack(image_folder / "cat", tmp_path / "out")
    assert manifest.class_names == [] == manifest.class_counts
    assert open_dataset(f"packed:{tmp_path / 'out'}", resolution=8, num_classes=0).num_classes == 0
    with pytest.raises(InputError, match="has no classes"):
        open_dataset(f"packed:{tmp_path / 'out'}", resolution=8, num_classes=2)
    check(tmp_path / "out")


def test_the_number_of_workers_changes_no_byte(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK_BYTES", 3 * 64 * 2)  # two images a task
    (image_folder / "cat" / "broken.png").write_bytes(b"no image")
    for workers in (0, 1, 3):
        pack(image_folder, tmp_path / str(workers), num_workers=workers, on_broken="skip")
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


def test_broken_images_are_left_out_and_listed(image_folder, tmp_path):
    truncated = (image_folder / "cat" / "a plain.jpg").read_bytes()[:300]
    (image_folder / "cat" / "cut.jpg").write_bytes(truncated)
    (image_folder / "dög 2" / "two\nlines.png").write_bytes(b"no image")
    (image_folder / "dög 2" / "empty.png").write_bytes(b"")
    manifest = pack(image_folder, tmp_path / "out", on_broken="skip")
    assert manifest.num_images == 16 and manifest.num_broken == 3 and manifest.class_counts == [8, 8]
    lines = (tmp_path / "out" / "broken.txt").read_text().splitlines()
    assert [line.rpartition("/")[2].partition(": ")[0] for line in lines] == ["cut.jpg", "empty.png", "two\\nlines.png"]
    assert "truncated" in lines[0].lower() and "not an image that Pillow can read" in lines[2]
    images = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    (image_folder / "cat" / "cut.jpg").unlink()
    assert (images[15][0] == open_dataset(f"folder:{image_folder / 'dög 2'}", resolution=8)[-1][0]).all()
    check(tmp_path / "out")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_name_that_is_no_unicode(image_folder, tmp_path):
    bad = os.fsencode(image_folder / "cat") + b"/\xff\xfe.png"
    with open(bad, "wb") as file:
        file.write(b"no image")
    manifest = pack(image_folder, tmp_path / "out", on_broken="skip", num_workers=1)
    assert manifest.num_broken == 1 and (tmp_path / "out" / "broken.txt").read_bytes().startswith(bad + b": ")
    check(tmp_path / "out")


def test_fail_names_the_file_keeps_what_is_done_and_goes_on_when_repaired(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK_BYTES", 1)
    path = image_folder / "dög 2" / "gray.jpg"
    good = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"gray\.jpg cannot be read: .*; 10 images are packed so far: repair it and"):
        pack(image_folder, tmp_path / "out", num_workers=2)
    path.write_bytes(good)
    seen = []
    pack(image_folder, tmp_path / "out", on_progress=lambda p: seen.append((p.images, p.position, p.total)))
    assert seen[0] == (10, 10, 16) and seen[-1] == (16, 16, 16)
    pack(image_folder, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_lost_disk_ends_soon(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(150):
        (tmp_path / "images" / f"{i:03}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"100 items in a row could not be read|150 items in a row"):
        pack(tmp_path / "images", tmp_path / "out", on_broken="skip")


def test_nothing_readable(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of its 1 item could be read"):
        pack(tmp_path / "images", tmp_path / "out", on_broken="skip")


def test_stopped_and_continued(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK_BYTES", 1)
    pack(image_folder, tmp_path / "straight")
    for expected in (3, 6, 9, 12, 15):
        last = []
        stopped = pack(
            image_folder,
            tmp_path / "out",
            on_progress=lambda p, to=last: to.append(p.images),
            stop=lambda to=last: len(to) == 4,
        )
        assert stopped is None and last[-1] == expected
    assert pack(image_folder, tmp_path / "out").num_images == 16
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_the_same_command_again_changes_nothing_and_another_is_refused(image_folder, tmp_path):
    first = pack(image_folder, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert pack(image_folder, tmp_path / "out") == first
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"holds another packed set, with other resolution \(16 images of 8x8 from"):
        pack(image_folder, tmp_path / "out", resolution=4)
    Image.new("RGB", (9, 9)).save(image_folder / "cat" / "new.png")
    with pytest.raises(InputError, match=r"was packed on 2\S+ \S+, and the files of \S+images have changed since"):
        pack(image_folder, tmp_path / "out")


def test_an_unfinished_set_of_something_else_is_refused(image_folder, tmp_path, monkeypatch):
    assert pack(image_folder, tmp_path / "out", stop=lambda: True) is None
    with pytest.raises(InputError, match=r"unfinished preparation that differs in resolution \(was 8, now 4\): remove"):
        pack(image_folder, tmp_path / "out", resolution=4)
    with pytest.raises(InputError, match=r"differs in the source's files, labels_from \(was sub-folders, now"):
        pack(image_folder / "cat", tmp_path / "out")
    monkeypatch.setattr(module, "made_with", lambda: {"pillow": "1.0"})
    with pytest.raises(InputError, match=r"pillow \(was \S+, now 1\.0\)"):
        pack(image_folder, tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(image_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="mine holds other files: give a folder that is empty or not there yet"):
        pack(image_folder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_set_is_not_put_among_the_images(image_folder):
    for out in (image_folder, image_folder / "packed", image_folder / "cat" / ".." / "new"):
        with pytest.raises(InputError, match="lies in the folder of images, .*: give a folder elsewhere"):
            pack(image_folder, out)
    assert sorted(path.name for path in image_folder.iterdir()) == ["cat", "dög 2"]


def test_too_little_room_is_said_at_once(image_folder, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=3000))
    with pytest.raises(InputError, match=r"needs 0\.0 GB more for 16 images of 8x8, and its disk has 0\.0 GB free"):
        pack(image_folder, tmp_path / "out")
    monkeypatch.undo()
    assert pack(image_folder, tmp_path / "out").num_images == 16


def many_images(folder, rng, number=240):
    folder.mkdir()
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


def begin(folder, out, **options):
    """Return a process that prepares in small steps; it is forked, so that its first instants are those of the work."""

    def work():
        module.TASK_BYTES, writer.SYNC_SECONDS, writer.BLOCK_BYTES = 5000, 0.001, 30000
        os.setsid()
        module.prepare(open_source(str(folder)), out, **{"resolution": 24, **options})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no such system")


@needs_fork
def test_killed_at_any_instant_and_continued(tmp_path, rng):
    many_images(tmp_path / "images", rng)
    begin(tmp_path / "images", tmp_path / "straight", num_workers=0).join()
    journal, manifest = tmp_path / "out" / "progress.jsonl", tmp_path / "out" / "manifest.json"
    killed, size = 0, 0
    while killed < 20 and not manifest.exists():
        process = begin(tmp_path / "images", tmp_path / "out", num_workers=killed % 2)
        deadline = time.monotonic() + 60
        while process.is_alive() and not (journal.exists() and journal.stat().st_size > size):
            assert time.monotonic() < deadline, "it makes no progress"
            time.sleep(0.0005)
        time.sleep(random.expovariate(500))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        size = journal.stat().st_size if journal.exists() else size
    process = begin(tmp_path / "images", tmp_path / "out", num_workers=2)
    process.join()
    print(f"{killed} kills")
    assert process.exitcode == 0 and killed >= 3
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    check(tmp_path / "out")


@needs_fork
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_killed_one_leaves_no_workers_and_no_lock(tmp_path, rng):
    many_images(tmp_path / "images", rng, 20)
    process = begin(tmp_path / "images", tmp_path / "out", num_workers=2, resolution=600)  # a megabyte an image
    deadline = time.monotonic() + 60
    while len(found := processes_of(process.pid)) < 3 or not (tmp_path / "out" / "progress.jsonl").exists():
        assert time.monotonic() < deadline and process.is_alive(), "the workers never came"
        time.sleep(0.01)
    process.kill()
    process.join()
    with pytest.raises(InputError, match="differs in resolution"):  # and not: another process is at work
        pack(tmp_path / "images", tmp_path / "out")
    while processes_of(process.pid):
        assert time.monotonic() < deadline, f"of {found} some live on"
        time.sleep(0.1)


@needs_fork
def test_two_at_once_are_refused(tmp_path, rng):
    many_images(tmp_path / "images", rng, 60)
    process = begin(tmp_path / "images", tmp_path / "out", num_workers=0, resolution=500)
    while not (tmp_path / "out" / "images.npy.part").exists():
        assert process.is_alive()
        time.sleep(0.001)
    with pytest.raises(InputError, match="another process is preparing"):
        pack(tmp_path / "images", tmp_path / "out", resolution=500)
    process.kill()
    process.join()


def processes_of(session):
    """Return the processes of a session, from /proc."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split() if entry.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry))
    return found


def test_journal_says_what_is_there(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK_BYTES", 3 * 64 * 3)
    pack(image_folder, tmp_path / "out", stop=lambda: True)
    settings, entry = map(json.loads, (tmp_path / "out" / "progress.jsonl").read_text().splitlines())
    assert settings["resolution"] == 8 and entry["items"] == 3 and entry["labels"] == [0, 0, 0]

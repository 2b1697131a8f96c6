"""`sagan-fast prepare` from the command line: makes, checks, refuses in a sentence."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

import sagan_fast.commands.prepare as module
from sagan_fast.cli import main
from sagan_fast.data import open_dataset


@pytest.fixture
def images(tmp_path, rng):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    return tmp_path / "images"


def test_prepare_train_on_it_and_check(images, tmp_path, capsys):
    out = str(tmp_path / "packed")
    assert main(["prepare", str(images), out, "--size", "8", "--num-workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 8 images of 8x8, 2 classes; train with --data packed:{out}",
        "labels from sub-folders: 2 classes, 0 a, 1 b",
        "4 images in each class",
    ]
    assert len(open_dataset(f"packed:{out}", resolution=8, num_classes=2)) == 8
    assert main(["prepare", "--check", out]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 8 images of 8x8, 2 classes: all right"
    assert said[1].startswith(f"its source {images} is as it was when it was packed, 2") and len(said) == 2
    (tmp_path / "packed" / "labels.npy").unlink()
    assert main(["prepare", out, "--check"]) == 2
    assert "labels.npy cannot be read" in capsys.readouterr().err


def test_broken_images(images, tmp_path, capsys, sentence):
    (images / "a" / "5.png").write_text("no image")
    out = tmp_path / "packed"
    what = ["prepare", str(images), str(out), "--size=8", "--num_workers=0"]
    assert main(what) == 2
    assert "5.png cannot be read" in sentence()
    assert main([*what, "--on-broken", "skip"]) == 0
    assert f"1 could not be read and were left out: {out / 'broken.txt'}" in capsys.readouterr().out


def test_a_stop_signal_ends_it_with_130_and_the_command_again_finishes(images, tmp_path, capsys, monkeypatch):
    import sagan_fast.data.prepare as work

    monkeypatch.setattr(work, "TASK_BYTES", 1)
    original = work._decode

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    before = signal.getsignal(signal.SIGTERM)
    what = ["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--num_workers=0"]
    with monkeypatch.context() as patch:
        patch.setattr(work, "_decode", interrupted)
        assert main(what) == 130
    said = capsys.readouterr().err
    assert said.endswith("packed: stopped as asked; the same command goes on\n") and "Traceback" not in said
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(what) == 0 and "8 images of 8x8" in capsys.readouterr().out


def test_progress_is_a_line_now_and_then(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1.0)
    assert main(["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--num_workers=0"]) == 0
    err = capsys.readouterr().err
    assert f"{tmp_path / 'packed'}: 100%, 8 images, " in err and "\x1b" not in err


def gray(images, name, value):
    Image.new("L", (9, 9), value).save(images / name / "0.png")


def test_the_same_command_after_a_change_does_not_keep_the_old_set(images, tmp_path, capsys, sentence):
    out = tmp_path / "packed"
    what = ["prepare", str(images), str(out), "--size=8", "--num_workers=0"]
    assert main(what) == 0
    capsys.readouterr()
    assert main(what) == 0
    assert capsys.readouterr().out.startswith(f"{out}: already packed on 2")
    gray(images, "a", 7)
    for command in (what, ["prepare", "--check", str(out)]):
        assert main(command) == 2
        assert (
            "was packed on 2" in (said := sentence()) and f"pictures or labels of {images} have changed since" in said
        )
    (images / "a" / "0.png").rename(images / "a" / "9.png")
    assert main(what) == 2 and f"the files of {images} have changed since" in sentence()
    images.rename(tmp_path / "elsewhere")
    assert main(["prepare", "--check", str(out)]) == 0
    assert f"its source {images} was not compared: " in capsys.readouterr().out


def test_what_is_packed_already_must_not_change_and_the_rest_may_be_repaired(images, tmp_path, monkeypatch, sentence):
    import sagan_fast.data.prepare as work

    monkeypatch.setattr(work, "TASK_BYTES", 1)
    out = tmp_path / "packed"
    what = ["prepare", str(images), str(out), "--size=8", "--num_workers=0"]
    (images / "b" / "0.png").write_text("no image")
    assert main(what) == 2 and "4 images are packed so far" in sentence()
    time = (images / "a" / "0.png").stat()
    gray(images, "a", 7)
    assert main(what) == 2 and "holds an unfinished preparation, and pictures or labels that are in it" in sentence()
    (images / "a" / "0.png").write_bytes(b" " * time.st_size)
    os.utime(images / "a" / "0.png", ns=(time.st_atime_ns, time.st_mtime_ns))  # as it was, as far as anyone can tell
    gray(images, "b", 7)
    assert main(what) == 0
    assert open_dataset(f"packed:{out}", resolution=8)[4][0].unique().tolist() == [7]


def test_a_shard_that_changed_is_seen(tmp_path, sentence):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["imgs"], file["labels"] = np.zeros((2, 3, 8, 8), np.uint8), np.arange(2)
    what = ["prepare", str(tmp_path / "a.h5"), str(tmp_path / "packed"), "--size=8", "--num_workers=0"]
    assert main(what) == 0
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["labels"][...] = [1, 0]
    assert main(what) == 2 and f"the files of {tmp_path / 'a.h5'} have changed since" in sentence()


def test_classes_from_a_file(images, tmp_path, sentence):
    (tmp_path / "order.txt").write_text("b\na\n")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    what = ["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--num_workers=0", "--classes"]
    assert main([*what, str(tmp_path / "names.txt")]) == 2
    assert "has other classes than --classes: it lacks one, two and it has a, b" in sentence()
    assert main([*what, str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read: No such file" in sentence()
    assert main([*what, str(tmp_path / "order.txt")]) == 0
    data, folder = (open_dataset(f"{kind}:{path}", resolution=8) for kind, path in
                    (("packed", tmp_path / "packed"), ("folder", images)))  # fmt: skip
    assert data.class_names == ["b", "a"] and data.labels.tolist() == [1] * 4 + [0] * 4
    assert all((a[0] == b[0]).all() for a, b in zip(data, folder, strict=True))


def test_what_was_passed_over_is_said_and_recorded(images, tmp_path, capsys):
    (images / "a" / "note.txt").write_text("x")
    (images / "a" / "@eaDir").mkdir()
    (images / "a" / "@eaDir" / "0.png").write_text("x")
    out = tmp_path / "packed"
    assert main(["prepare", str(images), str(out), "--size=8", "--num_workers=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed over: 1 .txt, 1 @eaDir"
    assert open_dataset(f"packed:{out}", resolution=8).passed_over == {".txt": 1, "@eaDir": 1}
    what = ["prepare", str(images), str(tmp_path / "flat"), "--size=8", "--num_workers=0", "--unlabelled", "true"]
    assert main(what) == 0 and "no labels are read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{}"], "prepare needs SOURCE, OUT and --size"),
        (["{}", "out"], "prepare needs SOURCE, OUT and --size"),
        (["{}", "out", "--size", "0"], "--size must be at least 1, got 0"),
        (["{}", "out", "--size", "8", "--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        (["{}", "out", "--size", "8", "--first-label", "2"], "--first-label must be 0 or 1, got 2"),
        (["{}", "out", "--sise", "8"], "unknown option --sise: did you mean '--size'?"),
        (["{}", "out", "--check"], "--check takes one folder"),
        (["{}/nothing", "out", "--size", "8"], "nothing does not exist"),
        (["{}", "--check"], "holds no packed set"),
    ],
)
def test_errors_are_a_sentence(images, sentence, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *(arg.format(images) for arg in args)]) == 2
    assert message in sentence()
    assert not (tmp_path / "out").exists()
